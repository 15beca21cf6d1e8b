"""The order of measuring and what is concluded from it, on a machine whose cost and acceptance are known."""

import itertools
import random

import pytest

from pardec.layout import PLAIN
from pardec.tuning.chain import best_shapes, conditional_acceptance, expected_tokens_per_step, num_rows
from pardec.tuning.measuring import QUICK, Call, Effort, max_calls, measure

LAW = [0.75, 0.5, 0.3]
PREFILL_SECONDS, PLAIN_SECONDS = 0.020, 0.010
EFFORT = Effort(num_shapes=5, num_batches=2, num_finalists=3, repetitions=2)


class Machine:
    """Decodes by drawing acceptances from `LAW`; its clock is a formula."""

    def __init__(self, seconds_per_row: float, batch_size: int = 1, speeds=None):
        self.seconds_per_row = seconds_per_row
        self.batch_size = batch_size
        self.speeds = speeds or itertools.repeat(1.0)
        self.calls: list[tuple[tuple[int, ...], int, int]] = []

    def step_seconds(self, shape) -> float:
        return PLAIN_SECONDS if shape == PLAIN else 0.011 + self.seconds_per_row * num_rows(shape)

    def decode(self, shape, batch, max_new_tokens) -> Call:
        self.calls.append((shape, batch, max_new_tokens))
        accepted = []
        for row in range(self.batch_size):
            draw, run, tokens, length = random.Random(100 * batch + row), [], 1, len(shape) - 1
            while tokens < max_new_tokens:
                count = 0
                while count < length and draw.random() < LAW[count]:
                    count += 1
                run.append(count)
                tokens += 1 + count
                length = shape[count]
            accepted.append(run)
        seconds = (PREFILL_SECONDS + max(map(len, accepted)) * self.step_seconds(shape)) / next(self.speeds)
        return Call(seconds, [max_new_tokens] * self.batch_size, accepted)


def best_by_hand(machine, max_new_tokens) -> tuple[int, ...]:
    """The shape of the least time per sequence among the best of every number of rows."""
    shapes = [PLAIN, *(shape for k in (1, 2, 3) for shape in best_shapes(LAW[:k]).values())]

    def seconds_per_sequence(shape):
        tokens = 1.0 if shape == PLAIN else expected_tokens_per_step(LAW[: len(shape) - 1], shape)
        return PREFILL_SECONDS + (max_new_tokens - 1) / tokens * machine.step_seconds(shape)

    return min(shapes, key=seconds_per_sequence)


@pytest.mark.parametrize("seconds_per_row", [0.0, 0.0003, 0.0008])
def test_the_choice_is_the_best_shape_of_a_known_machine(seconds_per_row):
    machine = Machine(seconds_per_row)
    found = measure(machine.decode, 40, 3, 128, EFFORT, 1)
    best = best_by_hand(machine, 128)
    shapes = [one.candidate.block_lengths for one in found.measured]
    assert len(found.chosen.candidate.block_lengths) == len(best)
    assert abs(num_rows(found.chosen.candidate.block_lengths) - num_rows(best)) <= 1
    assert {PLAIN, (3, 3, 3, 3)} < set(shapes)
    assert found.conditional_acceptance == pytest.approx(LAW, abs=0.04)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_prediction_and_measurement_agree(batch_size):
    machine = Machine(0.0004, batch_size)
    found = measure(machine.decode, 24, 3, 128, EFFORT, 1)
    for one in found.measured:
        assert one.tokens_per_second == pytest.approx(one.candidate.tokens_per_second, rel=0.04)
        assert one.ms_per_step == pytest.approx(1000 * machine.step_seconds(one.candidate.block_lengths), rel=0.01)
        assert one.ms_per_step == pytest.approx(one.candidate.ms_per_step, rel=0.03)
    assert found.costs.plain == pytest.approx(1000 * PLAIN_SECONDS)
    assert found.costs.prefill == pytest.approx(1000 * PREFILL_SECONDS)
    assert found.drift == pytest.approx(1)


def test_where_rows_are_dear_plain_decoding_is_chosen():
    found = measure(Machine(0.02).decode, 8, 3, 64, EFFORT, 1)
    assert found.chosen.candidate.block_lengths == PLAIN
    assert found.chosen == found.plain


def test_a_machine_that_becomes_slower_meanwhile_does_not_spoil_predictions():
    num_batches, count = 12, itertools.count()
    cost_calls = num_batches + (EFFORT.num_shapes + 1) * (1 + 2 * 2 * EFFORT.repetitions)
    speeds = (1.0 if next(count) < cost_calls else 0.6 for _ in itertools.count())
    found = measure(Machine(0.0004, speeds=speeds).decode, num_batches, 3, 128, EFFORT, 1)
    assert found.drift == pytest.approx(0.6, rel=0.02)
    for one in found.measured:
        assert one.tokens_per_second == pytest.approx(one.candidate.tokens_per_second, rel=0.06)


@pytest.mark.parametrize("effort", [EFFORT, QUICK, Effort()])
@pytest.mark.parametrize(("num_batches", "warm_up"), [(1, 1), (2, 2), (6, 6), (6, 1)])
def test_every_shape_takes_its_turn_on_every_batch(effort, num_batches, warm_up):
    machine = Machine(0.0004)
    found = measure(machine.decode, num_batches, 3, 32, effort, warm_up)
    assert len(machine.calls) <= max_calls(effort, num_batches, warm_up)
    shapes = {one.candidate.block_lengths for one in found.measured}
    last = machine.calls[-len(shapes) * num_batches * effort.repetitions :]
    expected = sorted((shape, batch, 32) for shape in shapes for batch in range(num_batches))
    assert sorted(last) == sorted(expected * effort.repetitions)
    # one after the other on the same batch
    assert {shape for shape, _, _ in last[: len(shapes)]} == shapes


def test_prompts_that_end_at_once_are_refused():
    def decode(shape, batch, max_new_tokens):
        return Call(0.01, [1], [[]])

    with pytest.raises(ValueError, match="expected some that the model continues by more than one token, found none"):
        measure(decode, 2, 2, 16, EFFORT, 1)


def test_acceptance_comes_from_the_full_chain():
    machine = Machine(0.0004)
    measure(machine.decode, 3, 3, 64, EFFORT, 1)
    assert machine.calls[:3] == [((3, 3, 3, 3), batch, 64) for batch in range(3)]
    assert conditional_acceptance([], 2).tolist() == [[0, 0]] * 3
