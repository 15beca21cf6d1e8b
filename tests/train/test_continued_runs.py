"""train/train_adapter.py: what a run that was cut off can be continued from, and what it refuses to go on with."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import train_adapter
from adapter_runs import WHOLE, checkpoint, train
from launched import Launched

from pardec.adapters.files import load_adapter
from pardec.measures.examiner import Examiner
from pardec.training.running.checkpoints import add_to_state, read_progress
from pardec.training.running.processes import STOPPED
from pardec.training.warm_start import check_source


def test_a_run_is_not_continued_on_another_source_than_it_began_with():
    """Frozen parts are read from there at every start."""
    before = {"lora/adapter_model.safetensors": "1234"}
    check_source("runs/distilled", before, dict(before))
    check_source(None, None, None)
    with pytest.raises(ValueError, match=r"^adapter\.start_from .*distilled: expected the adapter that this run began"):
        check_source("runs/distilled", before, {"lora/adapter_model.safetensors": "5678"})


def killed_behind_its_first_steps(output: Path, text: Path) -> None:
    """A run whose process ends when it has saved more than its beginning."""
    save_state = train_adapter.save_state

    def save_and_end(checkpoints, step, *arguments, **options):
        save_state(checkpoints, step, *arguments, **options)
        if step:
            os._exit(9)

    train_adapter.save_state = save_and_end
    train(output, text, *WHOLE)


# a schedule that begins where a run goes on takes its steps before the optimiser takes one
@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning")
def test_a_run_that_was_cut_off_continues_to_the_same_numbers(whole, text_file, tmp_path):
    cut = tmp_path / "cut"
    assert Launched(1, killed_behind_its_first_steps, cut, text_file).codes() == [9]
    assert read_progress(cut / "checkpoints")["cpu_minutes"] > 0
    add_to_state(cut / "checkpoints", {"cpu_minutes": 1e6})
    again = train(cut, text_file, *WHOLE)
    assert again.code == 0, again.err[-2000:]
    assert "continuing" in again.out
    file = "parameters.safetensors"
    expected, continued = checkpoint(whole, file), checkpoint(cut, file)
    assert all(torch.equal(expected[key], continued[key]) for key in expected)
    steps = [json.loads(line)["step"] for line in (cut / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == [1, 2, 3, 4]
    assert load_adapter(cut).metadata.training["cpu_minutes"] > 1e6  # those of before count
    finished = train(cut, text_file, *WHOLE)
    assert finished.code == 0
    assert "already holds the adapter" in finished.out
    other = train(cut, text_file, *WHOLE, "adapter.dtype=bfloat16")
    assert other.code == 2
    assert (
        "expected adapter.dtype = bfloat16 as in this recipe, found the adapter of a finished run in float32"
        in other.err
    )
    other = train(cut, text_file, *WHOLE, "train.objective=cross_entropy")
    assert other.code == 2
    assert (
        "expected train.objective = 'cross_entropy' as in this recipe to continue, found a run with 'kl'" in other.err
    )
    longer = train(cut, text_file, *WHOLE, "train.steps=6")
    assert "train.steps = 6 as in this recipe to continue, found a run with 4" in longer.error
    assert longer.error.endswith(f"choose another output_dir, with adapter.start_from={cut} to train it further")
    again = train(cut, text_file, *WHOLE, "train.checkpoint_every=7", "train.log_every=3")
    assert again.code == 0  # what says only when something is written is no other run


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning")
def test_who_stops_or_kills_a_run_while_it_measures_waits_for_nothing_and_loses_no_step(
    whole, text_file, tmp_path, monkeypatch
):
    measure, output = Examiner.measure, tmp_path / "run"
    options = ("train.steps=4", "train.checkpoint_every=100", "eval.every=1")
    coming = {1: signal.SIGTERM, 2: signal.SIGINT}

    def measure_or_end(self, step, best):
        if step in coming:
            os.kill(os.getpid(), coming.pop(step))
        return measure(self, step, best)

    monkeypatch.setattr(Examiner, "measure", measure_or_end)
    for step, code in ((1, STOPPED), (2, 130)):
        stopped = train(output, text_file, *options)
        assert stopped.code == code
        assert f"behind step {step}" in stopped.out
        assert "the same command goes on from there" in stopped.out
        assert read_progress(output / "checkpoints")["step"] == step
    ended = train(output, text_file, *options)
    assert ended.code == 0, ended.err[-2000:]
    expected, found = (checkpoint(one, "parameters.safetensors") for one in (whole, output))
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "acceptance/sampled" in line] == [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def begun(text_file, tmp_path_factory) -> Path:
    """The folder of a run that was killed behind its first checkpoint; shared, so for copying only."""
    output, save_state = tmp_path_factory.mktemp("runs") / "begun", train_adapter.save_state

    def save_and_die(*arguments, **options):
        save_state(*arguments, **options)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_adapter, "save_state", save_and_die)
        assert train(output, text_file, "train.steps=1").code == 130  # what a shell says of Ctrl-C
    return output


def change_state(output: Path, change: Callable[[dict], object]) -> None:
    """Changes what a checkpoint tells of its run."""
    (file,) = output.glob("checkpoints/step-*/state.json")
    state = json.loads(file.read_text())
    change(state)
    file.write_text(json.dumps(state))


def test_a_run_is_not_continued_on_other_data(begun, text_file, tmp_path, monkeypatch):
    output, text = shutil.copytree(begun, tmp_path / "run"), text_file.read_text()
    try:
        text_file.write_text(text.replace("x + 7\n", "x + 8\n"))
        error = train(output, text_file, "train.steps=1").error
    finally:
        text_file.write_text(text)
    assert f"output_dir {output}: expected the data (sha256) that it was begun with, " in error


def test_a_run_is_not_continued_on_another_base_of_the_same_name(begun, text_file, tmp_path):
    output = shutil.copytree(begun, tmp_path / "run")
    change_state(output, lambda state: state.update({"base_sha256": state["base_sha256"][::-1]}))
    error = train(output, text_file, "train.steps=1").error
    assert (
        f"output_dir {output}: expected the base (sha256 of its sizes, tokenizer and input embeddings) that " in error
    )


def test_a_run_is_not_continued_by_half_of_the_processes_that_an_older_version_began_it_with(
    begun, text_file, tmp_path
):
    """Its steps would have other examples; an older version told of processes and of the sequences of each."""
    output = shutil.copytree(begun, tmp_path / "run")

    def as_of_old(state: dict) -> None:
        del state["global_batch"], state["examples"], state["measured"]
        state["recipe"]["train"] |= {"batch_size": 2, "gradient_accumulation_steps": 1}
        state["num_processes"] = 2

    change_state(output, as_of_old)
    error = train(output, text_file, "train.steps=1").error
    assert error.startswith(f"error: output_dir {output}: expected the global batch (train.batch_size x train.grad")
    assert "that it was begun with, 4, found 2; choose" in error
    ended = train(output, text_file, "train.steps=1", "train.gradient_accumulation_steps=2")
    assert ended.code == 0, ended.err[-2000:]


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning")
def test_a_run_that_an_older_version_began_is_continued(begun, text_file, tmp_path):
    output = shutil.copytree(begun, tmp_path / "run")
    change_state(
        output, lambda state: [state.pop(key) for key in ("global_batch", "examples", "data_sha256", "base_sha256")]
    )
    change_state(output, lambda state: state["recipe"]["data"].pop("streamed"))
    ended = train(output, text_file, "train.steps=1", "data.min_kept_share=0.25")  # which no checkpoint depends on
    assert ended.code == 0, ended.err[-2000:]
    change_state(output, lambda state: state["data_sha256"][63])  # is there from now on


@pytest.mark.parametrize("file", ["mask_embeddings.safetensors", "pardec.json"])
@pytest.mark.parametrize("steps_left", [0, 2])
def test_a_run_whose_best_adapter_is_lost_is_not_said_to_hold_it(whole, text_file, tmp_path, file, steps_left):
    output = shutil.copytree(whole, tmp_path / "run")
    if steps_left:
        (newest,) = (output / "checkpoints").iterdir()
        state = json.loads((newest / "state.json").read_text())
        (newest / "state.json").write_text(json.dumps({**state, "step": state["step"] - steps_left}))
        newest.rename(newest.with_name(f"step-{state['step'] - steps_left:09}"))
    (output / file).unlink()
    before = (output / "metrics.jsonl").read_bytes()
    assert "the best of this run is lost, choose another output_dir" in train(output, text_file, *WHOLE).error
    assert (output / "metrics.jsonl").read_bytes() == before
