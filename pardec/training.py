"""The training forward: real tokens once without gradient, then only mask rows, with gradient, against their cache.

Exact, because real rows never depend on what is trained; the target's own law comes for free from the first pass.
Knows no optimiser and no files.
Legend: B sequences, T tokens, N anchors, K num_speculative_tokens, M = N * K mask rows, D width, V vocabulary.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pardec.cache import PrefixCache
from pardec.forward import TargetModel
from pardec.gated_lora import lora_enabled
from pardec.layout import TrainingLayout, training_layout
from pardec.loss import agreement, draft_loss


@dataclass
class Prefix:
    """What the pass over the real tokens leaves behind.

    Attributes:
        cache: their keys and values.
        logits: the target's for the tokens that the mask rows of all anchors predict, shape [B, N * K, V].
    """

    cache: PrefixCache
    logits: Tensor


class MaskTokenTrainer(nn.Module):
    """Both passes of a training step as one module: the only thing to wrap for distribution.

    Source: prefix-cached form of parallel mask-token training (PaSS arXiv:2311.13581; many anchors per forward as
    in PPD arXiv:2405.18628).
    """

    position_weights: Tensor

    def __init__(
        self,
        base: nn.Module,
        num_speculative_tokens: int,
        *,
        mask_sharing: str = "distinct",
        objective: str = "kl",
        position_weights: list[float] | None = None,
        has_lora: bool = False,
    ):
        """Mask embeddings start at the mean input embedding.

        Args:
            base: the frozen model, with the LoRA injected if `has_lora`.
            num_speculative_tokens: K.
            mask_sharing: `distinct` or `shared`.
            objective: see `pardec.loss.draft_loss`.
            position_weights: K numbers; default all 1.
            has_lora: switch the injected LoRA on for mask rows.

        Raises:
            ValueError: if gradient checkpointing is on, which discards the cache.
        """
        super().__init__()
        if any(getattr(part, "gradient_checkpointing", False) for part in base.modules()):
            raise ValueError("base: expected gradient checkpointing off, found it on (it discards the cache)")
        self.base = base.eval()
        self.target = TargetModel.wrap(base)  # type: ignore[arg-type]
        self.num_speculative_tokens = num_speculative_tokens
        self.objective = objective
        self.has_lora = has_lora
        rows = 1 if mask_sharing == "shared" else num_speculative_tokens
        self.mask_embeddings = nn.Parameter(mean_embedding(self.target).repeat(rows, 1))
        weights = torch.tensor(position_weights or [1.0] * num_speculative_tokens, device=self.target.device)
        self.register_buffer("position_weights", weights, persistent=False)
        self._prefix: Prefix | None = None

    def train(self, mode: bool = True) -> "MaskTokenTrainer":
        """The base stays in eval mode: its dropout would change the target's law."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        loss_mask: Tensor,
        anchors: Tensor,
        first_anchor: int = 0,
        num_anchors: int | None = None,
        with_metrics: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted loss over the mask rows that have a target.

        Args:
            input_ids: shape [B, T].
            loss_mask: tokens that may be targets, shape [B, T], bool.
            anchors: shape [B, N].
            first_anchor: run only a part of the anchors; 0 runs the real tokens too, other parts reuse them.
            num_anchors: anchors of that part; default all.
            with_metrics: compute the metrics too, which cost time.

        Returns:
            loss_sum: scalar, the sum of weighted losses; token_count: scalar, how many rows it is a sum of; metrics:
            shape [3, K], sums per position of rows, agreeing argmaxes and sum of min(p, q).
        """
        T, K = input_ids.shape[1], self.num_speculative_tokens
        if first_anchor == 0:
            self._prefix = self._run_prefix(input_ids, training_layout(anchors, K, T))
        assert self._prefix is not None
        part = slice(first_anchor, None if num_anchors is None else first_anchor + num_anchors)
        layout = training_layout(anchors[:, part], K, T)
        draft_logits = self._run_mask_rows(layout, T, self._prefix.cache).flatten(0, 1)
        rows = slice(first_anchor * K, first_anchor * K + layout.positions.shape[1])
        target_logits = self._prefix.logits[:, rows].flatten(0, 1)
        targets = layout.targets.clamp_max(T - 1)
        counts = ((layout.targets < T) & loss_mask.gather(1, targets)).flatten()
        losses = draft_loss(self.objective, draft_logits, target_logits, input_ids.gather(1, targets).flatten())
        weights = self.position_weights.repeat(len(losses) // K)
        # where, not a product: a row that does not count must not pass on a non-finite loss
        loss_sum = torch.where(counts, losses * weights, 0.0).sum()
        metrics = torch.zeros(3, K, device=losses.device)
        if with_metrics:
            values = torch.stack([torch.ones_like(losses), *agreement(draft_logits, target_logits)])
            metrics = (values.detach() * counts).unflatten(1, (-1, K)).sum(dim=1)
        return loss_sum, counts.sum(), metrics

    @torch.no_grad()
    def _run_prefix(self, input_ids: Tensor, layout: TrainingLayout) -> Prefix:
        cache = PrefixCache(self.target.num_layers)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        # the mask token at position s predicts what the real token at s predicts
        keep = layout.positions.clamp_max(input_ids.shape[1] - 1)
        return Prefix(cache, self.target.run_at(keep, self.target.embed(input_ids), positions, None, cache))

    def _run_mask_rows(self, layout: TrainingLayout, num_tokens: int, cache: PrefixCache) -> Tensor:
        target, (B, M) = self.target, layout.positions.shape
        K = self.num_speculative_tokens
        embeds = self.mask_embeddings.to(target.dtype).expand(K, -1).repeat(M // K, 1).expand(B, -1, -1)
        limit = target.max_positions
        positions = layout.positions if limit is None else layout.positions.clamp_max(limit - 1)
        real = torch.arange(num_tokens, device=positions.device).expand(B, -1)
        keys = torch.cat([real, positions], dim=1)
        mask = target.attention.render(layout.visible, positions, keys, target.dtype)
        with lora_enabled(self.base) if self.has_lora else nullcontext():
            return target.run(embeds, positions, mask, cache)


@torch.no_grad()
def mean_embedding(target: TargetModel, chunk_tokens: int = 16384) -> Tensor:
    """Mean input embedding over the vocabulary, shape [1, D], float32, in the space of the module's output."""
    total = torch.zeros(target.embedding_dim, dtype=torch.float64, device=target.device)
    for ids in torch.arange(target.vocab_size, device=target.device).split(chunk_tokens):
        total += target.embed(ids).double().sum(dim=0)
    return (total / target.vocab_size).float()[None]
