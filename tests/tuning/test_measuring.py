"""The order of measuring and what is concluded from it, on a machine whose cost and acceptance are known."""

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest

from pardec.layout import full_blocks
from pardec.tuning.chain import best_shapes, conditional_acceptance, expected_tokens_per_step
from pardec.tuning.choice import PLAIN_WAY, Way, full_chain
from pardec.tuning.measuring import QUICK, Effort, max_calls, measure
from pardec.tuning.timing import Call

LAW = [0.75, 0.5, 0.3]
HEADLESS_LAW = [0.7, 0.4, 0.2]
LIKELY_LAW, LIKELY_HEADLESS_LAW = [0.9, 0.8, 0.7], [0.85, 0.75, 0.6]
PREFILL_SECONDS, PLAIN_SECONDS = 0.020, 0.010
EFFORT = Effort(num_shapes=5, num_batches=2, num_finalists=3, repetitions=2)


class Machine:
    """Decodes by drawing acceptances from a law, without its head from another; its clock is a formula.

    Behind drafts that all stand each copied token stands with probability `copies`; a share `copying` of the steps has
    their rows.
    """

    def __init__(
        self,
        seconds_per_row: float,
        batch_size: int = 1,
        speeds=None,
        head_seconds: float = 0.0,
        laws=(LAW, HEADLESS_LAW),
        copies: float = 0.0,
        copying: float = 1.0,
    ):
        self.laws = dict(zip((True, False), laws, strict=True))
        self.copies = copies
        self.copying = copying
        self.seconds_per_row = seconds_per_row
        self.head_seconds = head_seconds
        self.batch_size = batch_size
        self.speeds = speeds or itertools.repeat(1.0)
        self.calls: list[tuple[Way, int, int]] = []

    def step_seconds(self, way) -> float:
        num_forwards = 2 if way.mode == "two_pass" else 1
        draws_by_head = way.use_head and way.num_speculative_tokens > 0
        rows = num_forwards * 0.011 + self.seconds_per_row * way.num_rows
        seconds = PLAIN_SECONDS if way == PLAIN_WAY else rows + self.head_seconds * draws_by_head
        if way.copy_tokens:
            drafts = way.block_lengths[: way.num_speculative_tokens + 1]
            without = self.step_seconds(Way("fused", drafts, way.use_head) if max(drafts) else PLAIN_WAY)
            seconds = self.copying * seconds + (1 - self.copying) * without
        return seconds

    def decode(self, way, batch, max_new_tokens) -> Call:
        self.calls.append((way, batch, max_new_tokens))
        law, accepted = self.laws[way.use_head], []
        for row in range(self.batch_size):
            draw, run, tokens, length = random.Random(100 * batch + row), [], 1, way.num_speculative_tokens
            while tokens < max_new_tokens:
                count = 0
                while count < length and draw.random() < law[count]:
                    count += 1
                run.append(count)
                if count == length:
                    room = way.copy_tokens and way.copy_tokens + way.num_speculative_tokens - length
                    while count < length + room and draw.random() < self.copies:
                        count += 1
                tokens += 1 + count + (way.mode == "two_pass")
                length = way.block_lengths[count]
            accepted.append(run)
        seconds = (PREFILL_SECONDS + max(map(len, accepted)) * self.step_seconds(way)) / next(self.speeds)
        copying = self.copying if way.copy_tokens else 1.0
        return Call(seconds, [max_new_tokens] * self.batch_size, accepted, copying=copying)


def best_by_hand(machine, max_new_tokens, heads=(True,)) -> Way:
    """The way of the least time per sequence, of fused ones among the best of every number of rows."""
    laws = machine.laws
    ways = [PLAIN_WAY, *(Way("two_pass", full_blocks(k), head) for k in (1, 2, 3) for head in heads)]
    ways += [
        Way("fused", one, head) for head in heads for k in (1, 2, 3) for one in best_shapes(laws[head][:k]).values()
    ]

    def seconds_per_sequence(way):
        K = way.num_speculative_tokens
        tokens = expected_tokens_per_step(laws[way.use_head][:K], way.block_lengths) + (way.mode == "two_pass")
        return PREFILL_SECONDS + (max_new_tokens - 1) / tokens * machine.step_seconds(way)

    return min(ways, key=seconds_per_sequence)


@pytest.mark.parametrize("seconds_per_row", [0.0, 0.0003, 0.0008])
def test_the_choice_is_the_best_shape_of_a_known_machine(seconds_per_row):
    machine = Machine(seconds_per_row)
    found = measure(machine.decode, 40, 3, 128, EFFORT, 1)
    best, chosen = best_by_hand(machine, 128), found.chosen.candidate.way
    assert (chosen.mode, chosen.num_speculative_tokens) == (best.mode, best.num_speculative_tokens)
    assert abs(chosen.num_rows - best.num_rows) <= 1
    assert {PLAIN_WAY, full_chain(3)} < {one.candidate.way for one in found.measured}
    assert found.conditional_acceptance == pytest.approx(LAW, abs=0.04)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_prediction_and_measurement_agree(batch_size):
    machine = Machine(0.0004, batch_size)
    found = measure(machine.decode, 24, 3, 128, EFFORT, 1)
    assert {one.candidate.way.mode for one in found.measured} == {"plain", "fused", "two_pass"}
    for one in found.measured:
        assert one.tokens_per_second == pytest.approx(one.candidate.tokens_per_second, rel=0.04)
        assert one.ms_per_step == pytest.approx(1000 * machine.step_seconds(one.candidate.way), rel=0.01)
        assert one.ms_per_step == pytest.approx(one.candidate.ms_per_step, rel=0.03)
    assert found.costs.plain == pytest.approx(1000 * PLAIN_SECONDS)
    assert found.costs.prefill == pytest.approx(1000 * PREFILL_SECONDS)
    assert found.drift == pytest.approx(1)


def test_where_rows_are_dear_plain_decoding_is_chosen():
    found = measure(Machine(0.02).decode, 8, 3, 64, EFFORT, 1)
    assert found.chosen.candidate.way == PLAIN_WAY
    assert found.chosen == found.plain


def test_a_machine_that_becomes_slower_meanwhile_does_not_spoil_predictions():
    num_batches, count = 12, itertools.count()
    effort = replace(EFFORT, copy_tokens=())
    cost_calls = num_batches + (effort.num_shapes + 1) * (1 + 2 * 2 * effort.repetitions)
    speeds = (1.0 if next(count) < cost_calls else 0.6 for _ in itertools.count())
    found = measure(Machine(0.0004, speeds=speeds).decode, num_batches, 3, 128, effort, 1)
    assert found.drift == pytest.approx(0.6, rel=0.02)
    for one in found.measured:
        assert one.tokens_per_second == pytest.approx(one.candidate.tokens_per_second, rel=0.01)


@pytest.mark.parametrize(
    ("seconds_per_row", "head_seconds", "laws", "best"),
    [
        (0.0003, 0.0, (LAW, HEADLESS_LAW), (True, "fused")),
        (0.0003, 0.02, (LAW, HEADLESS_LAW), (False, "fused")),
        (0.0018, 0.001, (LIKELY_LAW, LIKELY_HEADLESS_LAW), (True, "two_pass")),
        (0.0018, 0.02, (LIKELY_LAW, LIKELY_HEADLESS_LAW), (False, "two_pass")),
    ],
)
def test_a_head_and_two_pass_are_chosen_where_they_pay(seconds_per_row, head_seconds, laws, best):
    machine = Machine(seconds_per_row, head_seconds=head_seconds, laws=laws)
    found = measure(machine.decode, 40, 3, 128, EFFORT, 1, has_head=True)
    expected, chosen = best_by_hand(machine, 128, heads=(True, False)), found.chosen.candidate.way
    assert (expected.use_head, expected.mode) == best
    assert (chosen.use_head, chosen.mode) == best
    assert chosen.num_speculative_tokens == expected.num_speculative_tokens
    kinds = {(one.candidate.way.mode, one.candidate.way.use_head) for one in found.measured}
    assert kinds == {("plain", True), ("fused", True), ("fused", False), ("two_pass", True), ("two_pass", False)}
    for one in found.measured:
        assert one.ms_per_step == pytest.approx(one.candidate.ms_per_step, rel=0.05)
    assert found.conditional_acceptance == pytest.approx(laws[0], abs=0.04)


@pytest.mark.parametrize("copying", [1.0, 0.25])
def test_ways_with_copies_are_predicted_by_the_rows_that_their_steps_had(copying):
    machine = Machine(0.0004, copies=0.6, copying=copying)
    found = measure(machine.decode, 24, 3, 128, EFFORT, 1)
    # beyond the most rows that were timed no step is predicted to take more
    ways = [one for one in found.measured if one.candidate.way.copy_tokens and one.candidate.way.num_rows <= 16]
    assert len({one.candidate.way.num_speculative_tokens > 0 for one in ways}) == 2
    for one in ways:
        assert one.ms_per_step == pytest.approx(1000 * machine.step_seconds(one.candidate.way), rel=0.01)
        assert one.candidate.ms_per_step == pytest.approx(one.ms_per_step, rel=0.01)
        assert one.tokens_per_second == pytest.approx(one.candidate.tokens_per_second, rel=0.01)


@pytest.mark.parametrize(
    ("seconds_per_row", "copies", "laws", "alone", "behind"),
    [
        (0.0, 0.0, (LAW, LAW), None, None),  # nothing that is copied is ever accepted
        (0.0003, 0.75, ([0.97, 0.2, 0.1],) * 2, False, 0),
        (0.0001, 0.95, ([0.05, 0.0, 0.0],) * 2, True, 0),  # drafts are in the way of the copies
        (0.0, 0.7, ([0.98, 0.98, 0.98],) * 2, False, 3),
    ],
)
def test_copies_are_chosen_where_they_pay_alone_or_behind_drafts(seconds_per_row, copies, laws, alone, behind):
    machine = Machine(seconds_per_row, laws=laws, copies=copies)
    found = measure(machine.decode, 30, 3, 128, EFFORT, 1)
    way = found.chosen.candidate.way
    assert (way.copy_tokens > 0) == (alone is not None)
    if alone is not None:
        assert (way.num_speculative_tokens == 0) == alone
        assert way.block_lengths[-1] == behind
        assert len(way.block_lengths) == way.num_speculative_tokens + 1 + way.copy_tokens
    best = {
        (one.candidate.way.copy_tokens > 0, one.candidate.way.num_speculative_tokens == 0) for one in found.measured
    }
    assert best >= {(False, True), (False, False), (True, True), (True, False)}
    for one in found.measured:
        assert one.tokens_per_second == pytest.approx(one.candidate.tokens_per_second, rel=0.05)


@pytest.mark.parametrize("has_head", [False, True])
@pytest.mark.parametrize("effort", [EFFORT, QUICK, Effort()])
@pytest.mark.parametrize(("num_batches", "warm_up"), [(1, 1), (2, 2), (6, 6), (6, 1)])
def test_every_way_takes_its_turn_on_every_batch(effort, num_batches, warm_up, has_head):
    machine = Machine(0.0004)
    found = measure(machine.decode, num_batches, 3, 32, effort, warm_up, has_head)
    assert len(machine.calls) <= max_calls(effort, num_batches, warm_up, has_head)
    ways = {one.candidate.way for one in found.measured}
    last = machine.calls[-len(ways) * num_batches * effort.repetitions :]
    expected = [(way, batch, 32) for way in ways for batch in range(num_batches)]
    assert Counter(last) == Counter(expected * effort.repetitions)
    # one after the other on the same batch
    assert {way for way, _, _ in last[: len(ways)]} == ways


def test_prompts_that_end_at_once_are_refused():
    def decode(way, batch, max_new_tokens):
        return Call(0.01, [1], [[]])

    with pytest.raises(ValueError, match="expected some that the model continues by more than one token, found none"):
        measure(decode, 2, 2, 16, EFFORT, 1)


def test_acceptance_comes_from_the_full_chain():
    machine = Machine(0.0004)
    measure(machine.decode, 3, 3, 64, EFFORT, 1)
    assert machine.calls[:3] == [(full_chain(3), batch, 64) for batch in range(3)]
    assert conditional_acceptance([], 2).tolist() == [[0, 0]] * 3
