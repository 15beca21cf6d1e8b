"""The forwards of a step: which rows each has, and where among them the next drafts stand; made once for a decoder.

Legend: K num_speculative_tokens, L copy_tokens, W = K + L candidates, of a tree its N nodes.
"""

from dataclasses import dataclass

from torch import Tensor

from pardec.decoding.rows import RowForward, RowPlan
from pardec.draft_tree import AnyTree, DynamicTree
from pardec.layout import BlockLengths, block_layout, chain_layout, next_blocks, real_layout, tree_layout


@dataclass(frozen=True)
class Verifying:
    """A forward that verifies candidates, in fused mode with mask tokens behind them.

    Attributes:
        plan: of its rows.
        next_block: of a fused chain, by accepted candidates the rows of the next drafts and how many these are, see
            `pardec.layout.next_blocks`, shape [W + 1, K + 1].
    """

    plan: RowPlan
    next_block: Tensor | None


@dataclass(frozen=True)
class StepPlans:
    """The forwards of a decoder.

    Attributes:
        draft: a token and the block of K mask tokens behind it: the first of two_pass, or the end of prefill.
        verify: the other of two_pass, or the one of all other modes.
        drafts_alone: the same where nothing was copied, which the host does not know without waiting but on a CPU;
            None where nothing ever is.
        is_two_pass: whether a step has both.
    """

    draft: RowPlan
    verify: Verifying
    drafts_alone: Verifying | None
    is_two_pass: bool

    @classmethod
    def of(
        cls,
        forward: RowForward,
        mode: str,
        *,
        num_speculative_tokens: int,
        copy_tokens: int,
        blocks: BlockLengths,
        tree: AnyTree | None,
    ) -> "StepPlans":
        """Plans of a mode.

        Args:
            forward: runs them.
            mode: of decoding.
            num_speculative_tokens: K.
            copy_tokens: L.
            blocks: block lengths of the fused chain, W + 1 of them.
            tree: in place of the chain.
        """
        K, is_two_pass = num_speculative_tokens, mode == "two_pass"

        def chain(num_copies: int) -> Verifying:
            if is_two_pass:
                return Verifying(forward.plan(real_layout(K + num_copies + 1)), None)
            own = blocks[: K + num_copies + 1]
            return Verifying(forward.plan(chain_layout(own)), next_blocks(own, num_copies).to(forward.target.device))

        if tree is None:
            verify = chain(copy_tokens)
        else:
            # where parents are data, rows are as if all nodes were the root's children until a step knows better
            parents = (0,) * tree.num_nodes if isinstance(tree, DynamicTree) else tree.parents
            runs = [0] * len(tree.runs) if is_two_pass else tree.runs
            verify = Verifying(forward.plan(tree_layout(parents, runs)), None)
        return cls(forward.plan(block_layout(K)), verify, chain(0) if copy_tokens else None, is_two_pass)

    def verifying(self, num_candidates: int) -> Verifying:
        """The forward that verifies so many candidates: all of them, or drafts alone."""
        if self.drafts_alone is None or num_candidates + 1 == self.verify.plan.layout.num_real:
            return self.verify
        return self.drafts_alone

    @property
    def num_rows(self) -> int:
        """Rows of the forwards of a step, summed."""
        return self.verify.plan.layout.num_rows + self.is_two_pass * self.draft.layout.num_rows

    @property
    def num_slots(self) -> int:
        """Cache slots that a step writes behind the committed tokens."""
        return 1 + max(self.draft.layout.num_rows, self.verify.plan.layout.num_rows)
