"""The walk of a tree with copied tokens beside it, against loops that know tokens and rows alone."""

import pytest
import torch
from tree_samples import TREES, random_tree, walked

from pardec.decoding.copying import Candidates
from pardec.draft_tree import DraftTree, DynamicTree
from pardec.layout import next_blocks, tree_layout
from pardec.trees.copied_branch import CopiedBranch
from pardec.trees.walk import WalkTables, walk

CPU, NUM = torch.device("cpu"), 120
ALL = [*TREES.values(), *(random_tree(seed, num_nodes=6) for seed in range(4))]


def few_tokens(tree: DraftTree, num_copies: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Target, node and copied tokens over so few words that walks go far and copies are often nodes as well."""
    generator = torch.Generator().manual_seed(seed)
    width = max(tree.ranks) + 2
    target = torch.randint(0, width, (NUM, tree.num_nodes + 1 + num_copies), generator=generator)
    turn = torch.randint(0, width, (NUM, tree.num_nodes + 1), generator=generator)
    nodes = [(turn[:, parent] + rank) % width for parent, rank in zip(tree.parents, tree.ranks, strict=True)]
    return target, torch.stack(nodes, dim=1), torch.randint(0, width, (NUM, num_copies), generator=generator)


def walked_on(path: list[int], target: list[int], copies: list[int], num_nodes: int) -> list[int]:
    """Rows that a walk comes through in all, once it has come through `path` in the tree."""
    emitted = [target[row] for row in path]
    if emitted != copies[: len(emitted)]:
        return path
    rows = [0, *(num_nodes + i for i in range(1, len(emitted) + 1))]
    while len(rows) <= len(copies) and target[rows[-1]] == copies[len(rows) - 1]:
        rows.append(num_nodes + len(rows))
    return rows


@pytest.mark.parametrize("num_copies", [1, 2, 5])
@pytest.mark.parametrize("tree", ALL)
def test_a_walk_goes_on_along_the_copies_that_it_has_begun(tree, num_copies):
    K, N = tree.num_speculative_tokens, tree.num_nodes
    runs = tuple(number % (K + 1) for number in range(num_copies))
    tables, branch = WalkTables.of(tree, CPU, runs), CopiedBranch.of(tree, runs, CPU)
    behind, W = next_blocks((*tree.runs, *runs), N + num_copies - K).tolist(), max(K, num_copies) + 1
    went_on = set()
    for length in range(K + 1):
        target, nodes, copies = few_tokens(tree, num_copies, length)
        exist = torch.tensor([num_copies * (b % 3 > 0) for b in range(NUM)])
        of_tree = walk(tables, target[:, : N + 1], nodes, torch.full((NUM,), length))
        found = branch.go_on(of_tree, target[:, N + 1 :], Candidates(copies, exist, exist))
        assert found.num_drafts is not None
        for b in range(NUM):
            draws, path = target[b].tolist(), walked(tree, target[b].tolist(), nodes[b].tolist(), length)
            rows = walked_on(path, draws, copies[b, : int(exist[b])].tolist(), N)
            a = len(rows) - 1
            went_on.add((len(path) - 1, a - len(path) + 1))
            assert int(found.num_accepted[b]) == a
            assert int(found.num_drafts[b]) == len(path) - 1
            assert found.path[b].tolist() == [*rows, *range(a + 1, W)]
            expected = [draws[row] for row in (*path, *rows[len(path) :])]
            assert found.tokens[b, : a + 1].tolist() == expected
            assert [*found.next_rows[b].tolist(), int(found.next_length[b])] == behind[rows[-1]]
    assert {(0, 0), (0, 1)} <= went_on
    assert num_copies == 1 or any(depth and more for depth, more in went_on)


@pytest.mark.parametrize("tree", ALL)
def test_it_goes_as_far_as_any_branch_leads_where_the_target_says_the_same_behind_the_same_tokens(tree):
    """Behind nodes and copies of the same tokens the target has one choice: none of either is left out."""
    N, L, K = tree.num_nodes, 4, tree.num_speculative_tokens
    tables, branch = WalkTables.of(tree, CPU, (0,) * L), CopiedBranch.of(tree, (0,) * L, CPU)
    _, nodes, copies = few_tokens(tree, L, 3)
    for b in range(NUM):
        paths = [[nodes[b, row - 1].item() for row in path[1:]] for path in tree.paths]
        paths += [copies[b, : i + 1].tolist() for i in range(L)]
        choices = {tuple(path): hash((b, *path)) % (max(tree.ranks) + 2) for path in paths}
        target = torch.tensor([[choices[tuple(path)] for path in paths]])
        exist = torch.tensor([L])
        of_tree = walk(tables, target[:, : N + 1], nodes[b : b + 1], torch.tensor([K]))
        found = branch.go_on(of_tree, target[:, N + 1 :], Candidates(copies[b : b + 1], exist, exist))
        emitted = [choices[()]]
        while tuple(emitted) in choices:
            emitted.append(choices[tuple(emitted)])
        assert found.tokens[0, : int(found.num_accepted) + 1].tolist() == emitted


def test_copies_stand_beside_a_tree_as_one_more_branch_of_it():
    tree = TREES["branching"]
    N, L = tree.num_nodes, 3
    layout = tree_layout((*tree.parents, 0, N + 1, N + 2), (*tree.runs, 0, 2, 0))
    alone = tree_layout(tree.parents, tree.runs)
    assert torch.equal(layout.visible[: N + 1, : N + 1], alone.visible[: N + 1, : N + 1])
    assert layout.offsets[N + 1 : N + 1 + L].tolist() == [1, 2, 3]
    for copy in range(1, L + 1):
        assert layout.visible[N + copy].nonzero()[:, 0].tolist() == [0, *range(N + 1, N + copy + 1)]
    assert layout.offsets[-2:].tolist() == [3, 4]  # of the run behind the second copy
    assert CopiedBranch.of(DynamicTree(tree.runs), (0, 2, 0), CPU).num_copies == L
