"""Copied tokens beside a tree: one more branch from the root, along which a walk goes on where its tokens begin it.

Knows rows and token ids; no model, no cache, no probabilities.
Legend: B batch, N nodes, L copied tokens, K num_speculative_tokens, which is the tree's depth, W = max(K, L) + 1 tokens
that a step may emit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pardec.decoding.copying import Candidates
from pardec.decoding.verify import Verdict, verify_copies
from pardec.draft_tree import AnyTree
from pardec.layout import next_blocks
from pardec.trees.walk import Walk


@dataclass(frozen=True)
class CopiedBranch:
    """What is looked up for so many copied tokens beside a tree, made once.

    Attributes:
        by_length: by number of copied tokens that stand, the rows that they have come through, those of the run behind
            and its length, side by side as `Walk` has them: shape [W, W + K + 1], of more than L anything.
        num_copies: L.
        beyond: the last rows of a path that is longer than the tree is deep, K + 1..W - 1, shape [1, W - K - 1].
    """

    by_length: Tensor
    num_copies: int
    beyond: Tensor

    @classmethod
    def of(cls, tree: AnyTree, copy_runs: Sequence[int], device: torch.device) -> "CopiedBranch":
        """The branch whose rows follow the tree's; `copy_runs` = mask tokens behind each of the L copied ones."""
        N, K, L = tree.num_nodes, tree.num_speculative_tokens, len(copy_runs)
        behind = next_blocks((*tree.runs, *copy_runs), N + L - K).tolist()
        rows, W, lines = [0, *range(N + 1, N + L + 1)], max(K, L) + 1, []
        for length in (min(number, L) for number in range(W)):
            # behind the end of a path its rows go on by themselves
            lines.append([*rows[: length + 1], *range(length + 1, W), *behind[rows[length]]])
        return cls(torch.tensor(lines, device=device), L, torch.arange(K + 1, W, device=device)[None])

    def go_on(self, found: Walk, target_tokens: Tensor, copies: Candidates) -> Walk:
        """Where what a walk emits, with its bonus token, begins the branch, on along this while it holds the target's.

        So far the tree's rows have been walked, and no draw behind a copied token was looked at: exact, and it goes as
        far as a walk of tree and branch grown together.

        Args:
            found: the walk of the tree.
            target_tokens: the target's choice behind each copied token, shape [B, L], int64.
            copies: the branch.

        Returns:
            the walk, its tokens and path of width W.
        """
        assert copies.num_copies is not None
        verdict = verify_copies(Verdict(found.tokens, found.num_accepted), target_tokens, copies.ids, copies.num_copies)
        W, goes_on = verdict.tokens.shape[1], verdict.num_accepted > found.num_accepted
        path = found.path
        if self.beyond.shape[1]:
            path = torch.cat([path, self.beyond.expand(path.shape[0], -1)], dim=1)
        of_tree = torch.cat([path, found.next_rows, found.next_length[:, None]], dim=1)
        of_branch = self.by_length.index_select(0, verdict.num_accepted)
        line = torch.where(goes_on[:, None], of_branch, of_tree)
        return Walk(verdict.tokens, line[:, :W], verdict.num_accepted, line[:, W:-1], line[:, -1], found.num_accepted)
