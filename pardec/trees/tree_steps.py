"""A tree within a step: its candidates, its walk, and the slots of the nodes that stand.

Knows logits, hidden states and slots, no layouts' forwards and no loop.
Legend: B batch, N nodes, K num_speculative_tokens, V vocabulary, W tokens that a walk may emit, H width of a hidden
state.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pardec.decoding.drafting import HeadDrafter, scores_pairs
from pardec.decoding.rows import RowPlan
from pardec.draft_tree import DraftTree
from pardec.target.cache import SlotCache
from pardec.trees.candidates import TreeCandidates
from pardec.trees.walk import Walk, WalkTables, walk


@dataclass(frozen=True)
class TreeSteps:
    """What steps do with one tree on one device.

    Attributes:
        tree: its shape.
        plan: of the forward that verifies it.
        tables: of its walks.
        candidates: of its nodes.
    """

    tree: DraftTree
    plan: RowPlan
    tables: WalkTables
    candidates: TreeCandidates

    @classmethod
    def of(cls, tree: DraftTree, plan: RowPlan, copy_runs: Sequence[int] = ()) -> "TreeSteps":
        """Everything that is looked up, made once.

        Args:
            tree: its shape.
            plan: of the forward that verifies it.
            copy_runs: mask tokens behind each of the copied ones that the same forward verifies.
        """
        device = plan.offsets.device
        return cls(tree, plan, WalkTables.of(tree, device, copy_runs), TreeCandidates.of(tree, device))

    def draft(
        self, head: HeadDrafter | None, logits: Tensor, hidden: Tensor | None, previous: Tensor, length: Tensor
    ) -> tuple[Tensor, None]:
        """Tokens of the nodes, shape [B, N], whose parents need no telling.

        Args:
            head: ranks candidates behind their parents; None for the ranks of mask rows.
            logits: of a run's mask rows, shape [B, K, V].
            hidden: what the output head read there, shape [B, K, H], where there is a head.
            previous: the token before the first, shape [B].
            length: mask rows that exist, shape [B]; what is drawn of others is dead.
        """
        if head is None or hidden is None:
            return self.candidates.from_rows(logits), None
        rank = self.candidates.from_pairs if scores_pairs(logits, head.shortlist) else self.candidates.from_head
        embed, output_embeddings = head.target.embed, head.tap.output_embeddings
        return rank(head.head, logits, hidden, previous, embed, output_embeddings, head.shortlist), None

    def standing(self, parents: Tensor | None) -> "TreeSteps":
        """Itself: this tree has one shape for all steps."""
        return self

    def path_of(self, sequence: int, row: int) -> Sequence[int]:
        """Rows from the root to a row, both of them included, in every sequence."""
        return self.tree.paths[row]

    def walk(self, target_tokens: Tensor, nodes: Tensor, draft_length: Tensor) -> Walk:
        """See `pardec.trees.walk.walk`."""
        return walk(self.tables, target_tokens, nodes, draft_length)


def compact(cache: SlotCache, path: Tensor, index: Tensor, *, looks: bool) -> None:
    """Keys and values of the nodes on a path, shape [B, W], move up behind the committed tokens.

    The rows of the forward that has just run lie in order behind them. Where all walks followed the first nodes,
    they lie there already.

    Args:
        cache: that the forward has written to.
        path: of a walk.
        index: 0..W-1, shape [W].
        looks: whether the host looks at that, which a step that is recorded, or on a device, must not.
    """
    assert cache.slots is not None
    if looks and torch.equal(path, index.expand_as(path)):
        return
    slots = cache.slots[:, : path.shape[1]]
    cache.move(slots[:, :1] + path[:, 1:], slots[:, 1:])
