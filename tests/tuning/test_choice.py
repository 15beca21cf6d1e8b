"""Cost between measurements, prediction, choice."""

import pytest

from pardec.tuning.choice import (
    PLAIN_WAY,
    Candidate,
    Way,
    Workload,
    choose,
    finalists,
    monotone_cost,
    predict,
    spread_over_rows,
)


def fused(*block_lengths: int, use_head: bool = True) -> Way:
    return Way("fused", block_lengths, use_head)


@pytest.mark.parametrize(
    ("rows", "ms"),
    [(4, 1.0), (6, 1.5), (8, 2.0), (12, 3.0), (16, 3.0), (18, 4.5), (20, 6.0), (2, 1.0), (40, 6.0)],
)
def test_cost_is_linear_between_measurements_and_never_falls(rows, ms):
    # 12 rows measured dearer than 16: both take their mean, 3
    assert monotone_cost({20: 6.0, 4: 1.0, 8: 2.0, 12: 4.0, 16: 2.0}, rows) == pytest.approx(ms)


def test_prediction_of_certain_acceptance_is_counted_by_hand():
    work = Workload(new_tokens=[[31], [16]], prefill_ms=10, plain_prefill_ms=8)
    # 2 prefills, then 10 + 5 steps of 3 tokens each
    drafted = predict(fused(2, 2, 2), [1.0, 1.0], 4.0, work)
    assert drafted.tokens_per_second == pytest.approx(47 / ((2 * 10 + 15 * 4) / 1000))
    # 30 and 15 tokens in rounds of 4
    two_pass = predict(Way("two_pass", (2, 2, 2)), [1.0, 1.0], 5.0, work)
    assert two_pass.tokens_per_second == pytest.approx(47 / ((2 * 8 + (8 + 4) * 5.0) / 1000))
    assert two_pass.tokens_per_step == pytest.approx(4)
    plain = predict(PLAIN_WAY, [], 3.0, work)
    assert plain.tokens_per_second == pytest.approx(47 / ((2 * 8 + 45 * 3) / 1000))
    assert (plain.tokens_per_step, drafted.tokens_per_step) == (1.0, pytest.approx(3))


def test_prediction_of_a_batch_waits_for_its_longest_sequence():
    work = Workload(new_tokens=[[31, 11]], prefill_ms=10, plain_prefill_ms=8, waiting=1.5)
    assert predict(PLAIN_WAY, [], 3.0, work).tokens_per_second == pytest.approx(42 / ((8 + 30 * 3) / 1000))
    mean_steps = (10 + 4) / 2  # the fourth step emits two tokens too many
    assert predict(fused(2, 2, 2), [1.0, 1.0], 4.0, work).tokens_per_second == pytest.approx(
        42 / ((10 + 1.5 * mean_steps * 4) / 1000)
    )


def test_finalists_are_the_best_of_their_k():
    speeds = {(1, 1): 7.0, (1, 0): 9.0, (2, 2, 2): 8.0, (2, 1, 1): 8.5, (3, 3, 3, 3): 5.0}
    candidates = [Candidate(fused(*shape), 1.5, 1.0, speed) for shape, speed in speeds.items()]
    assert [one.way.block_lengths for one in finalists(candidates, 2)] == [(1, 0), (2, 1, 1)]
    assert len(finalists(candidates, 9)) == 3


def test_the_best_of_every_mode_with_and_without_a_head_is_a_finalist():
    speeds = {
        fused(1, 1): 9.0,
        fused(2, 2, 2): 8.0,
        fused(1, 1, use_head=False): 4.0,
        fused(2, 2, 2, use_head=False): 3.0,
        Way("two_pass", (2, 2, 2)): 2.0,
        Way("two_pass", (1, 1)): 1.0,
    }
    found = finalists([Candidate(way, 1.5, 1.0, speed) for way, speed in speeds.items()], 2)
    assert [speeds[one.way] for one in found] == [9.0, 8.0, 4.0, 2.0]


def test_rows_of_two_forwards_count_together():
    assert [way.num_rows for way in (PLAIN_WAY, fused(2, 1, 0), Way("two_pass", (2, 2, 2)))] == [1, 6, 6]


def test_cost_is_measured_from_the_fewest_rows_to_the_most():
    tables = {1: [0.5], 2: [0.5, 0.4]}
    shapes = [(1, 0), (1, 1), (2, 0, 0), (2, 1, 1), (1, 2, 1), (2, 2, 2)]
    found = spread_over_rows(shapes, tables, 3)  # type: ignore[arg-type]
    assert [len(shape) + sum(shape) for shape in found] == [3, 5, 9]
    assert len(spread_over_rows(shapes, tables, 50)) == 5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("measured", "best"),
    [
        ({PLAIN_WAY: 10.0, fused(1, 1): 12.0, fused(2, 2, 2): 11.0}, fused(1, 1)),
        ({PLAIN_WAY: 10.0, fused(1, 1): 12.0, fused(1, 1, use_head=False): 13.0}, fused(1, 1, use_head=False)),
        ({PLAIN_WAY: 10.0, fused(1, 1): 12.0, Way("two_pass", (1, 1)): 13.0}, Way("two_pass", (1, 1))),
        ({fused(1, 1): 9.9, PLAIN_WAY: 10.0, fused(2, 2, 2): 9.0}, PLAIN_WAY),
        ({fused(1, 1): 10.0, PLAIN_WAY: 10.0}, PLAIN_WAY),
        ({PLAIN_WAY: 10.0}, PLAIN_WAY),
    ],
)
def test_the_measured_best_is_chosen_and_nothing_below_plain(measured, best):
    assert choose(measured) == best
