"""Shapes that are data against the same shapes as constants: rows, positions, what they see, and walks."""

import pytest
import torch
from tiny_models import tiny_model
from tree_samples import TREES, random_tree

from pardec.decoding.rows import RowForward
from pardec.draft_tree import DraftTree
from pardec.layout import next_blocks, tree_layout
from pardec.target.attention import query_group
from pardec.target.forward import TargetModel
from pardec.trees.standing import StandingRows, StandingTables, StandingTree
from pardec.trees.walk import WalkTables, walk

CPU = torch.device("cpu")
RUNS = (3, 2, 3, 0, 1, 1, 0, 2)  # behind any tree of 7 nodes


def shapes(num: int, depth: int = 3) -> list[DraftTree]:
    found = [random_tree(seed, num_nodes=len(RUNS) - 1, width=7, depth=depth) for seed in range(400)]
    return [tree for tree in found if tree.num_speculative_tokens == depth][:num]


def standing(trees: list[DraftTree], runs: tuple[int, ...], rows: StandingRows) -> StandingTree:
    """The shapes of some sequences."""
    K = max(runs)
    tables = StandingTables.of(next_blocks(runs, len(runs) - 1 - K), CPU)
    return StandingTree.of(tables, rows, torch.tensor([tree.parents for tree in trees]))


def rows_of(family: str, runs: tuple[int, ...], with_masks: bool = True) -> tuple[RowForward, StandingRows]:
    model = tiny_model(family)
    target = TargetModel.wrap(model)
    masks = torch.randn(max(runs), target.embedding_dim, dtype=target.dtype)
    forward = RowForward(target, masks, query_group=query_group(model))
    runs = runs if with_masks else (0,) * len(runs)
    return forward, StandingRows.of(forward.plan(tree_layout([0] * (len(runs) - 1), runs)), runs)


@pytest.mark.parametrize("with_masks", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3-mixed-windows"])
def test_a_shape_has_the_rows_that_its_layout_has(family, with_masks):
    forward, rows = rows_of(family, RUNS, with_masks)
    trees = shapes(3)
    found = standing(trees, RUNS, rows).plan
    for b, tree in enumerate(trees):
        plan = forward.plan(tree_layout(tree.parents, RUNS if with_masks else (0,) * len(RUNS)))
        assert torch.equal(found.offsets[b], plan.offsets[0])
        if plan.bias_by_kind is not None:
            assert found.bias_by_kind is not None
            assert torch.equal(found.bias_by_kind[b], plan.bias_by_kind[0])
        else:
            assert torch.equal(found.visible_by_kind[b], plan.visible_by_kind[0])
            assert torch.equal(found.offset_by_kind[b], plan.offset_by_kind[0])
    assert (family == "gemma3-mixed-windows") == (found.bias_by_kind is None)


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 7])
def test_who_descends_from_whom_follows_from_parents(depth):
    trees = [DraftTree.chain((7,) * 8)] if depth == 7 else shapes(4, depth)
    runs = (depth, *(0 for _ in trees[0].parents))
    found = standing(trees, runs, rows_of("llama", runs)[1])
    for b, tree in enumerate(trees):
        assert found.depths[b].tolist() == list(tree.depths)
        for row, path in enumerate(tree.paths):
            assert found.path_of(b, row) == list(path)
            assert found.sees[b, row].nonzero()[:, 0].tolist() == list(path)


@pytest.mark.parametrize("tree", [*TREES.values(), *(random_tree(seed, num_nodes=9) for seed in range(6))])
def test_a_walk_goes_where_that_of_a_constant_shape_goes(tree):
    K, N, num = tree.num_speculative_tokens, tree.num_nodes, 400
    shape = standing([tree] * num, tree.runs, rows_of("llama", tree.runs)[1])
    tables, generator, ends = WalkTables.of(tree, CPU), torch.Generator().manual_seed(0), set()
    width = max(tree.ranks) + 1
    target = torch.randint(0, width, (num, N + 1), generator=generator)
    turn = torch.randint(0, width, (num, N + 1), generator=generator)
    nodes = torch.stack([(turn[:, p] + r) % width for p, r in zip(tree.parents, tree.ranks, strict=True)], dim=1)
    for length in range(K + 1):
        lengths = torch.full((num,), length)
        found, expected = shape.walk(target, nodes, lengths), walk(tables, target, nodes, lengths)
        for name in ("path", "num_accepted", "next_rows", "next_length"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        valid = torch.arange(K + 1) <= found.num_accepted[:, None]
        assert torch.equal(found.tokens[valid], expected.tokens[valid])
        ends |= set(found.path.gather(1, found.num_accepted[:, None])[:, 0].tolist())
    assert ends == set(range(N + 1))
