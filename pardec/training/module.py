"""The training forward: real tokens once without gradient, then only mask rows, with gradient, against their cache.

Exact, because real rows never depend on what is trained; the target's own law comes for free from the first pass.
Knows no optimiser and no files.
Legend: B sequences, T tokens, N anchors, K num_speculative_tokens, M mask rows, D width, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pardec.adapters.head import SamplerHead
from pardec.layout import TrainingLayout, nested_block_lengths, sorted_anchors, training_layout
from pardec.target.forward import TargetModel
from pardec.target.hidden import HiddenTap
from pardec.target.layers import decoder_layers
from pardec.target.own_head import OwnHead
from pardec.training.first_embeddings import first_embeddings
from pardec.training.mask_rows.block_attention import supports
from pardec.training.mask_rows.mask_pass import MaskPass, spread
from pardec.training.objective import Objective
from pardec.training.parts import Part, parts_of, rows_at_once, summed_by_parts
from pardec.training.prefix_pass import Prefix, run_prefix

# rows of the metrics, each a sum over the mask rows of a position: of 1, then of mask rows alone and with the head
METRICS = ("rows", "loss", "agreement", "overlap", "head_loss", "head_agreement", "head_overlap")


@dataclass(frozen=True)
class Drafter:
    """What is learned, and what stands at mask rows.

    Attributes:
        num_speculative_tokens: K.
        mask_sharing: `distinct` or `shared`.
        draft_input: `mask_embeddings`, or `uniform_noise`: embeddings of random tokens, nothing learned.
        initialisation: of mask embeddings: `mean`, the mean input embedding, or `random_token`.
        has_lora: the base has a LoRA injected, to be switched on for mask rows.
        head_width: of a sampler head; 0 for none.
        joint_head: the head's loss trains what is below it too; otherwise it only reads.
    """

    num_speculative_tokens: int
    mask_sharing: str = "distinct"
    draft_input: str = "mask_embeddings"
    initialisation: str = "mean"
    has_lora: bool = False
    head_width: int = 0
    joint_head: bool = False


@dataclass(frozen=True)
class Rows:
    """The mask rows of a forward and what they are held against.

    Attributes:
        layout: where they are.
        ids: the data's tokens that they predict, shape [B, M].
        before: the tokens before those, shape [B, M].
        counts: rows that have a target, shape [B, M], bool.
    """

    layout: TrainingLayout
    ids: Tensor
    before: Tensor
    counts: Tensor


class MaskTokenTrainer(nn.Module):
    """Both passes of a training step as one module: the only thing to wrap for distribution.

    Source: prefix-cached form of parallel mask-token training (PaSS arXiv:2311.13581; many anchors per forward as
    in PPD arXiv:2405.18628).
    """

    def __init__(
        self,
        base: nn.Module,
        drafter: Drafter,
        objective: Objective | None = None,
        *,
        keep_ratio: float = 1.0,
        keep_floor: float = 0.0,
    ):
        """Takes the frozen model, with the LoRA injected if the drafter has one.

        Args:
            base: the frozen model.
            drafter: what is learned.
            objective: what for; default KL.
            keep_ratio: of nested token dropping, see `nested_block_lengths`; 1 keeps all mask tokens.
            keep_floor: likewise.

        Raises:
            ValueError: if gradient checkpointing is on, which discards the cache.
            UnsupportedModelError: if its logits are not made of its hidden states alone.
        """
        super().__init__()
        if any(getattr(part, "gradient_checkpointing", False) for part in base.modules()):
            raise ValueError("base: expected gradient checkpointing off, found it on (it discards the cache)")
        self.base = base.eval()
        self.target = TargetModel.wrap(base)  # type: ignore[arg-type]
        self.own_head = OwnHead.of(self.target)
        self.drafter, self.objective = drafter, objective or Objective()
        self.keep = (keep_ratio, keep_floor)
        self.mask_embeddings = None
        if drafter.draft_input == "mask_embeddings":
            rows = 1 if drafter.mask_sharing == "shared" else drafter.num_speculative_tokens
            self.mask_embeddings = nn.Parameter(first_embeddings(self.target, rows, drafter.initialisation))
        self.head, self.tap = None, None
        if drafter.head_width:
            self.tap = HiddenTap(self.target.base)
            hidden_dim = self.tap.output_embeddings.shape[1]
            self.head = SamplerHead(hidden_dim, self.target.embedding_dim, drafter.head_width).to(self.target.device)
        self.most_rows = rows_at_once(self.target.vocab_size, self.target.device)  # of a part of the loss
        self.mask_pass = MaskPass(
            self.own_head, drafter.has_lora, supports(self.own_head, drafter.num_speculative_tokens)
        )
        self.prefix_slices = 1  # forwards that the real tokens are cut into, see `run_prefix`
        self._prefix: Prefix | None = None

    def run_layers_twice(self, share: float) -> None:
        """From now on so large a share of the layers keep no activations of mask rows, and make them again.

        Gradients are the same. Known as activation or gradient checkpointing (arXiv:1604.06174).

        Raises:
            UnsupportedModelError: if the model has no list of its layers.
        """
        layers = spread(decoder_layers(self.target.base, "train.gradient_checkpointing"), share) if share else []
        self.mask_pass.run_twice = layers

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
        max_depth: int | None = None,
        with_metrics: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted loss over the mask rows that have a target.

        Args:
            input_ids: shape [B, T].
            loss_mask: tokens that may be targets, shape [B, T], bool.
            anchors: shape [B, N], in random order where mask tokens are dropped.
            first_anchor: run only a part of the anchors; 0 runs the real tokens too, other parts reuse them.
            num_anchors: anchors of that part; default all.
            max_depth: mask tokens of a block, 1..K; default K. The same for all parts.
            with_metrics: compute the metrics that cost time too.

        Returns:
            loss_sum: scalar, the sum of weighted losses; token_count: scalar, how many rows it is a sum of; metrics:
            shape [7, K], sums per position in the order of `METRICS`.
        """
        short = self.prefix_slices - input_ids.shape[1]
        if short > 0:  # every process of a sharded base runs as many forwards; padding is never learned
            input_ids, loss_mask = (nn.functional.pad(one, (0, short)) for one in (input_ids, loss_mask))
        (_, T), N = input_ids.shape, anchors.shape[1]
        if first_anchor == 0:
            lengths = self._block_lengths(N, num_anchors or N, max_depth or self.drafter.num_speculative_tokens)
            # the one wait for the device, before it has been given anything to do
            on_host = sorted_anchors(anchors.cpu(), lengths)
            cache, hidden = run_prefix(self.own_head, input_ids, self.prefix_slices)
            self._prefix = Prefix(cache, hidden, on_host, lengths)
        prefix = self._prefix
        assert prefix is not None
        part = slice(first_anchor, None if num_anchors is None else first_anchor + num_anchors)
        on_host = training_layout(prefix.anchors[:, part], prefix.lengths[part], T)
        layout = on_host.to(input_ids.device)
        targets = layout.targets.clamp_max(T - 1)
        counts = (layout.targets < T) & loss_mask.gather(1, targets)
        before = input_ids.gather(1, (targets - 1).clamp_min(0))
        rows = Rows(layout, input_ids.gather(1, targets), before, counts)
        # where only the head is trained, and only reads, nothing below it needs a gradient
        with torch.set_grad_enabled(self._needs_gradients and torch.is_grad_enabled()):
            hidden = self.mask_pass.hidden(self._mask_inputs(layout), layout, on_host, prefix.cache)
        loss_of = partial(self._loss_of, rows, prefix.hidden.flatten(0, 1), with_metrics)
        parts = list(parts_of(on_host, self.most_rows, hidden.device))
        with self.own_head.cast_once():
            of_head = [] if self.head is None else list(self.head.parameters())
            loss_sum, metrics = summed_by_parts(loss_of, parts, hidden, of_head)
        return loss_sum, counts.sum(), metrics

    def forget_prefix(self) -> None:
        """Frees what the last call has left for further parts of its anchors."""
        self._prefix = None

    def _loss_of(
        self, rows: Rows, real_hidden: Tensor, with_metrics: bool, part: Part, hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss and metrics of a part; hidden states of all real rows, shape [B T, H], and of its own, shape [R, H]."""
        layout = rows.layout.part(part.sequences, part.blocks)
        ids, before, counts = part.of(rows.ids), part.of(rows.before), part.of(rows.counts)
        K, objective = self.drafter.num_speculative_tokens, self.objective
        with torch.no_grad():
            logits = self.own_head.logits(real_hidden[part.real_rows])
            law = objective.law(logits, with_metrics=with_metrics).at(part.follows)
        metrics, loss_sum = {"rows": counts.float()}, torch.zeros((), device=hidden.device)
        for name, logits in self._draft_logits(hidden, before).items():
            weighted, found = objective.weighted_losses(logits, law, ids, counts, layout, K, with_metrics=with_metrics)
            loss_sum = loss_sum + weighted.sum()
            metrics[f"{name}loss"] = weighted.detach()
            if with_metrics:
                metrics[f"{name}agreement"] = found.agreement(law)
                metrics[f"{name}overlap"] = found.overlap.detach()
        return loss_sum, self._by_position(metrics, counts, layout)

    def _draft_logits(self, hidden: Tensor, before: Tensor) -> dict[str, Tensor]:
        """Logits [R, V] of mask rows alone, and with the head, by the prefix of their metrics' names."""
        if self.head is None or self.tap is None:
            return {"": self.own_head.logits(hidden)}
        with self.tap.attached():
            logits = self.own_head.logits(hidden)
            read = self.tap.hidden[0]
        below = (logits, read) if self.drafter.joint_head else (logits.detach(), read.detach())
        dtype, weight = self.head.outer.weight.dtype, self.tap.output_embeddings
        vectors = self.head(below[1].to(dtype), self.target.embed(before).to(dtype))
        return {"": logits, "head_": below[0] + vectors.to(weight.dtype) @ weight.T}

    @property
    def _needs_gradients(self) -> bool:
        """Whether mask rows need them."""
        below_head = any(p.requires_grad and part_of(n) != "head" for n, p in self.named_parameters())
        return below_head or self.drafter.joint_head

    def _block_lengths(self, num_anchors: int, per_part: int, max_depth: int) -> tuple[int, ...]:
        """Lengths of all blocks: each part of the anchors keeps the same shares."""
        starts = range(0, num_anchors, per_part)
        parts = [nested_block_lengths(min(per_part, num_anchors - first), max_depth, *self.keep) for first in starts]
        return tuple(length for part in parts for length in part)

    def _by_position(self, metrics: dict[str, Tensor], counts: Tensor, layout: TrainingLayout) -> Tensor:
        K, B = self.drafter.num_speculative_tokens, layout.positions.shape[0]
        sums = torch.zeros(len(METRICS), K, device=counts.device)
        depths = layout.depths.repeat(B)
        for name, values in metrics.items():
            sums[METRICS.index(name)].index_add_(0, depths, values * counts)
        return sums

    def _mask_inputs(self, layout: TrainingLayout) -> Tensor:
        """Input embeddings of the mask rows, shape [B, M, D]."""
        (B, M), target = layout.positions.shape, self.target
        if self.mask_embeddings is None:
            return target.embed(torch.randint(target.vocab_size, (B, M), device=layout.positions.device)).detach()
        embeddings = self.mask_embeddings.to(target.dtype).expand(self.drafter.num_speculative_tokens, -1)
        # a tensor of its own: there are models that scale their input embeddings in place
        return embeddings[layout.depths].expand(B, -1, -1).contiguous()


def part_of(name: str) -> str:
    """Which part of what is learned a parameter of the training module belongs to: mask_embeddings, lora or head."""
    if "lora_" in name:
        return "lora"
    return "head" if name.startswith("head.") else "mask_embeddings"
