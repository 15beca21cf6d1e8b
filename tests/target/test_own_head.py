"""A model in two halves: its output matrix is cast once where many logits are made."""

import pytest
import torch
from tiny_models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from pardec.target.forward import TargetModel
from pardec.target.own_head import OwnHead


class Casts(TorchDispatchMode):
    """Counts copies in another dtype of tensors of a shape."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape, self.number = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.number += func is torch.ops.aten._to_copy.default and found.shape == self.shape
        return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite"])
def test_logits_under_autocast_are_the_same_bits_with_one_cast_of_the_matrix(family):
    model = tiny_model(family, dtype=torch.float32)
    head, table = OwnHead.of(TargetModel.wrap(model)), model.get_input_embeddings().weight
    weight = model.get_output_embeddings().weight
    rows = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        with Casts(weight.shape) as before:
            expected = [head.logits(one) for one in rows]
        with Casts(weight.shape) as once, head.cast_once():
            assert model.get_input_embeddings().weight is table
            found = [head.logits(one) for one in rows]
    assert (before.number, once.number) == (3, 1)
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)
    assert model.get_output_embeddings().weight is weight


def test_without_autocast_and_whatever_happens_the_matrix_stays():
    model = tiny_model("llama", dtype=torch.float32)
    head, weight = OwnHead.of(TargetModel.wrap(model)), model.get_output_embeddings().weight
    with head.cast_once():
        assert model.get_output_embeddings().weight is weight
    with pytest.raises(KeyError), torch.autocast("cpu", torch.bfloat16), head.cast_once():
        raise KeyError(model.get_output_embeddings().weight.dtype)
    assert model.get_output_embeddings().weight is weight
