"""Weights are compared with what they were, in whatever way they are written to, also by a recorded comparison."""

import warnings

import pytest
import torch
from recorded_steps import rerun, tape
from torch import nn

from pardec.decoding.weight_watch import WeightWatch


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def layers(request) -> list[nn.Linear]:
    torch.manual_seed(0)
    sizes = [(8, 6), (6, 8), (24, 3), (5, 7)]  # rows of whole words and of halves
    return [nn.Linear(n, m, dtype=request.param).requires_grad_(False) for n, m in sizes]


def weights_of(layers: list[nn.Linear]) -> list[torch.Tensor]:
    return [one for layer in layers for one in (layer.weight, layer.bias)]


@pytest.mark.parametrize("recorder", [None, rerun, tape])
def test_every_way_to_write_is_noticed_and_its_undoing(layers, recorder):
    watch = WeightWatch(weights_of(layers), recorder)
    assert watch.holds(weights_of(layers))
    assert watch.holds(weights_of(layers))
    with torch.no_grad():
        for one in weights_of(layers):
            kept = one.clone()
            for write in (lambda one=one: one.neg_(), lambda one=one: one.data.view(-1)[-1:].add_(0.5)):
                write()
                assert not watch.holds(weights_of(layers))
                one.data.copy_(kept)
                assert watch.holds(weights_of(layers))
        first = layers[0].weight
        first[[0, 1]] = first[[1, 0]]
        assert not watch.holds(weights_of(layers))


@pytest.mark.parametrize("recorder", [None, rerun, tape])
def test_weights_that_lie_elsewhere_are_read_there(layers, recorder):
    watch = WeightWatch(weights_of(layers), recorder)
    assert watch.holds(weights_of(layers))
    for layer in layers:
        layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
        assert watch.holds(weights_of(layers))
    layers[1].weight = nn.Parameter(-layers[1].weight, requires_grad=False)
    assert not watch.holds(weights_of(layers))
    assert not watch.holds(weights_of(layers[:-1]))
    layers[1].weight = nn.Parameter(layers[1].weight.t().contiguous(), requires_grad=False)
    assert not watch.holds(weights_of(layers))
    watch = WeightWatch(weights_of(layers), recorder)
    layers[1].weight = nn.Parameter(layers[1].weight.double(), requires_grad=False)
    assert not watch.holds(weights_of(layers))


def test_a_comparison_is_recorded_once(layers):
    recorded = []

    def counting(run, generator, site):
        recorded.append(run)
        return run

    watch = WeightWatch(weights_of(layers), counting)
    for _ in range(3):
        assert watch.holds(weights_of(layers))
    layers[0].weight.data.neg_()
    assert not watch.holds(weights_of(layers))
    assert len(recorded) == 1
    layers[0].weight = nn.Parameter(layers[0].weight.clone(), requires_grad=False)
    assert not watch.holds(weights_of(layers))
    assert len(recorded) == 2


def test_what_cannot_be_recorded_is_compared_all_the_same_after_one_warning(layers):
    def refusing(run, generator, site):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    watch = WeightWatch(weights_of(layers), refusing)
    with pytest.warns(
        UserWarning, match=r"cannot be captured as a CUDA graph \(operation not permitted\); calls begin"
    ):
        assert watch.holds(weights_of(layers))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert watch.holds(weights_of(layers))
        layers[2].weight.data.neg_()
        assert not watch.holds(weights_of(layers))


def test_memory_that_runs_out_while_recording_is_asked_for_again_next_time(layers):
    tries = []

    def full(run, generator, site):
        tries.append(run)
        if len(tries) < 3:
            raise torch.OutOfMemoryError
        return run

    watch = WeightWatch(weights_of(layers), full)
    for _ in range(4):
        assert watch.holds(weights_of(layers))
    assert len(tries) == 3


def test_an_error_of_a_device_that_has_broken_down_is_not_hidden(layers):
    class BrokenError(RuntimeError):
        error_code = 700  # cudaErrorIllegalAddress

    def broken(run, generator, site):
        raise BrokenError

    with pytest.raises(BrokenError):
        WeightWatch(weights_of(layers), broken).holds(weights_of(layers))
