"""A sampler head: lets every draft know the token before it, at no second pass over the vocabulary.

Mask rows run side by side, so none of them knows what the one before it will draft, nor the bonus token. The head
looks at a mask row's hidden state and at the token before the one to be drafted, and corrects the row's logits.
Knows hidden states and embeddings, no base and no cache.
Legend: B batch, K num_speculative_tokens, H width of the hidden state, D width of an input embedding, V vocabulary.

Source: Apple's multi-token prediction, arXiv:2507.11851, section 3.3 (sampler head), here as a correction in the space
of the output embeddings that is scored on a shortlist.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pardec.decoding.sampling import TokenLaw

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


def draft_in_turn(
    head: SamplerHead,
    law: TokenLaw,
    logits: Tensor,
    hidden: Tensor,
    bonus: Tensor,
    embed: Callable[[Tensor], Tensor],
    output_embeddings: Tensor,
    shortlist: int,
) -> tuple[Tensor, Tensor | None]:
    """Drafts one after another, each knowing the one before it: tokens, shape [B, K], and their law q, [B, K, V].

    Only the likeliest tokens of each mask row are scored; all others have probability 0 in q, which is what
    verification is told.

    Args:
        head: in the target's dtype.
        law: how tokens are chosen.
        logits: of the K mask rows, shape [B, K, V].
        hidden: what the output head read to make them, shape [B, K, H].
        bonus: the token before the first draft, shape [B].
        embed: input embeddings of token ids.
        output_embeddings: shape [V, H].
        shortlist: tokens that are scored.

    Returns:
        tokens, and q; None instead of q when greedy.
    """
    top = logits.topk(min(shortlist, logits.shape[2]), dim=-1)
    vectors, read = F.embedding(top.indices, output_embeddings), head.read(hidden)
    previous, tokens, laws = bonus, [], []
    for j in range(logits.shape[1]):
        correction = (vectors[:, j] @ head.correct(read[:, j], embed(previous))[:, :, None]).squeeze(2)
        # warpers find on the shortlist what they would find on a row that is -inf everywhere else
        chosen, q = law.draw((top.values[:, j] + correction)[:, None])
        previous = top.indices[:, j].gather(1, chosen).squeeze(1)
        tokens.append(previous)
        if q is not None:
            laws.append(q)
    drafts = torch.stack(tokens, dim=1)
    if not laws:
        return drafts, None
    everywhere = torch.zeros_like(logits, dtype=torch.float32)
    return drafts, everywhere.scatter_(2, top.indices, torch.cat(laws, dim=1))
