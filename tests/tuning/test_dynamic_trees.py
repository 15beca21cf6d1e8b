"""What is expected of dynamic trees, against walks that are simulated from a law of places, and their replay."""

import random

import numpy as np
import pytest

from pardec.draft_tree import DynamicTree
from pardec.tuning.dynamic_trees import DrawnTexts, best_dynamic_trees

K = 3


def random_rows(num_places: int, seed: int = 0) -> np.ndarray:
    """Rows of paths that go on by chance, later nodes of longer paths further behind; of longer runs further still."""
    draw, found = random.Random(seed), np.zeros((num_places, K, K), dtype=int)
    for place in found:
        going_on, steps = [draw.random() < 0.7 for _ in range(K)], [1 + int(draw.expovariate(0.4)) for _ in range(K)]
        for length in range(1, K + 1):
            row = 0
            for depth in range(length):
                if not all(going_on[: depth + 1]):
                    break
                row += steps[depth] + (length - 1) * (depth > 0)
                place[length - 1, depth] = row
    return found


def test_a_replay_walks_each_text_as_a_decoder_would():
    # by place, rows in trees from runs of 1 and 2: of the first token, and of the first two
    rows = [[[1, 0], [1, 3]], [[0, 0], [0, 0]], [[2, 0], [2, 4]], [[1, 0], [2, 0]], [[4, 0], [1, 0]], [[1, 0], [2, 3]]]
    tree = DynamicTree((2, 1, 2, 0))
    # place 0, run 2: rows 1 and 3, whose run is 0; place 3: nothing is drafted, the root's run is 2; place 4: row 1,
    # whose run is 1; place 6 is beyond the end
    assert DrawnTexts([rows]).accepted(tree, [9]) == [[2, 0, 1]]
    assert DrawnTexts([rows]).accepted(tree, [4]) == [[2]]
    # place 0: row 3 is no node; place 2 by a run of 1: row 2, whose run is 2; place 4 by that: row 1
    assert DrawnTexts([rows]).accepted(DynamicTree((2, 1, 2)), [9]) == [[1, 1, 1]]
    # a round of two_pass drafts behind the token after it: places 1, 3 and 5 + 1
    assert DrawnTexts([rows]).accepted(tree, [9], two_pass=True) == [[0, 1]]


def test_shapes_that_are_none_are_refused():
    with pytest.raises(
        ValueError, match=r"rows: expected shape \[places, K, K\] for each of some texts, found \[\[4, 2"
    ):
        DrawnTexts([np.zeros((4, 2, 3))])
    with pytest.raises(ValueError, match="found \\[\\]"):
        DrawnTexts([])
    with pytest.raises(ValueError, match="tree: expected a depth of at most 3, that of the rows, found 4"):
        DrawnTexts([random_rows(9)]).accepted(DynamicTree((4,) * 6), [9])


def test_where_places_do_not_hang_together_a_replay_brings_what_is_expected_of_every_shape():
    texts = DrawnTexts([random_rows(60_000)])
    grown = best_dynamic_trees(texts, 40, nodes=(3, 7))
    assert len(grown) > 20
    for one in grown[::5]:
        (found,) = texts.accepted(one.tree, [60_000])
        assert 1 + np.mean(found) == pytest.approx(one.tokens_per_step, rel=0.01)


def test_trees_have_the_nodes_and_no_more_than_the_rows_that_are_asked_for_and_more_rows_bring_more():
    texts = DrawnTexts([random_rows(3000)])
    grown = best_dynamic_trees(texts, 30, nodes=(2, 5, 9))
    assert {one.tree.num_nodes for one in grown} == {2, 5, 9}
    assert max(one.tree.num_rows for one in grown) == 30
    assert all(one.tree.runs[0] == one.tree.num_speculative_tokens for one in grown)
    best = [max(one.tokens_per_step for one in grown if one.tree.num_rows <= rows) for rows in (6, 12, 30)]
    assert best[0] < best[1] < best[2]


def test_a_share_of_places_ends_at_each_row_and_accepts_as_many_nodes_as_were_walked():
    rows = random_rows(500)
    shares, accepted = DrawnTexts([rows[:200], rows[200:]]).ends(6, 2)
    assert shares.sum(axis=1) == pytest.approx(1)
    assert accepted[0] == 0
    for length in (1, 2):
        walks = []
        for place in rows[:, length - 1].tolist():
            path = [row for row in place[:length] if 0 < row <= 6]
            walks.append((path[-1] if path else 0, len(path)))
        assert accepted[length] == pytest.approx(np.mean([depth for _, depth in walks]))
        for row in range(7):
            assert shares[length, row] == pytest.approx(np.mean([end == row for end, _ in walks]))
