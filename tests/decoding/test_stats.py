"""Figures from hand-made counts, and repetition against a brute-force reading of its definition."""

import json
import random

import pytest

from pardec.decoding.stats import (
    SequenceCounts,
    acceptance_everywhere,
    acceptance_outside_repetition,
    inside_repetition,
    pool,
    share_with_copies,
)

# two sequences of a fused decoder with K = 3; the first round of the second one has no draft
FIRST = SequenceCounts(accepted=[3, 0, 2], drafted=[3, 3, 2], num_new_tokens=8)
SECOND = SequenceCounts(accepted=[0, 1], drafted=[0, 3], num_new_tokens=4)


def test_figures_are_sums_over_sums():
    stats = pool([FIRST, SECOND], seconds=2.0)
    assert stats.num_new_tokens == 12
    assert stats.num_steps == 5
    assert stats.num_forwards == 5 + 2  # a prefill each
    assert stats.num_drafts == 4
    assert stats.num_draft_tokens == 11
    assert stats.num_accepted_tokens == 6
    assert stats.mean_acceptance_length == 1 + 6 / 4
    assert stats.draft_acceptance_rate == 6 / 11
    assert stats.tokens_per_forward == (6 + 5) / 5  # before cuts: accepted and bonus tokens of five forwards
    assert stats.tokens_per_step == (8 - 1 + 4 - 1) / 5  # after cuts; prefill has emitted one token of each sequence
    assert stats.seconds == 2.0
    assert stats.tokens_per_second == 6.0


def test_copies_count_apart_and_in_what_a_step_emits():
    counts = SequenceCounts([3, 0, 2, 0], [3, 3, 2, 0], 15, accepted_copies=[4, 0, 1, 0], copied=[5, 5, 6, 0])
    stats = pool([counts], seconds=1.0)
    assert (stats.num_draft_tokens, stats.num_accepted_tokens) == (8, 5)
    assert (stats.num_copied_tokens, stats.num_accepted_copies) == (16, 5)
    assert stats.draft_acceptance_rate == 5 / 8
    assert stats.num_drafts == 3
    assert stats.mean_acceptance_length == 1 + 10 / 3
    assert stats.tokens_per_forward == (10 + 4) / 4
    assert stats.acceptance_rate_per_position["unconditional"] == [2 / 3, 2 / 3, 1 / 3]  # of drafts alone
    assert counts.accepted_in_all == [7, 0, 3, 0]
    alone = pool([SequenceCounts([0, 0], [0, 0], 7, accepted_copies=[4, 0], copied=[8, 8])], seconds=1.0)
    assert (alone.num_drafts, alone.mean_acceptance_length) == (2, 3.0)
    assert alone.acceptance_rate_per_position["conditional"] == []


def test_a_batch_has_rows_of_copies_in_the_steps_in_which_any_sequence_has_some():
    counts = [SequenceCounts([0] * 4, [0] * 4, 5, copied=[0, 8, 0, 0]), SequenceCounts([0], [0], 3, copied=[8])]
    assert share_with_copies(counts) == 0.5
    assert share_with_copies([FIRST]) == 0


def test_rates_per_position_by_hand():
    rates = pool([FIRST, SECOND], seconds=1.0).acceptance_rate_per_position
    # drafts (accepted of drafted): 3 of 3, 0 of 3, 2 of 2, 1 of 3
    assert rates["unconditional"] == [3 / 4, 2 / 4, 1 / 4]
    # the second token was reached by three drafts; the third by 3 of 3 alone, for 2 of 2 had none
    assert rates["conditional"] == [3 / 4, 2 / 3, 1 / 1]


def test_rates_per_position_agree_with_counting_tokens():
    source = random.Random(0)
    counts = []
    for _ in range(5):
        drafted = [source.randint(0, 4) for _ in range(30)]
        counts.append(SequenceCounts([source.randint(0, d) for d in drafted], drafted, 1))
    rates = pool(counts, seconds=1.0).acceptance_rate_per_position
    for j in range(1, 5):
        drafts = accepted = reached = 0
        for one in counts:
            for a, d in zip(one.accepted, one.drafted, strict=True):
                if d == 0:
                    continue
                tokens = [True] * a + [False] * (d - a)  # whether each drafted token was accepted
                drafts += 1
                accepted += j <= d and tokens[j - 1]
                reached += j <= d and all(tokens[: j - 1])
        assert rates["unconditional"][j - 1] == accepted / drafts
        assert rates["conditional"][j - 1] == accepted / reached


def test_each_sequence_is_kept_beside_the_pool():
    stats = pool([FIRST, SECOND], seconds=2.0)
    assert [one.mean_acceptance_length for one in stats.sequences] == [1 + 5 / 3, 1 + 1 / 1]
    assert [one.accepted_per_step for one in stats.sequences] == [[3, 0, 2], [0, 1]]
    assert [one.num_forwards for one in stats.sequences] == [4, 3]
    assert [one.tokens_per_second for one in stats.sequences] == [4.0, 2.0]
    assert not any(one.sequences for one in stats.sequences)
    # sums over sums, which here differs from the mean of means
    assert stats.mean_acceptance_length != sum(one.mean_acceptance_length for one in stats.sequences) / 2


def test_two_forwards_and_two_exact_tokens_per_round():
    stats = pool([SequenceCounts([2, 0], [3, 3], 6, forwards_per_step=2)], seconds=1.0)
    assert stats.num_steps == 2
    assert stats.num_forwards == 2 * 2 + 1
    assert stats.mean_acceptance_length == 1 + 2 / 2
    assert stats.tokens_per_forward == (2 + 2 * 2) / 4


def test_drafts_behind_a_cut_count_for_the_acceptance_length_and_not_for_the_tokens_per_step():
    stats = pool([SequenceCounts([8], [8], num_new_tokens=6)], seconds=1.0)
    assert (stats.mean_acceptance_length, stats.tokens_per_forward, stats.tokens_per_step) == (9.0, 9.0, 5.0)


def test_modes_can_be_pooled_together():
    stats = pool([FIRST, SequenceCounts([2, 0], [3, 3], 6, forwards_per_step=2)], seconds=1.0)
    assert stats.num_forwards == (3 + 1) + (4 + 1)
    assert stats.tokens_per_forward == ((5 + 3) + (2 + 4)) / (3 + 4)


def test_plain_decoding_accepts_nothing_and_drafts_nothing():
    stats = pool([SequenceCounts([0] * 7, [0] * 7, 8)], seconds=4.0)
    assert stats.num_drafts == 0
    assert stats.mean_acceptance_length == 1
    assert stats.draft_acceptance_rate == 0
    assert stats.tokens_per_forward == 1
    assert stats.acceptance_rate_per_position == {"unconditional": [], "conditional": []}


def test_a_sequence_that_ends_with_prefill_has_no_rates():
    stats = pool([SequenceCounts([], [], 1)], seconds=0.0)
    assert (stats.num_steps, stats.num_forwards, stats.num_new_tokens) == (0, 1, 1)
    assert (stats.mean_acceptance_length, stats.tokens_per_forward, stats.tokens_per_second) == (1, 0, 0)
    assert stats.tokens_per_step == 0


def test_stats_become_json():
    plain = json.loads(json.dumps(pool([FIRST, SECOND], seconds=2.0).to_dict()))
    assert plain["mean_acceptance_length"] == 2.5
    assert plain["sequences"][1]["num_drafts"] == 1
    assert plain["sequences"][0]["accepted_per_step"] == [3, 0, 2]


def brute_force_inside(tokens, max_period, min_span):
    """Every span [i, j) whose tokens all equal those p earlier, at least min_span and 2 p long."""
    inside = [False] * len(tokens)
    for p in range(1, max_period + 1):
        for i in range(p, len(tokens)):
            for j in range(i + max(min_span, 2 * p), len(tokens) + 1):
                if all(tokens[k] == tokens[k - p] for k in range(i, j)):
                    inside[i:j] = [True] * (j - i)
    return inside


@pytest.mark.parametrize(("max_period", "min_span"), [(32, 8), (3, 4), (6, 2), (1, 1)])
def test_repetition_is_what_its_definition_says(max_period, min_span):
    source = random.Random(max_period)
    seen = set()
    for _ in range(60):
        tokens = [source.randint(0, 2) for _ in range(source.randint(0, 25))]
        unit = [source.randint(0, 2) for _ in range(source.randint(1, 5))]
        tokens += unit * source.randint(0, 6) + [source.randint(0, 2) for _ in range(source.randint(0, 10))]
        inside = inside_repetition(tokens, max_period, min_span)
        assert inside == brute_force_inside(tokens, max_period, min_span)
        seen |= set(inside)
    assert seen == {False, True}


def test_the_defaults_are_spans_of_8_at_periods_up_to_32():
    once, long_unit = list(range(100, 132)), list(range(200, 233))
    assert inside_repetition(once * 3) == [False] * 32 + [True] * 64  # 2 p = 64 tokens equal those 32 earlier
    assert not any(inside_repetition(once * 2))  # only 32 of them
    assert not any(inside_repetition(long_unit * 4))  # period 33
    assert inside_repetition([1] * 9) == [False] + [True] * 8
    assert not any(inside_repetition([1] * 8))  # only 7 tokens equal their predecessor


def test_repetition_of_nothing_is_nothing():
    assert inside_repetition([]) == []


def test_rounds_without_a_draft_are_no_drafts():
    assert acceptance_everywhere(FIRST) == (5, 3)
    assert acceptance_everywhere(SECOND) == (1, 1)
    assert acceptance_everywhere(SequenceCounts([], [], 1)) == (0, 0)


def test_rounds_inside_repetition_are_left_out():
    """The output varies, then loops on one token; rounds count by their first verified token."""
    output = [10, 11, 12, 13, 14] + [7] * 12 + [15, 16, 17]
    # index: 0 is prefill's; rounds verify from 1, 3, 4, 6, 11, 16, 17, 18
    counts = SequenceCounts(accepted=[1, 0, 1, 4, 4, 0, 0, 1], drafted=[4, 4, 4, 4, 4, 4, 0, 4], num_new_tokens=20)
    inside = inside_repetition(output)
    assert [i for i, flag in enumerate(inside) if flag] == list(range(6, 17))
    # outside: the rounds at 1, 3, 4 and 18; the one at 17 drafted nothing
    assert acceptance_outside_repetition([1, 2, 3], output, counts) == (1 + 0 + 1 + 1, 4)


def test_repetition_may_begin_in_the_prompt():
    prompt, output = [7] * 9, [7, 7, 7, 8]
    counts = SequenceCounts(accepted=[1, 0], drafted=[2, 2], num_new_tokens=4)  # rounds verify from 1 and from 3
    assert acceptance_outside_repetition(prompt, output, counts) == (0, 1)
    assert acceptance_outside_repetition([1, 2, 3], output, counts) == (1, 2)


def test_in_two_pass_mode_the_exact_token_stands_before_the_drafts():
    """Rounds emit an exact token, accepted drafts and a bonus token: drafts begin at 2, then 2 + a + 2."""
    prompt, output = [7] * 9, [7, 7, 8, 9, 10, 11, 12, 13]
    counts = SequenceCounts([2, 0], [2, 2], 8, forwards_per_step=2)
    assert acceptance_outside_repetition(prompt, output, counts) == (2, 2)
    one_token_longer_loop = [7, 7, 7, 9, 10, 11, 12, 13]
    assert acceptance_outside_repetition(prompt, one_token_longer_loop, counts) == (0, 1)


def test_rounds_that_were_cut_off_count_by_the_last_token():
    prompt, output = [1, 2, 3], [4, 5]
    counts = SequenceCounts(accepted=[0, 2], drafted=[3, 3], num_new_tokens=2)
    assert acceptance_outside_repetition(prompt, output, counts) == (2, 2)
