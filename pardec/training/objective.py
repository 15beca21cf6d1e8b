"""What drafts are trained for: the losses of a forward's mask rows, each times what it counts.

Knows which block a row belongs to; no model, and of the losses only their names.
Legend: B sequences, N blocks, K num_speculative_tokens, M mask rows of a sequence, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pardec.errors import shown
from pardec.layout import TrainingLayout
from pardec.training.comparison import Comparison, TargetLaw, compare, target_law
from pardec.training.loss import (
    ACCEPTED_LENGTH,
    acceptance_weights,
    draft_loss,
    expected_accepted_length,
    learned_tokens,
    learns_likeliest,
)


@dataclass(frozen=True)
class Objective:
    """What the drafts are trained for; see `pardec.training.loss`.

    Attributes:
        loss: name of the loss.
        weights: one number per position, or the name of a rule; `accepted_length` weighs positions itself.
        temperature: at which target and draft are compared.
        top_k: of the target's law; None for all of it.
    """

    loss: str = "kl"
    weights: Sequence[float] | str = "uniform"
    temperature: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        """Refuses weights beside an objective that has its own."""
        flat = self.weights == "uniform" or (not isinstance(self.weights, str) and all(w == 1 for w in self.weights))
        if self.loss == ACCEPTED_LENGTH and not flat:
            raise ValueError(
                f"train.position_weights: expected 1 beside the objective {ACCEPTED_LENGTH}, which weighs positions "
                f"itself, found {shown(self.weights)}"
            )

    def law(self, target_logits: Tensor, *, with_metrics: bool = True) -> TargetLaw:
        """The law that drafts are compared with, from logits of shape [M, V]; metrics look at its likeliest tokens."""
        asked = with_metrics or learns_likeliest(self.loss)
        return target_law(target_logits, self.temperature, self.top_k, with_likeliest=asked)

    def weighted_losses(
        self,
        logits: Tensor,
        law: TargetLaw,
        ids: Tensor,
        counts: Tensor,
        layout: TrainingLayout,
        num_speculative_tokens: int,
        *,
        with_metrics: bool = True,
    ) -> tuple[Tensor, Comparison]:
        """Weighted loss of every row, 0 where it does not count, and what draft and target have in common.

        Args:
            logits: shape [B * M, V].
            law: to follow, of these rows.
            ids: the data's tokens, shape [B * M].
            counts: rows that have a target, shape [B * M], bool.
            layout: of the rows, in whole blocks.
            num_speculative_tokens: K.
            with_metrics: find the draft's likeliest tokens too.

        Returns:
            losses of shape [B * M]; the comparison that they are made of.
        """
        blocks = _Blocks.of(layout, num_speculative_tokens)
        learned = learned_tokens(self.loss, law, ids)
        found = compare(logits, law, learned, self.temperature, with_likeliest=with_metrics)
        if self.loss == ACCEPTED_LENGTH:
            return self._block_losses(found, law, ids, counts, blocks), found
        # where, not a product: a row that does not count must not pass on a non-finite loss
        losses = draft_loss(self.loss, found) * self._weights(found.overlap.detach(), counts, layout, blocks)
        return torch.where(counts, losses, 0.0), found

    def _weights(self, overlap: Tensor, counts: Tensor, layout: TrainingLayout, blocks: "_Blocks") -> Tensor:
        """What each row's loss counts, shape [B * M]."""
        if self.weights == "uniform":
            return torch.ones_like(counts, dtype=torch.float32)
        if not isinstance(self.weights, str):
            weights = torch.tensor(self.weights, device=counts.device)
            return weights[layout.depths].repeat(layout.positions.shape[0])
        return blocks.rows(acceptance_weights(self.weights, blocks.grid(overlap * counts)))

    def _block_losses(
        self, found: Comparison, law: TargetLaw, ids: Tensor, counts: Tensor, blocks: "_Blocks"
    ) -> Tensor:
        """-log of the expected accepted length of its block at every row, so that their mean is that of the blocks."""
        of_id = law.prob_of(ids)
        # a token that the target excludes continues none of its texts
        kept = torch.where(of_id > 0, (found.log_likelihood - of_id.log()).clamp_max(0).exp(), 0.0)
        # nothing behind a row that does not count is reached
        reached = blocks.grid(counts.float()).cumprod(dim=-1) > 0
        lengths = expected_accepted_length(
            torch.where(reached, blocks.grid(found.overlap), 0.0), torch.where(reached, blocks.grid(kept), 0.0)
        )
        losses = -lengths.clamp_min(torch.finfo(torch.float32).tiny).log()
        return blocks.rows(torch.where(reached, losses[..., None], 0.0))


@dataclass(frozen=True)
class _Blocks:
    """Rows by block and depth.

    Attributes:
        place: of each row of a sequence in a grid of N blocks of K, shape [M].
        shape: B, N and K.
    """

    place: Tensor
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, layout: TrainingLayout, num_speculative_tokens: int) -> "_Blocks":
        K = num_speculative_tokens
        return cls(layout.blocks * K + layout.depths, (layout.positions.shape[0], len(layout.block_lengths), K))

    def grid(self, values: Tensor) -> Tensor:
        """From [B * M] to [B, N, K]; 0 where a block has no such row."""
        B, N, K = self.shape
        return values.new_zeros(B, N * K).index_copy(1, self.place, values.unflatten(0, (B, -1))).unflatten(1, (N, K))

    def rows(self, grid: Tensor) -> Tensor:
        """Back again."""
        return grid.flatten(1)[:, self.place].flatten()
