"""What a run that was cut off may be continued with, also where the disk was full."""

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import pardec.run
from pardec.training.checkpoints import check_same, load_state, save_state


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
