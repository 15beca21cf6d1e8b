"""What one pass over the vocabulary says of the target's law, and one of a draft's beside it.

Losses, the weights that follow acceptance and the metrics are made of these few numbers of every row, so that no other
pass is needed. Of rows x vocabulary one tensor is kept for the gradient, the draft's own law: rows come a few at a time
(`parts`). Knows no model, no blocks and no names of objectives.
Legend: M mask rows, V vocabulary; p is the target's law, q the draft's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class TargetLaw:
    """The law that drafts follow, at some rows; without gradient.

    Attributes:
        probs: p, shape [M, V], float32.
        entropy: in nats, shape [M].
        likeliest: token ids, shape [M].
    """

    probs: Tensor
    entropy: Tensor
    likeliest: Tensor

    def at(self, rows: Tensor) -> "TargetLaw":
        """That of rows, shape [n], which may name one several times."""
        return TargetLaw(self.probs[rows], self.entropy[rows], self.likeliest[rows])


@torch.no_grad()
def target_law(target_logits: Tensor, temperature: float = 1.0, top_k: int | None = None) -> TargetLaw:
    """The law of the logits.

    Args:
        target_logits: shape [M, V].
        temperature: of the law; drafts are to be compared at the same.
        top_k: only so many of the likeliest tokens keep their probability; None for all.
    """
    scores = target_logits.float()
    scores = scores if temperature == 1 else scores / temperature
    cut = None
    if top_k is not None and top_k < scores.shape[-1]:
        cut = scores < scores.topk(top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(cut, float("-inf"))
    probs = scores.softmax(dim=-1)
    highest, likeliest = scores.max(dim=-1)
    # log of the sum, from the likeliest token's own probability, which is never 0
    total = highest - probs.gather(-1, likeliest[..., None])[..., 0].log()
    if cut is not None:
        scores = scores.masked_fill(cut, 0.0)
    return TargetLaw(probs, total - torch.linalg.vecdot(probs, scores), likeliest)


@dataclass(frozen=True)
class Comparison:
    """Draft beside target at every row, each of shape [M] and float32; all but `likeliest` differentiable.

    Attributes:
        kl: KL(p || q).
        overlap: sum min(p, q), the probability that a draft from q is accepted, 1 - TV(p, q) (arXiv:2211.17192,
            Theorem 3.5).
        log_likelihood: log q of one token of each row.
        likeliest: the draft's likeliest tokens, int64.
    """

    kl: Tensor
    overlap: Tensor
    log_likelihood: Tensor
    likeliest: Tensor


def compare(logits: Tensor, law: TargetLaw, ids: Tensor, temperature: float = 1.0) -> Comparison:
    """Compares draft laws with those of the target; gradients go to the logits alone.

    Args:
        logits: of the draft, shape [M, V], in any dtype, in which their gradient is returned.
        law: p.
        ids: one token of each row, shape [M].
        temperature: q is the softmax of logits / temperature.
    """
    cross, overlap, log_likelihood, likeliest = _Compare.apply(logits, law.probs, ids, temperature)  # type: ignore[misc]
    return Comparison(cross - law.entropy, overlap, log_likelihood, likeliest)


class _Compare(torch.autograd.Function):
    """Cross-entropy of p and q, sum min(p, q), log q of a token, and the draft's likeliest token."""

    @staticmethod
    def forward(ctx, logits: Tensor, p: Tensor, ids: Tensor, temperature: float):  # type: ignore[override]
        scores = logits.float() if temperature == 1 else logits.float() / temperature
        q = scores.softmax(dim=-1)
        highest, likeliest = scores.max(dim=-1)
        total = highest - q.gather(1, likeliest[:, None])[:, 0].log()
        cross = total - torch.linalg.vecdot(p, scores)
        log_likelihood = scores.gather(1, ids[:, None])[:, 0] - total
        overlap = torch.minimum(p, q).sum(dim=-1)
        ctx.save_for_backward(q, p, ids)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.mark_non_differentiable(likeliest)
        ctx.set_materialize_grads(False)
        return cross, overlap, log_likelihood, likeliest

    @staticmethod
    @once_differentiable
    def backward(ctx, of_cross, of_overlap, of_likelihood, _):  # type: ignore[override]
        q, p, ids = ctx.saved_tensors
        of_q, below = 0.0, None  # every slope has a multiple of q in it
        if of_overlap is not None:
            # only where q is the smaller one does the sum grow with it
            below = torch.where(q < p, q, 0.0)
            of_q = of_q - of_overlap * below.sum(dim=-1)
        if of_cross is not None:
            of_q = of_q + of_cross
        if of_likelihood is not None:
            of_q = of_q - of_likelihood
        if not isinstance(of_q, Tensor):
            return None, None, None, None
        gradient = q * of_q[:, None]
        if below is not None and of_overlap is not None:
            gradient += below.mul_(of_overlap[:, None])
        if of_cross is not None:
            gradient.addcmul_(p, of_cross[:, None], value=-1)
        if of_likelihood is not None:
            gradient.scatter_add_(1, ids[:, None], of_likelihood[:, None])
        if ctx.temperature != 1:
            gradient /= ctx.temperature
        return gradient.to(ctx.dtype), None, None, None
