"""How likely drafts are accepted, with its gradient, and how likely they are the data's tokens, in one sweep.

What the objectives stand on that aim at acceptance itself. Knows no blocks and no weights.
Legend: M mask rows, V vocabulary; p is the target's law, q the draft's.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pardec.training.kl import sweep


def overlap_and_likelihood(logits: Tensor, p: Tensor, ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The probability sum min(p, q) that a draft from q is accepted, and log q of a token; float32, each [M].

    That sum is 1 - TV(p, q) (arXiv:2211.17192, Theorem 3.5). Gradients of both go to the logits alone.

    Args:
        logits: of the draft, shape [M, V], in any dtype, in which their gradient is returned.
        p: the law to follow, shape [M, V], float32, without gradient.
        ids: one token of each row, shape [M].
        temperature: q is the softmax of logits / temperature.
    """
    return _Overlap.apply(logits, p, ids, temperature)  # type: ignore[return-value]


class _Overlap(torch.autograd.Function):
    """Both numbers of every row, and their gradients."""

    @staticmethod
    def forward(ctx, logits: Tensor, p: Tensor, ids: Tensor, temperature: float):  # type: ignore[override]
        overlap, likelihood, normaliser = p.new_empty(3, len(p)).unbind()
        for part, scores in sweep(logits, temperature):
            total = torch.logsumexp(scores, dim=-1)
            normaliser[part] = total
            likelihood[part] = scores.gather(1, ids[part, None])[:, 0] - total
            q = scores.sub_(total[:, None]).exp_()
            overlap[part] = torch.minimum(p[part], q).sum(dim=-1)
        ctx.save_for_backward(logits, p, ids, normaliser)
        ctx.temperature = temperature
        return overlap, likelihood

    @staticmethod
    @once_differentiable
    def backward(ctx, overlap_slopes: Tensor, likelihood_slopes: Tensor):  # type: ignore[override]
        logits, p, ids, normaliser = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        overlap_slopes = (overlap_slopes / ctx.temperature)[:, None]
        likelihood_slopes = (likelihood_slopes / ctx.temperature)[:, None]
        for part, scores in sweep(logits, ctx.temperature):
            q = scores.sub_(normaliser[part, None]).exp_()
            # only where q is the smaller one does the sum grow with it
            below = torch.where(q < p[part], q, 0.0)
            mass = below.sum(dim=-1, keepdim=True)
            slopes = below.mul_(overlap_slopes[part])
            slopes -= q.mul_(mass * overlap_slopes[part] + likelihood_slopes[part])
            gradient[part] = slopes.scatter_add_(1, ids[part, None], likelihood_slopes[part])
        return gradient, None, None, None
