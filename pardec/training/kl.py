"""KL(p || q) of draft logits, and how likely their drafts are accepted, in one sweep over the vocabulary.

A few rows at a time, so that what a row needs stays in the processor's cache and nothing of the size of the logits is
kept but the logits themselves and their gradient.
Legend: M mask rows, V vocabulary; p is the target's law, q the draft's.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# of logits at a time: 1 MiB in float32 on a CPU; a device starts many at once
_ENTRIES_ON_CPU, _ENTRIES = 2**18, 2**27


def kl_and_acceptance(logits: Tensor, p: Tensor, entropy: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """KL(p || q) of every row, and the probability sum min(p, q) that a draft from q is accepted; float32, each [M].

    The gradient of the first goes to the logits alone; the second has none.

    Args:
        logits: of the draft, shape [M, V], in any dtype, in which their gradient is returned.
        p: the law to follow, shape [M, V], float32, without gradient.
        entropy: of p, shape [M], see `entropies`.
        temperature: q is the softmax of logits / temperature.
    """
    loss, accepted = _KL.apply(logits, p, temperature)  # type: ignore[misc]
    return loss - entropy, accepted


@torch.no_grad()
def entropies(p: Tensor) -> Tensor:
    """Entropy of laws, shape [...] for p of shape [..., V], in nats."""
    rows = p.flatten(0, -2)
    parts = [torch.special.entr(part).sum(dim=-1) for part in rows.split(_rows_at_once(rows))]
    return torch.cat(parts).view(p.shape[:-1]) if parts else p.new_zeros(p.shape[:-1])


class _KL(torch.autograd.Function):
    """Cross-entropy of p and q, which is KL(p || q) but for a constant, and sum min(p, q)."""

    @staticmethod
    def forward(ctx, logits: Tensor, p: Tensor, temperature: float):  # type: ignore[override]
        cross, accepted, normaliser = p.new_empty(3, len(p)).unbind()
        for part, scores in sweep(logits, temperature):
            total = torch.logsumexp(scores, dim=-1)
            normaliser[part] = total
            cross[part] = total - torch.linalg.vecdot(p[part], scores)
            q = scores.sub_(total[:, None]).exp_()
            accepted[part] = torch.minimum(p[part], q).sum(dim=-1)
        ctx.save_for_backward(logits, p, normaliser)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(accepted)
        return cross, accepted

    @staticmethod
    @once_differentiable
    def backward(ctx, slopes: Tensor, _):  # type: ignore[override]
        logits, p, normaliser = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        slopes = (slopes / ctx.temperature)[:, None]
        for part, scores in sweep(logits, ctx.temperature):
            q = scores.sub_(normaliser[part, None]).exp_()
            gradient[part] = q.sub_(p[part]).mul_(slopes[part])
        return gradient, None, None


def sweep(logits: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """A few rows at a time: which, and their logits / temperature in float32, a tensor that may be written to."""
    step = _rows_at_once(logits)
    for first in range(0, len(logits), step):
        part = slice(first, first + step)
        scores = logits[part].to(torch.float32, copy=True)
        yield part, scores if temperature == 1 else scores.div_(temperature)


def _rows_at_once(rows: Tensor) -> int:
    entries = _ENTRIES_ON_CPU if rows.device.type == "cpu" else _ENTRIES
    return max(1, entries // rows.shape[-1])
