"""A sampler head: lets every draft know the token before it, at no second pass over the vocabulary.

Mask rows run side by side, so none of them knows what the one before it will draft, nor the bonus token. The head
looks at a mask row's hidden state and at the token before the one to be drafted, and corrects the row's logits.
Knows hidden states and embeddings, no base and no cache.
Legend: H width of the hidden state, D width of an input embedding.

Source: Apple's multi-token prediction, arXiv:2507.11851, section 3.3 (sampler head), here as a correction in the space
of the output embeddings that is scored on a shortlist.
"""

import torch.nn.functional as F
from torch import Tensor, nn

_EPSILON = 1e-12  # one for all dtypes; an embedding of zeros stays 0


class SamplerHead(nn.Module):
    """Two layers from (hidden state, embedding of the token before) to a correction in the output embeddings' space.

    A new head corrects nothing: its second layer starts at 0.
    """

    def __init__(self, hidden_dim: int, embedding_dim: int, width: int):
        """`hidden_dim` is H, `embedding_dim` D."""
        super().__init__()
        self.hidden_dim = hidden_dim
        self.inner = nn.Linear(hidden_dim + embedding_dim, width)
        self.outer = nn.Linear(width, hidden_dim, bias=False)
        nn.init.zeros_(self.outer.weight)

    def forward(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """Vectors whose products with output embeddings are added to logits, shape [..., H].

        Args:
            hidden: of mask rows, as the output head reads them, shape [..., H].
            previous: input embeddings of the tokens before those that the rows predict, shape [..., D].
        """
        return self.correct(self.read(hidden), previous)

    def read(self, hidden: Tensor) -> Tensor:
        """The part of the first layer that needs no token, so that it is made for all rows at once: [..., width]."""
        return F.linear(_unit(hidden), self.inner.weight[:, : self.hidden_dim], self.inner.bias)

    def correct(self, read: Tensor, previous: Tensor) -> Tensor:
        """What `forward` returns, from what `read` does."""
        return self.outer(F.silu(read + F.linear(_unit(previous), self.inner.weight[:, self.hidden_dim :])))


def _unit(x: Tensor) -> Tensor:
    """Root mean square 1: models differ widely in the scale of hidden states and of embeddings."""
    return F.rms_norm(x, x.shape[-1:], eps=_EPSILON)
