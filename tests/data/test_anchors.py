"""Draws of marked anchors: how often each comes, and that what they count makes sums those of even draws."""

import numpy as np
import pytest
import torch
from data_samples import masked

from pardec.data.anchors import check_marks, draw_anchors, draw_marked_anchors
from pardec.data.row_checks import DataError
from pardec.data.tokenising import Document

DRAWS = 6000


def drawn(marks, num_anchors, times):
    """Of candidates 0, 1, ..: how often each was drawn and the sum of its weights, per draw, shape [2, C]."""
    generator, candidates, sums = torch.Generator().manual_seed(0), torch.arange(len(marks)), np.zeros((2, len(marks)))
    for _ in range(DRAWS):
        anchors, weights = draw_marked_anchors(candidates, torch.tensor(marks).bool(), num_anchors, times, generator)
        assert len(set(anchors.tolist())) == len(anchors) == len(weights) == min(num_anchors, len(marks))
        sums[0, anchors.numpy()] += 1
        sums[1, anchors.numpy()] += weights.numpy()
    return sums / DRAWS


@pytest.mark.parametrize("times", [0.5, 3.0, 50.0])
@pytest.mark.parametrize("num_anchors", [1, 3, 5])
@pytest.mark.parametrize("marks", [[1, 0, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0, 1]])
def test_sums_of_what_anchors_count_are_on_average_those_of_even_draws(marks, num_anchors, times):
    often, counted = drawn(marks, num_anchors, times)
    even = num_anchors / len(marks)
    largest = max(1, even / often.min())  # weight that there is
    assert counted == pytest.approx(even, abs=5 * np.sqrt(largest * even / DRAWS))
    marked, other = often[np.array(marks) == 1], often[np.array(marks) == 0]
    ratio = marked.mean() / other.mean()
    if marked.max() < 0.95 and other.max() < 0.95:  # while neither kind is used up
        assert ratio == pytest.approx(times, rel=0.25)


def test_all_of_a_kind_are_drawn_where_their_share_is_more():
    often, counted = drawn([1, 1, 0, 0, 0, 0], 4, 1000.0)
    assert often == pytest.approx([1, 1, 0.5, 0.5, 0.5, 0.5], abs=0.04)
    assert counted == pytest.approx(4 / 6, abs=0.05)


@pytest.mark.parametrize("marks", [[0, 0, 0, 0], [1, 1, 1, 1]])
def test_candidates_of_one_kind_are_drawn_evenly(marks):
    often, counted = drawn(marks, 2, 5.0)
    assert often.tolist() == counted.tolist()
    assert often == pytest.approx(0.5, abs=0.03)


def test_the_order_is_random_so_that_the_first_are_any():
    """Token dropping keeps the first ones longest."""
    generator, candidates = torch.Generator().manual_seed(0), torch.arange(20)
    marks = candidates < 10
    firsts = [draw_marked_anchors(candidates, marks, 10, 1.5, generator)[0][0] for _ in range(1000)]
    share = float((torch.stack(firsts) < 10).double().mean())
    assert share == pytest.approx(0.6, abs=0.06)


def test_even_draws_are_in_random_order_and_all_where_there_are_fewer():
    generator = torch.Generator().manual_seed(0)
    assert sorted(draw_anchors(torch.arange(5), 9, generator).tolist()) == list(range(5))
    assert len({tuple(draw_anchors(torch.arange(5), 2, generator).tolist()) for _ in range(200)}) == 20


def test_data_without_marks_are_refused():
    expected = "mine.jsonl: expected rows with input_ids, loss_mask and marked .train.marked., found none marked"
    with pytest.raises(DataError, match=expected):
        check_marks(masked([1, 2, 3], [0, 1, 1]), "mine.jsonl")
    check_marks(Document(np.arange(3), np.ones(3, dtype=bool), marked=np.zeros(3, dtype=bool)), "mine.jsonl")
