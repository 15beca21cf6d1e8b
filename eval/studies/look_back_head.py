"""A sampler head that looks back over the text, to be compared with the one that adapters have.

Knows hidden states and embeddings, no base and no cache.
Legend: B texts, Q queries of each, T tokens, H width of a hidden state, D width of an input embedding.

Source: arXiv:2608.27339, whose head attends from (token before, state of the row) to the states of the text.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pardec.adapters.head import SamplerHead


class LookBackHead(nn.Module):
    """A `SamplerHead` and attention over the states of the text's own rows, up to where the block hangs.

    What it reads in the text is added to the correction. It corrects nothing at first: its last layer starts at 0.
    """

    def __init__(self, hidden_dim: int, embedding_dim: int, width: int, num_heads: int = 4):
        """`hidden_dim` is H, `embedding_dim` D; the attention is as wide as a hidden state."""
        super().__init__()
        self.head = SamplerHead(hidden_dim, embedding_dim, width)
        self.num_heads = num_heads
        self.query = nn.Linear(hidden_dim + embedding_dim, hidden_dim, bias=False)
        self.key = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.value = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.output = nn.Linear(hidden_dim, hidden_dim, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(self, hidden: Tensor, previous: Tensor, text: Tensor, visible: Tensor) -> Tensor:
        """Vectors whose products with output embeddings are added to logits, shape [B, Q, H].

        Args:
            hidden: of mask rows, shape [B, Q, H].
            previous: input embeddings of the tokens before those that the rows predict, shape [B, Q, D].
            text: hidden states of the text's rows, shape [B, T, H].
            visible: which of them a mask row may see, shape [B, Q, T], bool.
        """
        of_row, of_token, of_text = (F.rms_norm(x, x.shape[-1:]) for x in (hidden, previous, text))
        asked = self._split(self.query(torch.cat([of_row, of_token], dim=2)))
        keys, values = self._split(self.key(of_text)), self._split(self.value(of_text))
        read = F.scaled_dot_product_attention(asked, keys, values, visible[:, None])
        return self.head(hidden, previous) + self.output(read.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
