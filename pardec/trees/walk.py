"""Verification of a tree of drafts: from the root on to the child that holds the target's own token, if any does.

Knows token ids and the tree's shape; no model, no cache, no probabilities.
Legend: B batch, N nodes, W = K + 1 tokens that a step may emit, K num_speculative_tokens, which is the tree's depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pardec.draft_tree import DraftTree
from pardec.layout import next_blocks


@dataclass(frozen=True)
class WalkTables:
    """What a walk looks up, made once for a tree.

    Attributes:
        parents: row of each node's parent, shape [N].
        if_equal: shape [N + 1, N]: row r in all of line r.
        if_other: shape [N + 1, N]: row r where node n + 1 does not lead to row r, 0 where it does.
        by_end: by draft length and by the row where tokens and nodes part, all that follows from them, side by side as
            `Walk` has it: shape [(K + 1) (N + 1), W + 1 + K + 1].
        width: W.
    """

    parents: Tensor
    if_equal: Tensor
    if_other: Tensor
    by_end: Tensor
    width: int

    @classmethod
    def of(cls, tree: DraftTree, device: torch.device, copy_runs: Sequence[int] = ()) -> "WalkTables":
        """The tables of a tree on a device; `copy_runs` as in `pardec.trees.copied_branch.CopiedBranch.of`."""
        paths, K, N = tree.paths, tree.num_speculative_tokens, tree.num_nodes
        rows = torch.arange(N + 1)
        leads = torch.zeros(N + 1, N, dtype=torch.bool)
        for row, path in enumerate(paths):
            leads[row, [node - 1 for node in path[1:]]] = True
        behind = next_blocks((*tree.runs, *copy_runs), N + len(copy_runs) - K).tolist()
        lines = []
        for length in range(K + 1):
            for path in paths:
                alive = path[: length + 1]
                end, depth = alive[-1], len(alive) - 1
                # behind the end of a path its rows go on by themselves, so that they may be taken from where they go
                padded = [*alive, *range(depth + 1, K + 1)]
                lines.append([*padded, depth, *behind[end]])
        if_equal = rows[:, None].expand(-1, N).contiguous()
        return cls(
            parents=torch.tensor(tree.parents, device=device),
            if_equal=if_equal.to(device),
            if_other=if_equal.masked_fill(leads, 0).to(device),
            by_end=torch.tensor(lines, device=device),
            width=K + 1,
        )


@dataclass(frozen=True)
class Walk:
    """Where a walk went.

    Attributes:
        tokens: the target's tokens at the rows that it came through, shape [B, W], valid up to and including index
            `num_accepted`, the bonus token.
        path: those rows, shape [B, W]; behind the end row w stands at w.
        num_accepted: accepted nodes, shape [B], in 0..draft_length; with copied tokens that stand, all of these.
        next_rows: rows of the run behind its end, shape [B, K]; behind a short run its last row again.
        next_length: of that run, shape [B].
        num_drafts: accepted nodes among them, shape [B]; None where there are no copied tokens.
    """

    tokens: Tensor
    path: Tensor
    num_accepted: Tensor
    next_rows: Tensor
    next_length: Tensor
    num_drafts: Tensor | None = None


def walk(tables: WalkTables, target_tokens: Tensor, node_tokens: Tensor, draft_length: Tensor) -> Walk:
    """From the root to the child that holds the target's token, for as long as there is one.

    Exact, whatever the nodes hold, as long as they were chosen without looking at the target's tokens: what is emitted
    are the target's own choices, each made at a row that has seen exactly those before it. No rule accepts more of a
    tree that is a function of what was committed: a child cannot be emitted more often than the target draws it.

    Args:
        tables: of the tree.
        target_tokens: the target's choice behind each row, its argmax or drawn from its law, shape [B, N + 1], int64.
        node_tokens: shape [B, N], int64; siblings differ.
        draft_length: depth down to which nodes exist, shape [B], in 0..K.

    Raises:
        ValueError: if shapes disagree.

    Source: SpecInfer, arXiv:2305.09781, Algorithm 2 (VerifyGreedy), with draws in place of argmax.
    """
    (B, N), rows = node_tokens.shape, tables.if_equal.shape[0]
    if (N + 1, *target_tokens.shape) != (rows, B, rows) or tuple(draft_length.shape) != (B,):
        raise ValueError(
            f"target_tokens: expected shape {(B, rows)} beside nodes of shape {(B, rows - 1)} and draft_length of "
            f"shape {(B,)}, found {tuple(target_tokens.shape)}, {(B, N)} and {tuple(draft_length.shape)}"
        )
    is_taken = target_tokens.index_select(1, tables.parents) == node_tokens
    # a row is reached if every node that leads to it is taken; rows that are reached lead to each other, so the last
    # of them is the end. Dead nodes are cut off behind it: by_end knows where
    end = torch.where(is_taken[:, None], tables.if_equal, tables.if_other).amin(dim=2).amax(dim=1)
    line = tables.by_end.index_select(0, torch.add(end, draft_length, alpha=rows))
    W = tables.width
    path = line[:, :W]
    return Walk(target_tokens.gather(1, path), path, line[:, W], line[:, W + 1 : -1], line[:, -1])
