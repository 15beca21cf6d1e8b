"""train/train_adapter.py: what a run leaves behind, what it can be continued from, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny_models import tiny_model
from train_adapter import check_source, optimiser_step

from pardec.adapters.gated_lora import inject_lora
from pardec.config.adapter_recipe import load_recipe
from pardec.training.module import Drafter, MaskTokenTrainer

ROOT = Path(__file__).parents[2]
K, T = 3, 20


def recipe(name: str, *overrides: str):
    sizes = ("train.batch_size=2", "train.anchors_per_sequence=4", f"adapter.num_speculative_tokens={K}")
    return load_recipe(ROOT / "recipes" / f"{name}.yaml", [*sizes, *overrides])


def test_a_step_draws_the_same_noise_in_a_run_that_is_continued():
    """So the loss of a step depends on the step, not on how often the run was started."""
    model = tiny_model("llama")
    torch.manual_seed(7)
    inject_lora(model, r=2, alpha=4, target_modules="all-linear")
    trainer = MaskTokenTrainer(model, Drafter(K, has_lora=True, draft_input="uniform_noise"))
    parameters = {name: p for name, p in trainer.named_parameters() if p.requires_grad}
    batch = {
        "input_ids": torch.randint(0, 61, (2, T)),
        "loss_mask": torch.ones(2, T, dtype=torch.bool),
        "anchors": torch.stack([torch.randperm(T - 2)[:4] for _ in range(2)]),
    }

    def loss(step: int, seed: int) -> float:
        frozen = torch.optim.SGD(parameters.values(), lr=0.0)
        told = recipe("tiny_python_noise", f"train.seed={seed}")
        sums, norm = optimiser_step(told, Accelerator(cpu=True), trainer, parameters, frozen, [batch], step)
        assert norm > 0
        return float(sums[-2, 0])

    torch.manual_seed(1)
    first = loss(step=5, seed=0)
    torch.manual_seed(2)
    assert loss(step=5, seed=0) == first
    assert len({first, loss(step=6, seed=0), loss(step=5, seed=1)}) == 3


def test_a_run_is_not_continued_on_another_source_than_it_began_with():
    """Frozen parts are read from there at every start."""
    told = recipe("tiny_python_head")
    before = {"lora/adapter_model.safetensors": "1234"}
    check_source(told, {"best": 1.0, "started_from": before}, dict(before))
    check_source(recipe("quickstart"), {"best": 1.0}, None)
    with pytest.raises(ValueError, match=r"^adapter\.start_from .*distilled: expected the adapter that this run began"):
        check_source(told, {"best": 1.0, "started_from": before}, {"lora/adapter_model.safetensors": "5678"})


# ---------------------------------------------------------------------- the script

SMALL = [
    "data.max_length=64", "train.batch_size=2", "train.anchors_per_sequence=8", "train.log_every=1",
    "train.warmup_steps=0", "eval.num_prompts=2", "eval.max_new_tokens=8", "adapter.num_speculative_tokens=2",
    "train.mixed_precision=no",
]  # fmt: skip


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "code.txt"
    path.write_text("".join(f"def f_{i}(x):\n    return x + {i}\n\n\n" for i in range(900)))
    return path


def train(output: Path, text: Path, *overrides: str, launcher: tuple[str, ...] = (), recipe: str = "quickstart"):
    command = [
        sys.executable, *launcher, str(ROOT / "train/train_adapter.py"), str(ROOT / f"recipes/{recipe}.yaml"),
        f"output_dir={output}", f"data.path={text}", *SMALL, *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def checkpoint(output: Path, file: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (newest,) = (output / "checkpoints").glob("step-*")
    return load_file(newest / file)


def test_two_processes_and_accumulation_have_the_gradients_of_one(text_file, tmp_path):
    """Gloo with 2 processes of batch 1, and one process with 2 accumulated batches of 1, against batch 2."""
    settings = {
        "one": (),
        "two": ("train.batch_size=1",),
        "accumulated": ("train.batch_size=1", "train.gradient_accumulation_steps=2", "train.anchors_per_forward=3"),
    }
    gradients, losses = {}, {}
    for name, overrides in settings.items():
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517")
        run = train(tmp_path / name, text_file, "train.steps=1", *overrides, launcher=launcher if name == "two" else ())
        assert run.returncode == 0, (name, run.stderr[-2000:])
        # after one step AdamW's first moment is a tenth of the (clipped) gradient
        moments = checkpoint(tmp_path / name, "optimizer.safetensors")
        gradients[name] = {key: value for key, value in moments.items() if key.endswith(".exp_avg")}
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert len(gradients["one"]) == 1 + 3 + 2 * 42  # mask embeddings, head, LoRA
    for name in ("two", "accumulated"):
        assert losses[name] == pytest.approx(losses["one"], rel=1e-5)
        for key, expected in gradients["one"].items():
            torch.testing.assert_close(
                gradients[name][key], expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())
            )
    assert gradients["one"]["mask_embeddings.exp_avg"].abs().max() > 0


def test_a_run_that_was_cut_off_continues_to_the_same_numbers(text_file, tmp_path):
    options = ("train.steps=4", "train.checkpoint_every=2", "eval.every=4")
    assert train(tmp_path / "whole", text_file, *options).returncode == 0
    cut = tmp_path / "cut"
    code = (
        "import runpy, sys, pardec.run as run; save = run.save_state\n"
        "def once(*a):\n    save(*a)\n    import os; a[1] and os._exit(9)\n"  # after the first step's checkpoint
        "run.save_state = once\n"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    killed = train(cut, text_file, *options, launcher=("-c", code))
    assert killed.returncode == 9
    again = train(cut, text_file, *options)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "continuing" in again.stdout
    file = "parameters.safetensors"
    whole, continued = checkpoint(tmp_path / "whole", file), checkpoint(cut, file)
    assert all(torch.equal(whole[key], continued[key]) for key in whole)
    steps = [json.loads(line)["step"] for line in (cut / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == [1, 2, 3, 4]
    finished = train(cut, text_file, *options)
    assert finished.returncode == 0
    assert "already holds the adapter" in finished.stdout
    other = train(cut, text_file, *options, "train.objective=cross_entropy")
    assert other.returncode == 2
    assert "expected a run of the same recipe" in other.stderr


def test_the_logged_acceptance_is_what_the_saved_adapter_gives(text_file, tmp_path):
    import pardec
    from pardec.data.corpus import load_corpus, standard_prompts
    from pardec.measures.acceptance import measure_acceptance

    output = tmp_path / "run"
    run = train(output, text_file, "train.steps=6", "eval.every=6", "eval.max_new_tokens=24")
    assert run.returncode == 0, run.stderr[-2000:]
    model = pardec.load(output)
    measured = model.adapter.metadata.measured
    corpus = load_corpus(str(text_file), model.tokenizer, max_length=64)
    prompts = standard_prompts(corpus.validation, num_prompts=2)
    again = measure_acceptance(model, prompts, max_new_tokens=24, temperature=0.8, top_k=10)
    assert again.to_dict()["mean_acceptance_length"] == measured["sampled"]["mean_acceptance_length"]
    assert model.adapter.metadata.training["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.lerning_rate=1"], "unknown key 'train.lerning_rate'; the nearest known one is 'train.learning_rate'"),
        (
            ["data.path=/nowhere.jsonl", "data.format=jsonl"],
            "expected a file or folder, found nothing at /nowhere.jsonl",
        ),
        (["base=/no/such/base"], "base '/no/such/base': expected a folder or hub name"),
        (["data.max_length=4096"], "data.max_length: expected at most 2048"),
        (["train.position_weights=[1e38, 1e38]"], "expected a finite loss, found"),
        (["adapter.lora.target_modules=[no_such_layer]"], "no_such_layer"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(text_file, tmp_path, overrides, words):
    output = tmp_path / "run"
    run = train(output, text_file, *overrides)
    assert run.returncode == 2, run.stderr[-2000:]
    errors = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert words in errors[0]
    assert "Traceback" not in run.stderr
    if "finite" not in words:
        assert not output.exists()


def test_malformed_data_names_file_and_line(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "fine"}\n{"text": 3}\n')
    run = train(tmp_path / "run", data)
    assert run.returncode == 2
    assert f"{data}:2: expected non-empty 'text'" in run.stderr
    assert not (tmp_path / "run").exists()
