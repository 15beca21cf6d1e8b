"""The shape that a dynamic tree has in one step: who descends from whom, its rows in the forward, and its walk.

Knows parents, rows and token ids; no model, no cache, no probabilities.
Legend: B batch, N nodes, K num_speculative_tokens, W = K + 1 tokens that a step may emit, R rows of a forward,
G query heads for each key/value head.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pardec.decoding.rows import RowPlan
from pardec.target.hidden import rows_of_each
from pardec.trees.walk import Walk


@dataclass(frozen=True)
class StandingTables:
    """What is looked up for every shape, made once for a tree on a device.

    Attributes:
        rows: 0..N, shape [N + 1].
        no_parent: of the root, -1, shape [1, 1].
        identity: shape [N + 1, N + 1], float32.
        beyond: a row that there is not, a number.
        index: 0..W-1, shape [W].
        next_blocks: rows of the run behind each row and its length, shape [N + 1, K + 1].
        num_squarings: of what leads one generation up, until it leads K up.
    """

    rows: Tensor
    no_parent: Tensor
    identity: Tensor
    beyond: Tensor
    index: Tensor
    next_blocks: Tensor
    num_squarings: int

    @classmethod
    def of(cls, next_blocks: Tensor, device: torch.device) -> "StandingTables":
        """From rows of runs, as `pardec.layout.next_blocks` gives them."""
        num_rows, W = next_blocks.shape
        return cls(
            torch.arange(num_rows, device=device),
            torch.full((1, 1), -1, device=device),
            torch.eye(num_rows, device=device),
            torch.tensor(num_rows, device=device),
            torch.arange(W, device=device),
            next_blocks.to(device),
            (W - 2).bit_length(),
        )


@dataclass(frozen=True)
class StandingRows:
    """The rows of a forward whose tree is data, made once for a plan.

    Attributes:
        plan: of some tree of so many nodes, with the same runs behind them.
        behind: the real row that each row is or hangs behind, shape [R]; by_group: for each of G heads, [G R].
        within: distance from that row, shape [R].
    """

    plan: RowPlan
    behind: Tensor
    by_group: Tensor
    within: Tensor

    @classmethod
    def of(cls, plan: RowPlan, runs: tuple[int, ...]) -> "StandingRows":
        """For a plan of `pardec.layout.tree_layout` with these runs, those behind copied tokens the last."""
        rows, device = torch.arange(len(runs)), plan.offsets.device
        behind = torch.cat([rows, rows.repeat_interleave(torch.tensor(runs))]).to(device)
        within = F.pad(plan.layout.mask_indices + 1, (len(runs), 0))
        bias = plan.bias_by_kind
        return cls(plan, behind, behind if bias is None else behind.repeat(bias.shape[2] // len(behind)), within)

    def plan_for(self, sees: Tensor, depths: Tensor) -> RowPlan:
        """The plan of this step's trees; what their rows see and how deep they are, as in `StandingTree`.

        Real rows beyond those of the tree are copied tokens, whose branch is the same in every step.
        """
        plan, num_real = self.plan, self.plan.layout.num_real
        last, num_copies = num_real + 1, num_real - depths.shape[1]
        if num_copies:
            # of nodes the plan knows no more than that they see the root and themselves
            sees = F.pad(sees, (0, num_copies, 0, num_copies)) | plan.layout.visible[:num_real, :num_real]
            of_copies = plan.offsets[:, num_real - num_copies : num_real]
            depths = torch.cat([depths, of_copies.expand(len(depths), -1)], dim=1)
        offsets = depths.index_select(1, self.behind) + self.within
        if plan.bias_by_kind is not None:
            always, never = plan.bias_by_kind[..., 0], plan.bias_by_kind[..., -1]
            shown = torch.where(sees.index_select(1, self.by_group)[:, None], always[..., None], never[..., None])
            parts = [plan.bias_by_kind[..., :1], shown, plan.bias_by_kind[..., last:]]
            bias = torch.cat([part.expand(shown.shape[0], -1, -1, -1) for part in parts], dim=3)
            return replace(plan, offsets=offsets, bias_by_kind=bias)
        sees = sees.index_select(1, self.behind).transpose(1, 2)
        parts = [plan.visible_by_kind[:, :1], sees, plan.visible_by_kind[:, last:]]
        visible = torch.cat([part.expand(sees.shape[0], -1, -1) for part in parts], dim=1)
        return replace(plan, offsets=offsets, visible_by_kind=visible, offset_by_kind=F.pad(offsets, (1, 1)))


@dataclass(frozen=True)
class StandingTree:
    """A shape for each sequence.

    Attributes:
        tables: of the tree.
        plan: of its forward.
        parents: row of each node's parent, below its own, shape [B, N], int64.
        sees: whether a row descends from another, or is it, shape [B, N + 1, N + 1], bool.
        depths: shape [B, N + 1], int64.
    """

    tables: StandingTables
    plan: RowPlan
    parents: Tensor
    sees: Tensor
    depths: Tensor

    @classmethod
    def of(cls, tables: StandingTables, rows: StandingRows, parents: Tensor) -> "StandingTree":
        """From parents; tables and rows are those of the tree."""
        up = torch.cat([tables.no_parent.expand(len(parents), -1), parents], dim=1)
        up = tables.identity + (up[:, :, None] == tables.rows)
        for _ in range(tables.num_squarings):
            up = up @ up
        sees = up > 0
        depths = sees[:, :, 1:].sum(dim=2)
        return cls(tables, rows.plan_for(sees, depths), parents, sees, depths)

    def path_of(self, sequence: int, row: int) -> list[int]:
        """Rows from the root to a row, both of them included; waits for the device."""
        return self.sees[sequence, row].nonzero()[:, 0].tolist()

    def walk(self, target_tokens: Tensor, node_tokens: Tensor, draft_length: Tensor) -> Walk:
        """From the root to the child that holds the target's token, as `pardec.trees.walk.walk` does.

        Arguments as there; exact for the same reason.
        """
        tables = self.tables
        is_taken = target_tokens.gather(1, self.parents) == node_tokens
        # rows that are reached lead to each other, so the last of them is the end
        is_lost = (self.sees[:, :, 1:] > is_taken[:, None]).any(dim=2) | (self.depths > draft_length[:, None])
        end = tables.rows.masked_fill(is_lost, 0).amax(dim=1)
        num_accepted = self.depths.gather(1, end[:, None])
        # ancestors stand in order, as parents have lower rows; behind the end rows go on by themselves
        on_path = rows_of_each(self.sees, end[:, None])[:, 0]
        path = torch.where(on_path, tables.rows, tables.beyond).topk(len(tables.index), dim=1, largest=False).values
        path = path.where(tables.index <= num_accepted, tables.index)
        block = tables.next_blocks.index_select(0, end)
        return Walk(target_tokens.gather(1, path), path, num_accepted[:, 0], block[:, :-1], block[:, -1])
