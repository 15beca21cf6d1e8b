"""What a run that was cut off may be continued with, also where the disk was full."""

import os
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import pardec.run
from pardec.training.running.checkpoints import (
    add_to_state,
    check_same,
    load_state,
    read_progress,
    save_state,
    steps_done_before,
)


def test_a_run_goes_on_with_the_values_that_it_was_saved_with(tmp_path):
    check_same(tmp_path, {"num_processes": 2})  # a run that begins
    save_state(tmp_path / "checkpoints", 3, {"w": torch.zeros(1)}, [], {"num_processes": 2, "data_sha256": "a" * 64})
    check_same(tmp_path, {"num_processes": 2, "data_sha256": "a" * 64})
    with pytest.raises(
        ValueError, match=r"expected the number of processes that it was begun with, 2, found 1; choose"
    ):
        check_same(tmp_path, {"num_processes": 1, "data_sha256": "b" * 64})
    with pytest.raises(ValueError, match=r"expected the data \(sha256\) that it was begun with, a{16}, found b{16}; "):
        check_same(tmp_path, {"num_processes": 2, "data_sha256": "b" * 64})


def test_a_checkpoint_of_before_such_values_were_kept_goes_on(tmp_path):
    save_state(tmp_path / "checkpoints", 3, {"w": torch.zeros(1)}, [], {"best": 1.0})
    check_same(tmp_path, {"num_processes": 2, "data_sha256": "a" * 64})


def test_keys_that_recipes_did_not_have_then_are_at_their_defaults(tmp_path):
    then = {"base": "b", "data": {"path": "x"}}
    save_state(tmp_path / "checkpoints", 3, {"w": torch.zeros(1)}, [], {"recipe": then})
    defaults = {"base": "", "data": {"path": "", "streamed": False}, "train": {"shape": {"is_round": True}}}

    def steps(streamed: bool, is_round: bool) -> int:
        now = {**then, "data": {"path": "x", "streamed": streamed}, "train": {"shape": {"is_round": is_round}}}
        return steps_done_before(tmp_path, now, "result", "a result", defaults)

    assert steps(streamed=False, is_round=True) == 3
    with pytest.raises(
        ValueError, match=r"expected data\.streamed = True as in this recipe .*, found a run with False;"
    ):
        steps(streamed=True, is_round=True)
    with pytest.raises(ValueError, match=r"expected train\.shape\.is_round = False as in this recipe"):
        steps(streamed=False, is_round=False)


def test_the_newest_states_are_kept_and_what_a_killed_save_left_goes(tmp_path):
    (tmp_path / ".writing-of-the-dead").mkdir()
    for step in range(5):
        save_state(tmp_path, step, *trained(step), {"recipe": {}}, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-00000000{step}" for step in (2, 3, 4)]
    again, optimizers = trained(9)
    assert load_state(tmp_path, again, optimizers) == {"step": 4, "recipe": {}}


def test_a_state_is_on_the_disk_before_it_is_one_and_before_an_older_one_goes(tmp_path, synced, monkeypatch):
    save_state(tmp_path, 1, *trained(1), {"recipe": {}})
    replace, moments = os.replace, []

    def replaces(source, target):
        inside = [source, *source.iterdir()]
        moments.append(
            (source.name, {path.stat().st_ino for path in inside} <= synced, tmp_path.stat().st_ino in synced)
        )
        synced.discard(tmp_path.stat().st_ino)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replaces)
    save_state(tmp_path, 2, *trained(2), {"recipe": {}})
    # the folder was asked about the state of before, and now about the name of the new one
    assert moments == [("step-000000002", True, True), ("step-000000001", True, True)]


def test_a_state_of_before_global_batches_tells_its_own(tmp_path):
    recipe = {"train": {"batch_size": 3, "gradient_accumulation_steps": 2}}
    save_state(tmp_path / "checkpoints", 3, {"w": torch.zeros(1)}, [], {"recipe": recipe, "num_processes": 4})
    check_same(tmp_path, {"global_batch": 24})
    with pytest.raises(
        ValueError, match=r"expected the global batch \(.* that it was begun with, 24, found 12; choose"
    ):
        check_same(tmp_path, {"global_batch": 12})


def trained(seed):
    """Parameters and their optimiser behind a step."""
    parameter = torch.nn.Parameter(torch.full((3,), float(seed)))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    return {"w": parameter}, [optimizer]


@pytest.mark.parametrize("full_at", [0, 1])
def test_a_full_disk_leaves_the_state_before(tmp_path, monkeypatch, full_at):
    parameters, optimizers = trained(1)
    save_state(tmp_path, 1, parameters, optimizers, {"recipe": {}})
    expected = parameters["w"].detach().clone()
    written = []

    def save_on_a_full_disk(tensors, path, metadata):
        written.append(path)
        if len(written) > full_at:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(pardec.run, "save_file", save_on_a_full_disk)
    with pytest.raises(OSError, match=r"safetensors: expected room for \d+ bytes, found .*No space left"):
        save_state(tmp_path, 2, *trained(2), {"recipe": {}})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    again, optimizers = trained(3)
    progress = load_state(tmp_path, again, optimizers)
    assert progress == {"step": 1, "recipe": {}}
    assert torch.equal(again["w"], expected)


@pytest.mark.parametrize("text", ["[]", "{}", '{"step": "3"}', '{"step": 3, "recipe": []}', "null", "{"])
def test_a_state_that_tells_no_step_and_recipe_is_named(tmp_path, text):
    save_state(tmp_path / "checkpoints", 3, *trained(1), {"recipe": {}})
    (tmp_path / "checkpoints/step-000000003/state.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"state\.json: expected (JSON|step and recipe of a run), found .*; no older"
    ) as caught:
        steps_done_before(tmp_path, {}, "result", "a result")
    assert str(caught.value).endswith("choose another output_dir")


@pytest.mark.parametrize("file", ["state.json", "parameters.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_a_newest_state_that_is_damaged_is_removed_as_its_error_says_to_go_on_from_the_one_before(
    tmp_path, file, damage
):
    for step in (1, 2):
        save_state(tmp_path, step, *trained(step), {"recipe": {}}, keep=2)
    newest = tmp_path / "step-000000002"
    if damage == "removed":
        (newest / file).unlink()
    else:
        (newest / file).write_bytes((newest / file).read_bytes()[:5])
    found = "found no such file" if damage == "removed" else "found "
    advice = f"; remove {newest} to go on from step-000000001"
    with pytest.raises(ValueError, match=rf"{file}: expected (JSON|safetensors), {found}.*{advice}$"):
        load_state(tmp_path, *trained(1))
    shutil.rmtree(newest)
    parameters, optimizers = trained(0)
    assert load_state(tmp_path, parameters, optimizers) == {"step": 1, "recipe": {}}


def test_values_of_the_newest_state_change_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    for step in (1, 2):
        save_state(tmp_path, step, *trained(step), {"best": 1.0, "recipe": {}}, keep=2)
    add_to_state(tmp_path, {"best": 2.0, "measured": 2})
    assert read_progress(tmp_path) == {"step": 2, "best": 2.0, "measured": 2, "recipe": {}}
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no"):
        add_to_state(tmp_path, {"best": 3.0})
    assert read_progress(tmp_path)["best"] == 2.0
    assert sorted(path.name for path in (tmp_path / "step-000000002").iterdir()) == [
        "optimizer.safetensors",
        "parameters.safetensors",
        "state.json",
    ]


def failing(*arguments: object) -> None:
    raise OSError("no")
