"""A sampler head at work on one model: its weights there, what it reads, and what it scores.

Knows no layout, no cache and no verification. Legend: B batch, K num_speculative_tokens, V vocabulary,
H width of the hidden state, D width of an input embedding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pardec.adapters.adapter import Adapter, AdapterError
from pardec.adapters.head import SamplerHead, draft_in_turn
from pardec.decoding.sampling import TokenLaw
from pardec.target.forward import TargetModel
from pardec.target.hidden import HiddenTap


@dataclass(frozen=True)
class HeadDrafter:
    """Drafts with a sampler head.

    Attributes:
        target: the frozen model.
        head: in the target's dtype and on its device.
        tap: what the target's output head reads; attached while forwards run.
        shortlist: tokens of each mask row that are scored.
    """

    target: TargetModel
    head: SamplerHead
    tap: HiddenTap
    shortlist: int

    @classmethod
    def of(cls, adapter: Adapter, target: TargetModel) -> "HeadDrafter | None":
        """The drafter of an adapter; None if it has no head.

        Raises:
            AdapterError: if the head is for hidden states or embeddings of other widths.
            ValueError: if the target has no output head with a weight matrix.
        """
        if adapter.head is None or adapter.metadata.head is None:
            return None
        tap = HiddenTap(target.base)
        D, H = target.embedding_dim, tap.output_embeddings.shape[1]
        found_h = adapter.head["outer.weight"].shape[0]
        found_d = adapter.head["inner.weight"].shape[1] - found_h
        if (found_h, found_d) != (H, D):
            raise AdapterError(
                f"head: expected hidden states of width {H} and embeddings of width {D}, found {found_h} and {found_d}"
            )
        with torch.device("meta"):  # draws no first numbers, which would be taken from whoever trains meanwhile
            head = SamplerHead(H, D, adapter.metadata.head.width)
        head.load_state_dict(adapter.head, assign=True)
        head = head.to(target.device, target.dtype).eval().requires_grad_(False)
        return cls(target, head, tap, adapter.metadata.head.shortlist)

    def draft(self, law: TokenLaw, logits: Tensor, hidden: Tensor, previous: Tensor) -> tuple[Tensor, Tensor | None]:
        """Drafts from a block's rows and their law q; see `draft_in_turn`.

        Args:
            law: how tokens are chosen.
            logits: shape [B, K, V].
            hidden: shape [B, K, H].
            previous: the token before the first draft, shape [B].
        """
        return draft_in_turn(
            self.head, law, logits, hidden, previous, self.target.embed, self.tap.output_embeddings, self.shortlist
        )
