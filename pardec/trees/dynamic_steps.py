"""A dynamic tree within a step: what it is drawn from, and the shape that it then has.

Knows logits, hidden states and rows, no loop. Legend: B batch, N nodes, K num_speculative_tokens, V vocabulary,
H width of a hidden state.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pardec.decoding.drafting import HeadDrafter
from pardec.decoding.rows import RowPlan
from pardec.draft_tree import DynamicTree
from pardec.layout import next_blocks
from pardec.trees.drawing import Drawing
from pardec.trees.standing import StandingRows, StandingTables, StandingTree


@dataclass(frozen=True)
class DynamicSteps:
    """What steps do with one dynamic tree on one device; as `pardec.trees.tree_steps.TreeSteps`.

    Attributes:
        tree: how many nodes it has.
        drawing: of its nodes.
        tables: of its shapes.
        rows: of the forward that verifies it.
    """

    tree: DynamicTree
    drawing: Drawing
    tables: StandingTables
    rows: StandingRows

    @classmethod
    def of(cls, tree: DynamicTree, plan: RowPlan, copy_runs: Sequence[int] = ()) -> "DynamicSteps":
        """Everything that is looked up, made once; as of `TreeSteps`, `plan` for some tree of so many nodes."""
        runs, K, device = (*tree.runs, *copy_runs), tree.num_speculative_tokens, plan.offsets.device
        blocks = next_blocks(runs, len(runs) - 1 - K)[: len(tree.runs)]
        rows = StandingRows.of(plan, runs if plan.has_mask_rows else (0,) * len(runs))
        return cls(tree, Drawing.of(tree, device), StandingTables.of(blocks, device), rows)

    def draft(
        self, head: HeadDrafter | None, logits: Tensor, hidden: Tensor | None, previous: Tensor, length: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens of the nodes and the rows of their parents, each of shape [B, N]; arguments as in `Drawing.draw`."""
        found = self.drawing.draw(head, logits, hidden, previous, length)
        return found.tokens, found.parents

    def standing(self, parents: Tensor | None) -> StandingTree:
        """The shape that it has where these are the rows of its nodes' parents, shape [B, N]."""
        assert parents is not None
        return StandingTree.of(self.tables, self.rows, parents)
