"""The shape of a tree: what is read off it, and what is no tree."""

import itertools

import pytest
from tree_samples import BRANCHING, CROOKED, TREES, ancestors, random_tree

from pardec.draft_tree import MAX_NODES, DraftTree, DynamicTree
from pardec.layout import MAX_SPECULATIVE_TOKENS


@pytest.mark.parametrize("tree", [*TREES.values(), *(random_tree(seed) for seed in range(5))])
def test_paths_lead_from_the_root_over_parents(tree):
    for row, path in enumerate(tree.paths):
        assert path[0] == 0
        assert path[-1] == row
        assert all(tree.parents[after - 1] == before for before, after in itertools.pairwise(path))
        assert set(path) == ancestors(tree, row)
        assert tree.depths[row] == len(path) - 1
        assert tree.rank_paths[row] == tuple(tree.ranks[node - 1] for node in path[1:])
    assert tree.num_speculative_tokens == max(tree.depths)
    assert tree.num_rows == 1 + tree.num_nodes + sum(tree.runs)


def test_a_chain_is_a_tree_of_the_likeliest_tokens_with_one_child_each():
    assert DraftTree.chain((3, 2, 0, 1)) == DraftTree((0, 1, 2), (0, 0, 0), (3, 2, 0, 1))
    assert DraftTree.chain([1, 0]).num_rows == 3


def test_lists_become_tuples_so_that_trees_may_be_keys():
    tree = DraftTree([0, 0], [0, 1], [1, 0, 1])  # type: ignore[arg-type]
    assert hash(tree) == hash(DraftTree((0, 0), (0, 1), (1, 0, 1)))
    assert tree != BRANCHING


DEEP = MAX_SPECULATIVE_TOKENS + 1
WRONG = [
    (((), (), (0,)), f"tree: expected 1 to {MAX_NODES} nodes, found 0"),
    (((0,) * 513, (0,) * 513, (0,) * 514), f"tree: expected 1 to {MAX_NODES} nodes, found 513"),
    (((0, 1), (0,), (2, 2, 2)), "tree: expected 2 ranks and 3 runs for 2 nodes, found 1 and 3"),
    (((0, 1), (0, 0), (2, 2)), "tree: expected 2 ranks and 3 runs for 2 nodes, found 2 and 2"),
    (((0, 2), (0, 0), (2, 2, 2)), "tree: expected a parent from 0 to 1 for node 2, found 2"),
    (((-1,), (0,), (1, 1)), "tree: expected a parent from 0 to 0 for node 1, found -1"),
    (((0,), (64,), (1, 1)), "tree: expected ranks from 0 to 63, found 64 for node 1"),
    (((0,), (-1,), (1, 1)), "tree: expected ranks from 0 to 63, found -1 for node 1"),
    (((0, 0), (1, 1), (1, 1, 1)), "tree: expected another rank for each child of a node, found two of one rank"),
    (((0, 0), (0, 1), (0, 0, 0)), "tree: expected runs from 0 to its depth 1, which is the largest, found (0, 0, 0)"),
    (((0,), (0,), (2, 1)), "tree: expected runs from 0 to its depth 1, which is the largest, found (2, 1)"),
    (((0,), (0,), (1, -1)), "tree: expected runs from 0 to its depth 1, which is the largest, found (1, -1)"),
    (((0.0,), (0,), (1, 1)), "tree: expected integers as parents, found (0.0,)"),
    (((0,), (0.5,), (1, 1)), "tree: expected integers as ranks, found (0.5,)"),
    (((0,), "0", (1, 1)), "tree: expected integers as ranks, found '0'"),
    (((0,), (0,), (1.0, 1.0)), "tree: expected integers as runs, found (1.0, 1.0)"),
    (((0,), (0,), (1, None)), "tree: expected integers as runs, found (1, None)"),
    (((False,), (0,), (1, 1)), "tree: expected integers as parents, found (False,)"),
    ((None, (0,), (1, 1)), "tree: expected integers as parents, found None"),
    ((range(DEEP), (0,) * DEEP, (0,) * (DEEP + 1)), "tree: expected a depth of at most 64, found 65"),
]


@pytest.mark.parametrize(("numbers", "message"), WRONG)
def test_what_is_no_tree_is_refused_in_one_line(numbers, message):
    with pytest.raises(ValueError) as error:
        DraftTree(*numbers)
    assert str(error.value) == message


def test_a_chain_of_plain_decoding_is_no_tree():
    with pytest.raises(ValueError, match="tree: expected 1 to 512 nodes, found 0"):
        DraftTree.chain((0,))
    with pytest.raises(ValueError, match="block_lengths: expected K"):
        DraftTree.chain((1, 2))
    with pytest.raises(ValueError, match="tree: expected integers as runs, found None"):
        DraftTree.chain(None)  # type: ignore[arg-type]


def test_depth_does_not_go_by_the_order_of_nodes():
    assert CROOKED.depths == (0, 1, 2, 1, 2, 2)


# ---------------------------------------------------------------------- dynamic trees


def test_a_dynamic_tree_is_told_by_its_runs():
    tree = DynamicTree([3, 0, 2, 1])  # type: ignore[arg-type]
    assert tree == DynamicTree((3, 0, 2, 1))
    assert hash(tree) == hash(DynamicTree((3, 0, 2, 1)))
    assert (tree.num_nodes, tree.num_speculative_tokens, tree.num_rows) == (3, 3, 10)


WRONG_RUNS = [
    ((), f"tree: expected 1 to {MAX_NODES} nodes, a run for each and the root's, found 0"),
    ((1,), f"tree: expected 1 to {MAX_NODES} nodes, a run for each and the root's, found 0"),
    ((1,) * 514, f"tree: expected 1 to {MAX_NODES} nodes, a run for each and the root's, found 513"),
    ((0, 0), "tree: expected runs from 0 to a depth of 1 to 1, found (0, 0)"),
    ((2, 1), "tree: expected runs from 0 to a depth of 1 to 1, found (2, 1)"),
    ((2, -1, 0), "tree: expected runs from 0 to a depth of 1 to 2, found (2, -1, 0)"),
    ((65,) * 100, "tree: expected runs from 0 to a depth of 1 to 64, found (65, 65, 65"),
    ((1, 0.5), "tree: expected integers as runs, found (1, 0.5)"),
    (None, "tree: expected integers as runs, found None"),
    ("11", "tree: expected integers as runs, found '11'"),
]


@pytest.mark.parametrize(("runs", "message"), WRONG_RUNS)
def test_runs_that_make_no_dynamic_tree_are_told_in_one_line(runs, message):
    with pytest.raises(ValueError) as error:
        DynamicTree(runs)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
