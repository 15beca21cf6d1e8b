"""The forwards of a step: which rows each has, and where among them the next drafts stand; made once for a decoder.

Legend: K num_speculative_tokens, L copy_tokens, N nodes of a tree, W = K + L candidates, with a tree N + L.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pardec.decoding.copying import Candidates
from pardec.decoding.rows import RowForward, RowPlan
from pardec.draft_tree import AnyTree, DynamicTree
from pardec.layout import BlockLengths, block_layout, chain_layout, next_blocks, real_layout, tree_layout
from pardec.trees.copied_branch import CopiedBranch
from pardec.trees.dynamic_steps import DynamicSteps
from pardec.trees.standing import StandingTree
from pardec.trees.tree_steps import TreeSteps
from pardec.trees.walk import Walk


@dataclass(frozen=True)
class Verifying:
    """A forward that verifies candidates, in fused mode with mask tokens behind them.

    Attributes:
        plan: of its rows.
        next_block: of a fused chain, by accepted candidates the rows of the next drafts and how many these are, see
            `pardec.layout.next_blocks`, shape [W + 1, K + 1].
        tree: what it verifies in place of a chain.
        branch: of the copied tokens beside the tree, None where there are none.
    """

    plan: RowPlan
    next_block: Tensor | None
    tree: TreeSteps | DynamicSteps | None = None
    branch: CopiedBranch | None = None

    @classmethod
    def tree_with_copies(
        cls, forward: RowForward, tree: AnyTree, copy_runs: BlockLengths, *, is_two_pass: bool
    ) -> "Verifying":
        """Of a tree and, from its root, one more branch of copied tokens, so many mask tokens behind each of them."""
        N, L = tree.num_nodes, len(copy_runs)
        # where parents are data, rows are as if all nodes were the root's children until a step knows better
        parents = (0,) * N if isinstance(tree, DynamicTree) else tree.parents
        branch = (0, *range(N + 1, N + L))[:L]
        runs = (0,) * (N + L + 1) if is_two_pass else (*tree.runs, *copy_runs)
        plan = forward.plan(tree_layout((*parents, *branch), runs))
        steps = DynamicSteps if isinstance(tree, DynamicTree) else TreeSteps
        found = CopiedBranch.of(tree, copy_runs, plan.offsets.device) if L else None
        return cls(plan, None, steps.of(tree, plan, copy_runs), found)

    def path_of(self, tree: TreeSteps | StandingTree, sequence: int, row: int) -> Sequence[int]:
        """Rows from the root to a real row, both of them included, in a sequence; `tree` as it stands in this step."""
        N = self.plan.layout.num_real - 1 - (0 if self.branch is None else self.branch.num_copies)
        return tree.path_of(sequence, row) if row <= N else [0, *range(N + 1, row + 1)]

    def walk(
        self,
        tree: TreeSteps | StandingTree,
        target_tokens: Tensor,
        nodes: Tensor,
        draft_length: Tensor,
        copies: Candidates,
    ) -> Walk:
        """The walk of the tree as it stands in this step, and on along the copied tokens where they go on.

        Args:
            tree: of this step.
            target_tokens: the target's choice behind each real row, shape [B, N + L + 1], int64.
            nodes: shape [B, N], int64.
            draft_length: depth down to which nodes exist, shape [B].
            copies: that stand beside the tree.
        """
        num_rows = nodes.shape[1] + 1
        found = tree.walk(target_tokens[:, :num_rows], nodes, draft_length)
        return found if self.branch is None else self.branch.go_on(found, target_tokens[:, num_rows:], copies)


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
            blocks: block lengths of the fused chain, K + L + 1 of them; of a tree those behind the copies count.
            tree: in place of the chain.
        """
        K, is_two_pass = num_speculative_tokens, mode == "two_pass"

        def chain(num_copies: int) -> Verifying:
            if is_two_pass:
                return Verifying(forward.plan(real_layout(K + num_copies + 1)), None)
            own = blocks[: K + num_copies + 1]
            return Verifying(forward.plan(chain_layout(own)), next_blocks(own, num_copies).to(forward.target.device))

        def verifying(num_copies: int) -> Verifying:
            if tree is None:
                return chain(num_copies)
            behind = (*blocks[K + 1 :], *(0,) * num_copies)[:num_copies]
            return Verifying.tree_with_copies(forward, tree, behind, is_two_pass=is_two_pass)

        alone = verifying(0) if copy_tokens else None
        return cls(forward.plan(block_layout(K)), verifying(copy_tokens), alone, is_two_pass)

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
