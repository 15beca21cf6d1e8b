"""train/train_adapter.py on several processes: the numbers of one, whole bases or shards, stopped and continued."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import before_first_step
import pytest
import torch
from adapter_runs import brief
from data_samples import code_text
from launched import Launched, program
from programs import Ended
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import pardec.data.examples
import pardec.training.running.checkpoints
from pardec.adapters.files import load_adapter
from pardec.target.base import resolve_base
from pardec.training.objective import Objective
from pardec.training.running.processes import STOPPED

ROOT = Path(__file__).parents[2]
# a global batch of 4, with batches of an evaluation that do not depend on the number of processes
SMALL = [
    "data.max_length=64", "train.batch_size=4", "train.anchors_per_sequence=8", "train.log_every=1",
    "train.warmup_steps=2", "eval.num_prompts=2", "eval.max_new_tokens=8", "eval.batch_size=1",
    "adapter.num_speculative_tokens=2", "train.mixed_precision=no", "adapter.lora.target_modules=[q_proj,down_proj]",
]  # fmt: skip


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "code.txt"
    path.write_text(code_text(900))
    return path


def launch(count: int, output: Path, text: Path, *overrides: str, is_whole: bool = False) -> Launched:
    recipe = [str(ROOT / "recipes/quickstart.yaml"), f"output_dir={output}", f"data.path={text}"]
    share = f"train.batch_size={4 // count}"
    return Launched(count, whole_run if is_whole else brief_run, *recipe, *SMALL, share, *overrides)


def whole_run(*arguments: str) -> Ended:
    return program("train_adapter", *arguments)


def brief_run(*arguments: str) -> Ended:
    with pytest.MonkeyPatch.context() as patch:
        brief(patch)
        return whole_run(*arguments)


def train(count: int, output: Path, text: Path, *overrides: str, is_whole: bool = False) -> list[Ended]:
    ended = launch(count, output, text, *overrides, is_whole=is_whole).results()
    for one in ended:
        assert one.code == 0, one.err[-2000:]
    return ended


def state(output: Path) -> dict:
    newest = max((output / "checkpoints").glob("step-*"))
    return json.loads((newest / "state.json").read_text())


def parameters(output: Path) -> dict[str, torch.Tensor]:
    return load_file(max((output / "checkpoints").glob("step-*")) / "parameters.safetensors")


def farthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def measurements(output: Path) -> list[dict]:
    return [line for line in logged(output) if "acceptance/sampled" in line]


def logged(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def small_base(tmp_path_factory) -> Path:
    """A base with the packaged one's tokenizer whose steps take next to no time."""
    folder = shutil.copytree(resolve_base("tiny-python"), tmp_path_factory.mktemp("bases") / "small")
    config = LlamaConfig.from_pretrained(folder, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    config.update({"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


# at rates as for models that people run: Adam divides rounding by gradients near 0, and large steps then part
RATES = ("train.lora_learning_rate=2e-4", "train.head_learning_rate=2e-4")
SHORT = ("train.steps=16", "eval.every=16", "train.checkpoint_every=8", *RATES)
LONG = ("train.steps=30", "eval.every=30", "train.checkpoint_every=10", *RATES)


@pytest.fixture(scope="module")
def one(text_file, tmp_path_factory) -> Path:
    """What a single process leaves."""
    output = tmp_path_factory.mktemp("runs") / "one"
    train(1, output, text_file, *SHORT)
    return output


@pytest.mark.parametrize("shard_base", ["false", "true"], ids=["copies", "shards"])
def test_two_processes_learn_and_measure_what_one_does(one, text_file, tmp_path, shard_base):
    # layers of a shard are brought in for their second run as well
    checkpointing = "0.5" if shard_base == "true" else "0"
    options = (*SHORT, f"train.shard_base={shard_base}", f"train.gradient_checkpointing={checkpointing}")
    ended = train(2, tmp_path / "two", text_file, *options)
    assert farthest(parameters(tmp_path / "two"), parameters(one)) < 1e-4
    keys = ("acceptance/sampled", "acceptance/greedy", "rank/greedy_top5_position_1")
    measured = [[[m[key] for key in keys] for m in measurements(output)] for output in (one, tmp_path / "two")]
    assert measured[0] == measured[1]
    assert measured[0][1][0] > measured[0][0][0]  # something was learned
    adapters = [load_adapter(output) for output in (one, tmp_path / "two")]
    loras = [adapter.lora.tensors for adapter in adapters if adapter.lora is not None]
    assert farthest(loras[1], loras[0]) < 1e-4
    facts = [adapter.metadata for adapter in adapters]
    assert facts[0].measured == facts[1].measured
    assert facts[0].fingerprint == facts[1].fingerprint
    how = "sharded over all" if shard_base == "true" else "whole in each"
    assert ended[0].out.startswith("2 processes, each on ")
    assert f"; the base {how}\na step: 4 sequences (2 x train.batch_size 2 x train.grad" in ended[0].out
    assert "at most 256 tokens" in ended[0].out
    assert not ended[1].out  # the main process speaks for all


@pytest.fixture(scope="module")
def whole(text_file, small_base, tmp_path_factory) -> Path:
    """What a single process leaves of the small base when nothing stops it."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    train(1, output, text_file, *LONG, f"base={small_base}", "eval.every=15", "eval.top_k=null")
    return output


def test_a_run_goes_on_by_another_number_of_processes_with_the_same_examples(whole, text_file, small_base, tmp_path):
    """Two processes, one with two forwards a step, two with a sharded base: they make the 30 steps of one."""
    output, options = (
        tmp_path / "run",
        (*LONG, f"base={small_base}", "eval.every=15", "eval.top_k=null", "train.checkpoint_keep=2"),
    )
    split = ("train.batch_size=2", "train.gradient_accumulation_steps=2")
    for count, how in ((2, ()), (1, split)):
        before = logged_steps(output)
        run = launch(count, output, text_file, *options, *how)
        wait_until(lambda before=before: logged_steps(output) > before + 3)
        run.signal(count - 1, signal.SIGUSR1 if count > 1 else signal.SIGTERM)  # to one of them is enough
        ended = run.results()
        assert [one.code for one in ended] == [STOPPED] * count, ended[0].err[-2000:]
        step = state(output)["step"]
        assert before + 3 < step == logged_steps(output)
        assert state(output)["examples"] == 4 * step
        assert f"stopped behind step {step}, as a signal asked for" in ended[0].out
    # in tiny steps of a sharded base, too, all processes bring in its layers
    train(2, output, text_file, *options, "train.shard_base=true", is_whole=True)
    assert farthest(parameters(output), parameters(whole)) < 1e-4
    assert [line["step"] for line in logged(output) if "loss" in line] == list(range(1, 31))
    assert [m["step"] for m in measurements(output)] == [0, 15, 30]  # also where a stop came in between
    assert [path.name for path in sorted((output / "checkpoints").iterdir())] == ["step-000000020", "step-000000030"]


def test_one_process_that_was_stopped_goes_on_bit_for_bit(whole, text_file, small_base, tmp_path):
    options = (*LONG, f"base={small_base}", "eval.every=15", "eval.top_k=null")
    run = launch(1, tmp_path / "run", text_file, *options)
    wait_until(lambda: logged_steps(tmp_path / "run") > 4)
    run.signal(0, signal.SIGTERM)
    assert [one.code for one in run.results()] == [STOPPED]
    train(1, tmp_path / "run", text_file, *options)
    assert farthest(parameters(tmp_path / "run"), parameters(whole)) == 0


def test_a_run_is_not_continued_with_other_steps(whole, text_file, small_base, tmp_path):
    output = shutil.copytree(whole, tmp_path / "run")
    (left,) = output.glob("checkpoints/step-*")
    left.rename(left.with_name("step-000000010"))
    told = json.loads((output / "checkpoints/step-000000010/state.json").read_text())
    (output / "checkpoints/step-000000010/state.json").write_text(json.dumps({**told, "step": 10}))
    (error, _) = launch(2, output, text_file, *LONG, f"base={small_base}", "train.batch_size=4").results()
    assert "expected the global batch (train.batch_size x train.gradient_accumulation_steps x processes)" in error.error
    assert "that it was begun with, 4, found 8; choose another output_dir" in error.error


def hindered(hindrance: str, rank: int, *arguments: str) -> Ended:
    """The program where something is wrong in one process alone."""
    with pytest.MonkeyPatch.context() as patch:
        if hindrance != "memory":
            brief(patch)
        if os.environ["RANK"] == str(rank):
            HINDRANCES[hindrance](patch)
        return program("train_adapter", *arguments)


def full_disk(*arguments: object) -> None:
    raise OSError("parameters.safetensors: expected room for 1,234 bytes, found No space left on device")


def no_number(*arguments, **options) -> tuple:
    losses, found = weighted_losses(*arguments, **options)
    return losses * float("nan"), found


weighted_losses = Objective.weighted_losses
HINDRANCES = {
    "memory": lambda patch: patch.setattr(before_first_step, "free_bytes", lambda *arguments: 2**20),
    "save": lambda patch: patch.setattr(pardec.training.running.checkpoints, "save_tensors", full_disk),
    "tokens": lambda patch: patch.setattr(pardec.data.examples.AnchoredSequences, "__getitem__", full_disk),
    "loss": lambda patch: patch.setattr(Objective, "weighted_losses", no_number),
}


@pytest.mark.parametrize(
    ("hindrance", "rank", "words"),
    [
        ("memory", 1, "memory: expected at most 0.00 GiB beside the weights, which are free, found an estimate of "),
        ("save", 0, "parameters.safetensors: expected room for 1,234 bytes, found No space left"),
        ("tokens", 1, "parameters.safetensors: expected room for 1,234 bytes, found No space left"),
        ("loss", 1, "step 1: expected a finite loss, found loss nan and gradient norm nan; lower train.learning_rate"),
    ],
)
def test_what_is_wrong_in_one_process_ends_both_with_a_line(text_file, small_base, tmp_path, hindrance, rank, words):
    recipe = [str(ROOT / "recipes/quickstart.yaml"), f"output_dir={tmp_path}/run", f"data.path={text_file}"]
    options = (*SMALL, "train.batch_size=2", "train.steps=2", f"base={small_base}", "eval.top_k=null")
    for ended in Launched(2, hindered, hindrance, rank, *recipe, *options).results():
        assert words in ended.error
    assert (tmp_path / "run").exists() == (hindrance != "memory")


def test_malformed_data_end_both_processes_with_file_and_line(small_base, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "fine"}\n{"text": 3}\n')
    for ended in launch(2, tmp_path / "run", data, f"base={small_base}").results():
        assert f"{data}:2: expected non-empty 'text'" in ended.error
    assert not (tmp_path / "run").exists()


KILLS = int(os.environ.get("KILLS", 4))  # for more of them


def test_a_kill_at_any_moment_of_two_processes_loses_at_most_one_interval(whole, text_file, small_base, tmp_path):
    """Until the run ends by itself, with the numbers of one that was never killed."""
    output, moments = tmp_path / "run", random.Random(0)
    options = (*LONG, f"base={small_base}", "eval.every=15", "eval.top_k=null", "train.checkpoint_every=3")
    for _ in range(KILLS):
        run = launch(2, output, text_file, *options)
        target = logged_steps(output) + moments.randrange(1, 5)
        wait_until(lambda target=target: logged_steps(output) >= min(target, 29))
        time.sleep(moments.random() / 10)
        run.kill()
        lost = logged_steps(output) - state(output)["step"]
        assert 0 <= lost <= 3
    train(2, output, text_file, *options)
    assert farthest(parameters(output), parameters(whole)) < 1e-4


def logged_steps(output: Path) -> int:
    try:
        return max(line["step"] for line in logged(output))
    except (OSError, ValueError):  # none yet, or half a line
        return 0


def wait_until(condition) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("expected the run to get on, found that it does not")
