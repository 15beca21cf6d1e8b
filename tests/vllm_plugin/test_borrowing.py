"""A hollow model holds its own modules alone; filled with the target's, it holds no weights but the target's."""

import pytest
import torch
from torch import nn

from pardec.vllm_plugin.borrowing import Borrowed, borrow, hollow
from pardec.vllm_plugin.gated_linear import GatedLinear


class Cache(nn.Module):
    """Stands for attention, whose keys and values are the draft's own."""


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.Module()
        self.attention.projection, self.attention.cache = nn.Linear(4, 4), Cache()
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.scale = nn.Parameter(torch.randn(4))
        self.register_buffer("normalizer", torch.tensor(2.0), persistent=False)


def is_cache(module):
    return isinstance(module, Cache)


def test_a_hollow_model_has_its_own_modules_and_those_to_be_wrapped_on_the_way():
    model = Model()
    hollow(model, stays=is_cache, within=["layers.0.mlp.0"])
    assert isinstance(model.embedding, Borrowed)
    assert isinstance(model.layers[0].attention.projection, Borrowed)
    assert isinstance(model.layers[0].attention.cache, Cache)
    assert [type(part) for part in model.layers[0].mlp] == [Borrowed] * 3  # one by one
    assert isinstance(model.layers[1].mlp, Borrowed)  # as a whole
    with pytest.raises(RuntimeError, match="pardec: expected the target's layers in the draft before it runs"):
        model.embedding(torch.tensor([1]))


def test_a_filled_model_runs_the_targets_layers_and_holds_none_of_its_own():
    with torch.device("meta"):
        model = Model()
    target = Model()
    hollow(model, stays=is_cache, within=["layers.0.mlp.0"])
    own, gate = model.layers[0].attention.cache, torch.ones(3, 1)
    model.layers[0].mlp[0] = GatedLinear(Borrowed(), torch.zeros(4, 1), torch.zeros(1, 8), gate)
    borrow(model, target, stays=is_cache)
    assert {id(one) for one in model.parameters()} == {id(one) for one in target.parameters()}
    assert model.embedding is target.embedding
    assert model.normalizer is target.normalizer
    assert model.layers[0].mlp[0].base is target.layers[0].mlp[0]
    assert isinstance(target.layers[0].mlp[0], nn.Linear)  # the target's own stay as they were
    assert model.layers[1].mlp is target.layers[1].mlp
    assert model.layers[0].attention.cache is own
    assert target.layers[0].attention.cache is not own
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_a_target_of_another_structure_is_told():
    model, target = Model(), Model()
    hollow(model, stays=is_cache, within=[])
    del target.layers[1].mlp
    with pytest.raises(
        ValueError, match="pardec: expected a target with mlp in its Layer, as the draft's Layer has, f"
    ):
        borrow(model, target, stays=is_cache)
