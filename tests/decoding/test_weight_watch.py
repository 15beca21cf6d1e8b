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
    for _ in range(3):
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
    for layer in layers:
        for _ in range(3):
            assert watch.holds(weights_of(layers))
        layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
    layers[1].weight = nn.Parameter(-layers[1].weight, requires_grad=False)
    assert not watch.holds(weights_of(layers))
    assert not watch.holds(weights_of(layers[:-1]))
    layers[1].weight = nn.Parameter(layers[1].weight.t().contiguous(), requires_grad=False)
    assert not watch.holds(weights_of(layers))
    watch = WeightWatch(weights_of(layers), recorder)
    layers[1].weight = nn.Parameter(layers[1].weight.double(), requires_grad=False)
    assert not watch.holds(weights_of(layers))


@pytest.mark.parametrize("recorder", [None, rerun, tape])
def test_the_same_memory_read_in_another_way_holds_other_numbers(recorder):
    weight = torch.randn(8, 8, dtype=torch.bfloat16)
    watch = WeightWatch([weight], recorder)
    for other in (weight.T, torch._neg_view(weight), weight.view(torch.float16)):
        for _ in range(3):
            assert watch.holds([weight])
        for _ in range(3):
            assert not watch.holds([other])


@pytest.mark.parametrize("recorder", [None, rerun, tape])
def test_parts_of_one_buffer_may_begin_anywhere(recorder):
    """As some loaders lay them out; words of several numbers would begin within others."""
    buffer = torch.randn(200)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        parts = buffer.to(dtype)[1:193].view(3, 8, 8).unbind()
        watch = WeightWatch(parts, recorder)
        for _ in range(3):
            assert watch.holds(parts)
        assert watch.holds([part.clone() for part in parts])
        parts[1][-1, -1] += 1
        assert not watch.holds(parts)


def test_weights_without_numbers_have_nothing_to_tell_apart():
    watch = WeightWatch([torch.empty(0, 4), torch.empty(4, 0)])
    assert watch.holds([torch.empty(0, 4), torch.empty(4, 0)])
    assert not watch.holds([torch.empty(0, 4), torch.empty(4, 1)])


def counting(recorded: list):
    """A recorder that keeps what it was given to record."""

    def recorder(run, generator, site):
        recorded.append(run)
        return run

    return recorder


def test_a_comparison_is_recorded_once_for_weights_that_stay(layers):
    recorded = []
    watch = WeightWatch(weights_of(layers), counting(recorded))
    for number in (0, 1, 1, 1):
        assert watch.holds(weights_of(layers))
        assert len(recorded) == number
    layers[0].weight.data.neg_()
    assert not watch.holds(weights_of(layers))
    newer = WeightWatch(weights_of(layers), counting(recorded))
    assert watch.renewed(newer) is watch
    assert watch.holds(weights_of(layers))
    assert len(recorded) == 1
    watch.free()
    for number in (1, 2, 2):
        assert watch.holds(weights_of(layers))
        assert len(recorded) == number


def test_of_weights_that_move_before_each_call_nothing_is_recorded(layers):
    recorded = []
    watch = WeightWatch(weights_of(layers), counting(recorded))
    kept = []
    for _ in range(4):
        kept.append(layers[0].weight)
        layers[0].weight = nn.Parameter(layers[0].weight.clone(), requires_grad=False)
        assert watch.holds(weights_of(layers))
    assert recorded == []


def test_other_weights_are_watched_by_their_own_watch(layers):
    watch = WeightWatch(weights_of(layers))
    newer = WeightWatch(weights_of(layers[1:]))
    assert watch.renewed(newer) is newer
    assert newer.holds(weights_of(layers[1:]))


def test_what_cannot_be_recorded_is_compared_all_the_same_after_one_warning(layers):
    def refusing(run, generator, site):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    watch = WeightWatch(weights_of(layers), refusing)
    assert watch.holds(weights_of(layers))
    with pytest.warns(
        UserWarning, match=r"cannot be captured as a CUDA graph \(operation not permitted\); calls begin"
    ):
        assert watch.holds(weights_of(layers))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert watch.holds(weights_of(layers))
        layers[2].weight.data.neg_()
        assert not watch.holds(weights_of(layers))
        watch = watch.renewed(WeightWatch(weights_of(layers), refusing))
        watch = watch.renewed(WeightWatch(weights_of(layers[1:]), refusing))
        for _ in range(3):
            assert watch.holds(weights_of(layers[1:]))


def test_memory_that_runs_out_while_recording_is_asked_for_again_next_time(layers):
    tries = []

    def full(run, generator, site):
        tries.append(run)
        if len(tries) < 3:
            raise torch.OutOfMemoryError
        return run

    watch = WeightWatch(weights_of(layers), full)
    for _ in range(8):
        assert watch.holds(weights_of(layers))
    assert len(tries) == 3


def test_an_error_of_a_device_that_has_broken_down_is_not_hidden(layers):
    class BrokenError(RuntimeError):
        error_code = 700  # cudaErrorIllegalAddress

    def broken(run, generator, site):
        raise BrokenError

    watch = WeightWatch(weights_of(layers), broken)
    assert watch.holds(weights_of(layers))
    with pytest.raises(BrokenError):
        watch.holds(weights_of(layers))
