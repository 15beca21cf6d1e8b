"""Layouts against element-wise loops written from the definition: who sits where, and who sees whom."""

import pytest
import torch
from tree_samples import TREES, ancestors, random_tree

from pardec.layout import (
    block_layout,
    block_starts,
    chain_layout,
    full_blocks,
    nested_block_lengths,
    next_blocks,
    real_layout,
    training_layout,
    tree_layout,
)

DRAFT_LENGTHS = range(6)


def chain_rows(K):
    """Rows of the fused chain in order: ("real", i) or ("mask", i, j), mask token j behind real row i."""
    real = [("real", i) for i in range(K + 1)]
    return real + [("mask", i, j) for i in range(K + 1) for j in range(1, K + 1)]


def sees(row, other):
    """Real rows see real rows up to themselves; mask rows those up to their anchor, and their own block."""
    if other[0] == "real":
        return other[1] <= row[1]
    return row[0] == "mask" and row[1] == other[1] and other[2] <= row[2]


def assert_layout_is(layout, rows):
    R = len(rows)
    assert layout.num_rows == R
    assert layout.num_real == sum(row[0] == "real" for row in rows)
    assert layout.offsets.tolist() == [row[1] if row[0] == "real" else row[1] + row[2] for row in rows]
    assert layout.mask_indices.tolist() == [row[2] - 1 for row in rows if row[0] == "mask"]
    assert layout.visible.shape == (R, R)
    for r in range(R):
        for s in range(R):
            assert bool(layout.visible[r, s]) == sees(rows[r], rows[s]), (rows[r], rows[s])


@pytest.mark.parametrize("K", DRAFT_LENGTHS)
def test_chain_holds_the_real_rows_and_one_block_behind_each(K):
    layout = chain_layout(full_blocks(K))
    assert layout.num_rows == (K + 1) ** 2
    assert_layout_is(layout, chain_rows(K))


# K + 1 numbers: mask tokens behind each real row
PRUNED = [(0,), (1, 0), (0, 1), (0, 0), (2, 1, 1), (2, 1, 0), (0, 2, 1), (3, 2, 1, 1), (3, 0, 0, 0), (1, 3, 0, 2)]


def pruned_rows(block_lengths):
    """Rows of a chain with blocks of these lengths, in order; names as in `chain_rows`."""
    real = [("real", i) for i in range(len(block_lengths))]
    return real + [("mask", i, j) for i, length in enumerate(block_lengths) for j in range(1, length + 1)]


@pytest.mark.parametrize("block_lengths", PRUNED, ids=str)
def test_short_and_empty_blocks_hold_the_first_mask_tokens_behind_their_real_row(block_lengths):
    assert_layout_is(chain_layout(block_lengths), pruned_rows(block_lengths))


@pytest.mark.parametrize("block_lengths", PRUNED, ids=str)
def test_a_pruned_chain_is_the_full_chain_without_the_rows_that_were_dropped(block_lengths):
    K = len(block_lengths) - 1
    kept = [row[0] == "real" or row[2] <= block_lengths[row[1]] for row in chain_rows(K)]
    full, pruned, keep = chain_layout(full_blocks(K)), chain_layout(block_lengths), torch.tensor(kept)
    assert torch.equal(pruned.offsets, full.offsets[keep])
    assert torch.equal(pruned.visible, full.visible[keep][:, keep])
    assert torch.equal(pruned.mask_indices, full.mask_indices[keep[K + 1 :]])
    assert pruned.num_real == full.num_real == K + 1


@pytest.mark.parametrize("block_lengths", PRUNED, ids=str)
def test_block_starts_name_the_row_of_each_first_mask_token(block_lengths):
    rows = pruned_rows(block_lengths)
    for i, start in enumerate(block_starts(block_lengths).tolist()):
        before = [row for row in rows if row[0] == "real" or row[1] < i]
        assert start == len(before)  # also where the block is empty


@pytest.mark.parametrize("block_lengths", PRUNED, ids=str)
@pytest.mark.parametrize("copy_tokens", [0, 1])
def test_next_blocks_name_the_rows_of_the_block_behind_the_last_accepted_token(block_lengths, copy_tokens):
    rows, num_real = pruned_rows(block_lengths), len(block_lengths)
    if max(block_lengths) > num_real - 1 - copy_tokens:
        return  # not a shape with a copied token
    found = next_blocks(block_lengths, copy_tokens)
    assert found.shape == (num_real, num_real - copy_tokens)
    for accepted, (*places, length) in enumerate(found.tolist()):
        own = [index for index, row in enumerate(rows) if row[0] == "mask" and row[1] == accepted]
        assert length == len(own) == block_lengths[accepted]
        assert places[:length] == own
        assert set(places[length:]) <= (set(own[-1:]) or set(range(len(rows))))  # a row that there is


@pytest.mark.parametrize("K", DRAFT_LENGTHS)
def test_block_is_one_real_row_and_its_mask_tokens(K):
    assert_layout_is(block_layout(K), [("real", 0)] + [("mask", 0, j) for j in range(1, K + 1)])


@pytest.mark.parametrize("num_rows", range(1, 7))
def test_real_rows_are_causal_and_nothing_else(num_rows):
    assert_layout_is(real_layout(num_rows), [("real", i) for i in range(num_rows)])


def test_layouts_have_the_dtypes_that_indexing_and_masks_need():
    for layout in (chain_layout((3, 3, 3, 3)), chain_layout((0,)), block_layout(0), block_layout(3), real_layout(2)):
        assert layout.offsets.dtype == torch.int64
        assert layout.mask_indices.dtype == torch.int64
        assert layout.visible.dtype == torch.bool
        moved = layout.to(torch.device("cpu"))
        assert moved.num_real == layout.num_real
        for name in ("offsets", "visible", "mask_indices"):
            assert torch.equal(getattr(moved, name), getattr(layout, name))


def assert_training_layout_is(layout, anchors, lengths, T):
    rows = [(n, j) for n, length in enumerate(lengths) for j in range(1, length + 1)]
    B, M = len(anchors), len(rows)
    assert layout.positions.shape == layout.targets.shape == (B, M)
    assert layout.visible.shape == (B, M, T + M)
    assert layout.positions.dtype == layout.targets.dtype == torch.int64
    assert layout.visible.dtype == torch.bool
    assert list(zip(layout.blocks.tolist(), (layout.depths + 1).tolist(), strict=True)) == rows
    for b in range(B):
        for row, (n, j) in enumerate(rows):
            assert layout.positions[b, row] == anchors[b][n] + j
            assert layout.targets[b, row] == anchors[b][n] + j + 1
            for t in range(T):
                assert bool(layout.visible[b, row, t]) == (t <= anchors[b][n]) == bool(layout.sees_real[b, row, t])
            for other, (m, i) in enumerate(rows):
                assert bool(layout.visible[b, row, T + other]) == (m == n and i <= j), (b, n, j, m, i)


@pytest.mark.parametrize("K", DRAFT_LENGTHS)
@pytest.mark.parametrize(
    ("anchors", "T"),
    [
        ([[0]], 1),
        ([[0], [6]], 7),
        ([[0, 3, 6], [6, 6, 0]], 7),
        ([[2, 2, 5, 1]], 6),
    ],
    ids=["single-token", "first-and-last", "borders-and-fill", "unsorted-and-repeated"],
)
def test_training_blocks_see_their_prefix_and_themselves(K, anchors, T):
    lengths = (K,) * len(anchors[0])
    layout = training_layout(torch.tensor(anchors), lengths, T)
    assert_training_layout_is(layout, anchors, lengths, T)


@pytest.mark.parametrize("lengths", [(4, 3, 1, 1), (3, 0, 2, 1), (1, 1, 1, 1), (0, 0, 0, 5)])
def test_blocks_of_different_lengths_see_their_prefix_and_themselves(lengths):
    anchors = [[2, 2, 5, 1], [0, 6, 3, 4]]
    assert_training_layout_is(training_layout(torch.tensor(anchors), lengths, 7), anchors, lengths, 7)


@pytest.mark.parametrize("N", [1, 5, 32, 64])
@pytest.mark.parametrize("K", [1, 4, 8])
@pytest.mark.parametrize(("ratio", "floor"), [(1.0, 0.0), (0.7, 0.2), (0.5, 0.0), (0.9, 1.0)])
def test_token_dropping_keeps_its_share_of_every_depth_nested(N, K, ratio, floor):
    lengths = nested_block_lengths(N, K, ratio, floor)
    assert len(lengths) == N
    assert list(lengths) == sorted(lengths, reverse=True)
    for j in range(1, K + 1):
        kept = sum(length >= j for length in lengths)  # a block of length j has all depths before j
        assert kept == max(1, round(max(floor, ratio ** (j - 1)) * N))


def test_pards_shares_leave_less_than_45_percent_of_the_rows_at_k_8():
    assert sum(nested_block_lengths(64, 8, 0.7, 0.2)) <= 0.45 * 64 * 8


@pytest.mark.parametrize("K", range(1, 6))
def test_training_and_decoding_agree_on_what_a_block_sees(K):
    """Block i of the chain behind c committed tokens is the training block of anchor c + i."""
    committed, chain = 4, chain_layout(full_blocks(K))
    anchors = torch.arange(committed, committed + K + 1)[None]
    training = training_layout(anchors, full_blocks(K), committed + K + 1)
    assert torch.equal(training.positions[0], committed + chain.offsets[K + 1 :])
    assert bool(training.visible[0, :, :committed].all())
    assert torch.equal(training.visible[0, :, committed:], chain.visible[K + 1 :])


def tree_rows(tree):
    """Rows of a fused tree in order; names as in `chain_rows`."""
    real = [("real", i) for i in range(tree.num_nodes + 1)]
    return real + [("mask", i, j) for i, length in enumerate(tree.runs) for j in range(1, length + 1)]


@pytest.mark.parametrize("tree", [*TREES.values(), *(random_tree(seed) for seed in range(6))])
def test_a_node_sees_what_it_descends_from_and_its_run_sees_that_and_itself(tree):
    rows, layout = tree_rows(tree), tree_layout(tree.parents, tree.runs)
    assert layout.num_rows == len(rows) == tree.num_rows
    assert layout.num_real == tree.num_nodes + 1
    depths = [tree.depths[row[1]] for row in rows]
    expected = [depth + (row[2] if row[0] == "mask" else 0) for depth, row in zip(depths, rows, strict=True)]
    assert layout.offsets.tolist() == expected
    assert layout.mask_indices.tolist() == [row[2] - 1 for row in rows if row[0] == "mask"]
    for r, row in enumerate(rows):
        above = ancestors(tree, row[1])
        for s, other in enumerate(rows):
            own = row[0] == "mask" and row[1] == other[1] and other[-1] <= row[-1]
            seen = other[1] in above if other[0] == "real" else own
            assert bool(layout.visible[r, s]) == seen, (row, other)


@pytest.mark.parametrize("block_lengths", PRUNED, ids=str)
def test_the_chain_is_the_tree_with_one_child_each(block_lengths):
    chain, K = chain_layout(block_lengths), len(block_lengths) - 1
    found = tree_layout(range(K), block_lengths)
    assert found.num_real == chain.num_real
    for name in ("offsets", "visible", "mask_indices"):
        assert torch.equal(getattr(found, name), getattr(chain, name))


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_the_run_behind_every_node_is_found_as_deep_as_the_tree_is(tree):
    rows, K = tree_rows(tree), tree.num_speculative_tokens
    for node, (*places, length) in enumerate(next_blocks(tree.runs, tree.num_nodes - K).tolist()):
        own = [index for index, row in enumerate(rows) if row[0] == "mask" and row[1] == node]
        assert length == len(own) == tree.runs[node]
        assert len(places) == K
        assert places[:length] == own
        assert set(places[length:]) <= (set(own[-1:]) or set(range(len(rows))))
