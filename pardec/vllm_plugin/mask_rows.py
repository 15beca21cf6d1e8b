"""Mask tokens in a flat batch of rows: which rows hold one, how deep in its block each is, and what stands there.

Knows torch alone. Legend: N rows of a forward, all sequences behind each other, K mask tokens, D width of an embedding.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class MaskRows(nn.Module):
    """Puts mask embeddings where the mask token's id stands, and remembers where that was."""

    embeddings: Tensor
    gate: Tensor

    def __init__(self, embeddings: Tensor, *, mask_id: int, max_rows: int):
        """Makes them.

        Args:
            embeddings: of the mask tokens by depth, shape [K, D], in the dtype and on the device of the forward.
            mask_id: the id that vLLM puts at rows to be drafted; need not be of the vocabulary.
            max_rows: most rows of a forward.
        """
        super().__init__()
        self.mask_id = mask_id
        self.register_buffer("embeddings", embeddings, persistent=False)
        # written in place, as captured graphs read it where it is
        self.register_buffer("gate", embeddings.new_zeros(max_rows, 1), persistent=False)

    def embed(self, input_ids: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Input embeddings of a forward, shape [N, D]; `gate[:N]` is 1 at its mask rows from then on, 0 elsewhere.

        Args:
            input_ids: shape [N].
            embed: input embeddings of token ids of the vocabulary.
        """
        is_mask = input_ids == self.mask_id
        self.gate[: len(input_ids), 0] = is_mask
        rows = torch.arange(len(input_ids), device=input_ids.device)
        anchors = torch.where(is_mask, -1, rows).cummax(dim=0).values  # the last real row up to each
        depth = (rows - anchors - 1).clamp(0, len(self.embeddings) - 1)
        real = embed(input_ids.masked_fill(is_mask, 0))
        return torch.where(is_mask[:, None], self.embeddings[depth], real)
