"""The training step of PARD, to compare with: all weights are learned, from K segments of one sequence in one forward.

The first segment is the text itself, the others are mask tokens; where token dropping keeps few of them, a segment is
short. Knows no optimiser.
Legend: B sequences, T tokens, K num_speculative_tokens, M mask rows of a sequence, V vocabulary, D width.
"""

import torch
from timing.joint_forward import dense_rows
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from transformers import PreTrainedModel

from pardec.layout import nested_block_lengths, training_layout
from pardec.target.forward import TargetModel
from pardec.target.prefix_cache import PrefixCache
from pardec.training.first_embeddings import first_embeddings
from pardec.training.mask_rows.mask_pass import ATTENTION_KERNELS
from pardec.training.module import METRICS


class PardForward(nn.Module):
    """Cross-entropy of a model that predicts K tokens behind every position, by T + M rows under one dense mask.

    A row of segment k predicts from the text up to its anchor and the k - 1 mask tokens behind it, so segment 1 is the
    model's own training. All mask tokens are one embedding.
    Source: PARD, arXiv:2504.18583, section 3.2; dropping of section 3.3.
    """

    def __init__(
        self, draft: PreTrainedModel, num_speculative_tokens: int, *, keep_ratio: float = 1.0, keep_floor: float = 0.0
    ):
        """Takes the model that is trained.

        Args:
            draft: all of its weights are to be learned.
            num_speculative_tokens: K, the segments.
            keep_ratio: see `nested_block_lengths`; 1 keeps all mask tokens.
            keep_floor: likewise.
        """
        super().__init__()
        self.base = draft.requires_grad_(True)
        self.target = TargetModel.wrap(draft)
        self.mask_embedding = nn.Parameter(first_embeddings(self.target, 1, "mean"))
        self.num_speculative_tokens, self.keep = num_speculative_tokens, (keep_ratio, keep_floor)

    def num_mask_rows(self, num_tokens: int) -> int:
        """M of sequences of T tokens."""
        return sum(self._lengths(num_tokens)) - num_tokens

    def _lengths(self, num_tokens: int) -> tuple[int, ...]:
        return nested_block_lengths(num_tokens, self.num_speculative_tokens, *self.keep)

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
        """As `MaskTokenTrainer.forward`, of all anchors at once; of the metrics the sums of rows and losses by segment.

        Args:
            input_ids: shape [B, T].
            loss_mask: tokens that may be targets, shape [B, T], bool.
            anchors: all positions in random order, by which blocks get their lengths, shape [B, T].
            first_anchor: 0.
            num_anchors: T.
            max_depth: None.
            with_metrics: makes no difference.
        """
        (_, T), target = input_ids.shape, self.target
        layout = training_layout(anchors, [length - 1 for length in self._lengths(T)], T)
        real = torch.arange(T, device=input_ids.device).expand_as(input_ids)
        positions, visible = dense_rows(target, layout, len(real), T)
        masks = self.mask_embedding.to(target.dtype).expand(*layout.positions.shape, -1)
        with sdpa_kernel(ATTENTION_KERNELS):
            logits = target.run(
                torch.cat([target.embed(input_ids), masks], dim=1),
                positions,
                target.attention.render(visible, positions, positions, target.dtype),
                PrefixCache(target.num_layers),
            )
        following = torch.cat([real + 1, layout.targets], dim=1)
        targets = following.clamp_max(T - 1)
        counts = ((following < T) & loss_mask.gather(1, targets)).flatten()
        ids = input_ids.gather(1, targets).flatten()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids, reduction="none") * counts
        segments = torch.cat([real[0] * 0, layout.depths + 1]).repeat(len(real))
        metrics = torch.zeros(len(METRICS), self.num_speculative_tokens, device=losses.device)
        for name, values in (("rows", counts.float()), ("loss", losses.detach())):
            metrics[METRICS.index(name)].index_add_(0, segments, values)
        return losses.sum(), counts.sum(), metrics
