"""The dense form of a training step, to compare with: real tokens and mask rows in one forward, all with gradients.

Same model, layout, law and loss as `MaskTokenTrainer`, so also the same gradients; only what is computed differs.
Legend: B sequences, T tokens, N anchors, K num_speculative_tokens, M mask rows.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from pardec.layout import TrainingLayout, training_layout
from pardec.target.forward import TargetModel
from pardec.target.prefix_cache import PrefixCache
from pardec.training.mask_rows.mask_pass import ATTENTION_KERNELS
from pardec.training.module import METRICS, MaskTokenTrainer
from pardec.training.peft_lora import lora_enabled


def dense_rows(
    target: TargetModel, layout: TrainingLayout, num_sequences: int, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """Positions of real tokens with the mask rows of `layout` behind them, and what each of these rows sees.

    Returns:
        Shapes [B, T + M], int64, and [B, T + M, T + M], bool.
    """
    device = layout.positions.device
    real = torch.arange(num_tokens, device=device).expand(num_sequences, -1)
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()
    of_real = nn.functional.pad(causal, (0, layout.positions.shape[1])).expand(num_sequences, -1, -1)
    positions = torch.cat([real, target.clamp_positions(layout.positions)], dim=1)
    return positions, torch.cat([of_real, layout.visible], dim=1)


class JointForward(nn.Module):
    """A training step's loss by one forward over T + M rows, as PaSS trains (arXiv:2311.13581, section 3).

    Takes what `MaskTokenTrainer` takes and shares its parameters. Each part of the anchors runs the real rows again.
    """

    def __init__(self, trainer: MaskTokenTrainer):
        """Takes the module whose step this is in another form.

        Args:
            trainer: with distinct mask embeddings, without a sampler head and without token dropping.
        """
        super().__init__()
        self.trainer = trainer

    def forward(
        self,
        input_ids: Tensor,
        loss_mask: Tensor,
        anchors: Tensor,
        first_anchor: int = 0,
        num_anchors: int | None = None,
        max_depth: int | None = None,
        with_metrics: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `MaskTokenTrainer.forward`; its metrics are left 0."""
        target, drafter, objective = self.trainer.target, self.trainer.drafter, self.trainer.objective
        (B, T), K = input_ids.shape, max_depth or drafter.num_speculative_tokens
        mine = anchors[:, first_anchor : None if num_anchors is None else first_anchor + num_anchors]
        layout = training_layout(mine, (K,) * mine.shape[1], T)
        M = len(layout.depths)
        positions, visible = dense_rows(target, layout, B, T)
        assert self.trainer.mask_embeddings is not None
        masks = self.trainer.mask_embeddings.to(target.dtype)[layout.depths].expand(B, -1, -1)
        # the mask token at position s predicts what the real token at s predicts
        law_rows = layout.positions.clamp_max(T - 1)
        rows = torch.cat([law_rows, torch.arange(T, T + M, device=positions.device).expand(B, -1)], dim=1)
        with ExitStack() as stack:
            stack.enter_context(sdpa_kernel(ATTENTION_KERNELS))
            if drafter.has_lora:
                stack.enter_context(self._lora_at_mask_rows(T, M))
            logits = target.run_at(
                rows,
                torch.cat([target.embed(input_ids), masks], dim=1),
                positions,
                target.attention.render(visible, positions, positions, target.dtype),
                PrefixCache(target.num_layers),
            )
        of_law, of_masks = logits.split(M, dim=1)
        targets = layout.targets.clamp_max(T - 1)
        counts = ((layout.targets < T) & loss_mask.gather(1, targets)).flatten()
        ids = input_ids.gather(1, targets).flatten()
        law = objective.law(of_law.detach().flatten(0, 1), with_metrics=with_metrics)
        losses, _ = objective.weighted_losses(
            of_masks.flatten(0, 1), law, ids, counts, layout, K, with_metrics=with_metrics
        )
        return losses.sum(), counts.sum(), torch.zeros(len(METRICS), K, device=losses.device)

    @contextmanager
    def _lora_at_mask_rows(self, T: int, M: int) -> Iterator[None]:
        """The LoRA acts on the last M of T + M rows: what it adds to the others is multiplied by 0."""
        gate = torch.cat([torch.zeros(T, 1), torch.ones(M, 1)]).to(self.trainer.target.device)
        halves = [part for name, part in self.trainer.base.named_modules() if name.endswith("lora_B.default")]
        hooks = [
            half.register_forward_hook(lambda module, rows, added: added * gate.to(added.dtype)) for half in halves
        ]
        try:
            with lora_enabled(self.trainer.base):
                yield
        finally:
            for hook in hooks:
                hook.remove()
