"""A disk that is full while a run's state is written loses nothing of the state before."""

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import pardec.run
from pardec.training.checkpoints import load_state, save_state


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
