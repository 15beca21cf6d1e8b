"""The Markov chain over draft lengths: against simulation, hand computation and brute force."""

import itertools
import random

import numpy as np
import pytest

from pardec.tuning import chain
from pardec.tuning.chain import (
    best_shapes,
    check_block_lengths,
    conditional_acceptance,
    expected_rounds,
    expected_steps,
    expected_tokens_per_step,
    num_rows,
)


def rows_of(conditional, K):
    """A law of its own for each number of drafts that were accepted before."""
    one_law = not isinstance(conditional[0], list)
    return [conditional[:K]] * (K + 1) if one_law else conditional


def simulate(conditional, block_lengths, *, num_steps=None, num_tokens=None, seed=0):
    """Accepted drafts of each step, until so many steps or so many tokens after that of prefill."""
    draw, K = random.Random(seed), len(block_lengths) - 1
    laws = rows_of(conditional, K)
    length, before, run, tokens = K, K, [], 0
    while len(run) < num_steps if num_steps else tokens < num_tokens:
        accepted = 0
        while accepted < length and draw.random() < laws[before][accepted]:
            accepted += 1
        run.append(accepted)
        tokens += 1 + accepted
        length, before = block_lengths[accepted], accepted
    return run


def long_run_by_draft_length(conditional, block_lengths, num_steps=3000):
    """Tokens per step by following the law of the draft length, in which the chain is usually written."""
    K = len(block_lengths) - 1
    now, tokens = {K: 1.0}, 0.0
    for _ in range(num_steps):
        after = dict.fromkeys(range(K + 1), 0.0)
        for length, share in now.items():
            reached = 1.0
            for accepted in range(length + 1):
                end = 1.0 if accepted == length else 1 - conditional[accepted]
                chance = share * reached * end
                tokens += chance * (1 + accepted)
                after[block_lengths[accepted]] += chance
                reached *= conditional[accepted] if accepted < length else 0.0
        now = after
    return tokens / num_steps


def random_law(K, seed):
    draw = random.Random(seed)
    return [[draw.uniform(0.1, 0.9) for _ in range(K)] for _ in range(K + 1)]


def test_hand_computed_chains():
    # one draft, none after an accepted one: of 1 + p steps, p verify nothing
    assert expected_tokens_per_step([0.5], (1, 0)) == pytest.approx(1 + 0.5 / 1.5)
    assert expected_tokens_per_step([0.5, 0.4, 0.3], (3, 3, 3, 3)) == pytest.approx(1 + 0.5 + 0.2 + 0.06)
    assert expected_tokens_per_step([0.7], (0,)) == 1.0
    # the second law counts after an accepted draft: with x = share of accepted, x = 0.2 (1 - x) + 0.8 x
    assert expected_tokens_per_step([[0.2], [0.8]], (1, 1)) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("conditional", "block_lengths", "tokens"),
    [
        ([0.9], (0, 1), 1.0),  # absorbed by the first rejection: plain decoding from then on
        ([1.0], (0, 1), 2.0),  # which never comes
        ([1.0], (1, 0), 1.5),  # period 2
        ([0.0, 0.0], (2, 2, 2), 1.0),
        ([1.0, 0.0], (0, 2, 0), 2.0),
    ],
)
def test_chains_that_are_not_ergodic(conditional, block_lengths, tokens):
    assert expected_tokens_per_step(conditional, block_lengths) == pytest.approx(tokens, abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (2, 0, 1), (1, 2, 0), (3, 1, 0, 2), (2, 3, 3, 1), (1, 4, 0, 2, 3)])
@pytest.mark.parametrize("by_count", [False, True])
def test_expected_tokens_agree_with_simulation(shape, by_count):
    K = len(shape) - 1
    law = random_law(K, seed=K) if by_count else random_law(K, seed=K)[0]
    run = simulate(law, shape, num_steps=40_000)
    assert expected_tokens_per_step(law, shape) == pytest.approx(1 + sum(run) / len(run), rel=0.015)


@pytest.mark.parametrize("shape", [(0, 1), (2, 2, 2), (1, 3, 0, 2)])
def test_expected_steps_agree_with_simulation(shape):
    K = len(shape) - 1
    law = random_law(K, seed=7)
    for num_tokens in (1, 2, 5, 31):
        steps = [len(simulate(law, shape, num_tokens=num_tokens, seed=seed)) for seed in range(4000)]
        assert expected_steps(law, shape, 31)[num_tokens] == pytest.approx(sum(steps) / len(steps), rel=0.02)
    assert expected_steps(law, shape, 31)[0] == 0
    assert expected_steps([0.5], (0,), 3).tolist() == [0, 1, 2, 3]


def test_expected_rounds_of_two_pass_agree_with_simulation():
    law, draw = [0.7, 0.4, 0.6], random.Random(0)

    def rounds(num_tokens: int) -> int:
        count = tokens = 0
        while tokens < num_tokens:
            accepted = 0
            while accepted < len(law) and draw.random() < law[accepted]:
                accepted += 1
            count, tokens = count + 1, tokens + 2 + accepted
        return count

    found = expected_rounds(law, 31)
    assert found[:3].tolist() == [0, 1, 1]
    for num_tokens in (3, 5, 12, 31):
        mean = sum(rounds(num_tokens) for _ in range(4000)) / 4000
        assert found[num_tokens] == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize("K", [1, 2, 3])
def test_search_finds_what_brute_force_finds(K):
    conditional = random_law(K, seed=K + 20)[0]
    best: dict[int, float] = {}
    for shape in itertools.product(range(K + 1), repeat=K + 1):
        if max(shape) == K:
            rows = K + 1 + sum(shape)
            best[rows] = max(best.get(rows, 0.0), long_run_by_draft_length(conditional, shape, 400))
    found = best_shapes(conditional)
    assert set(found) == set(best)
    for rows, shape in found.items():
        assert num_rows(shape) == rows
        assert check_block_lengths(shape) == shape
        assert long_run_by_draft_length(conditional, shape, 400) == pytest.approx(best[rows], rel=5e-3)


@pytest.mark.parametrize("K", [3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_the_beam_search_finds_what_the_exhaustive_one_finds(K, seed, monkeypatch):
    laws = random_law(K, seed)
    every = best_shapes(laws)
    monkeypatch.setattr(chain, "EXHAUSTIVE_K", 0)
    pruned = best_shapes(laws)
    assert pruned[(K + 1) ** 2] == (K,) * (K + 1)
    assert set(pruned) == set(every)
    for rows, shape in pruned.items():
        assert num_rows(shape) == rows
        assert expected_tokens_per_step(laws, shape) > 0.99 * expected_tokens_per_step(laws, every[rows])


def test_search_beyond_the_exhaustive_one_beats_random_shapes():
    laws, draw = random_law(6, seed=5), random.Random(0)
    found = best_shapes(laws)
    assert sorted(found) == list(range(13, 50))
    for _ in range(1000):
        shape = [draw.randint(0, 6) for _ in range(7)]
        shape[draw.randrange(7)] = 6
        best = expected_tokens_per_step(laws, found[num_rows(shape)])
        assert expected_tokens_per_step(laws, shape) <= 1.001 * best


def test_acceptance_is_counted_by_position_and_by_what_came_before(monkeypatch):
    monkeypatch.setattr(chain, "_PRIOR_ROUNDS", 1e-12)
    table = conditional_acceptance([[2, 0, 1, 3, 0], [0]], 2)  # pairs 2-0, 0-1, 1-3, 3-0
    assert table[0].tolist() == pytest.approx([1, 0])
    assert table[1].tolist() == pytest.approx([1, 1])
    assert table[2][0] == pytest.approx(0)
    monkeypatch.setattr(chain, "_PRIOR_ROUNDS", 1e12)
    pooled = conditional_acceptance([[2, 0, 1, 3, 0], [0]], 2)
    assert pooled.tolist() == [pytest.approx([2 / 4, 1 / 2])] * 3


def test_acceptance_of_a_long_run_is_its_law():
    law = random_law(3, seed=3)
    run = simulate(law, (3, 3, 3, 3), num_steps=60_000)
    assert conditional_acceptance([run], 3) == pytest.approx(np.array(law), abs=0.03)


def test_no_continuation_gives_no_acceptance():
    assert conditional_acceptance([[], [0]], 2).tolist() == [[0, 0]] * 3


@pytest.mark.parametrize("wrong", [(), (1,), (2, 2), (1, 1, 1), (-1, 1)])
def test_block_lengths_that_cannot_be(wrong):
    with pytest.raises(ValueError, match="expected K \\+ 1 numbers from 0 to K of which K is the largest, found"):
        check_block_lengths(wrong)


def test_chances_that_cannot_be():
    with pytest.raises(ValueError, match="expected probabilities, found"):
        expected_tokens_per_step([1.5], (1, 1))
    with pytest.raises(ValueError, match=r"expected shape \[2\] or \[3, 2\], found \[1\]"):
        expected_tokens_per_step([0.5], (2, 2, 2))
