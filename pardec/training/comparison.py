"""What one sweep over the vocabulary says of the target's law, and one of a draft's beside it.

Losses, the weights that follow acceptance and the metrics are made of these few numbers of every row, so that nothing
else looks at the vocabulary. A sweep takes some rows at a time, which stay in a CPU's cache from its first operation to
its last. Of rows x vocabulary one tensor is kept for the gradient, the draft's own law. Knows no model, no blocks and
no names of objectives.
Legend: M mask rows, U target rows, V vocabulary; p is the target's law, q the draft's.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# rows x vocabulary of a sweep on a CPU, 256 KiB in float32, but no single rows; a device takes all that it is given
_ENTRIES_ON_CPU, _LEAST_ROWS = 2**16, 2


@dataclass(frozen=True)
class TargetLaw:
    """The law that drafts follow, at some rows; without gradient.

    Attributes:
        table: p of the target's rows, shape [U, V], float32.
        entropy: in nats, shape [M].
        likeliest: token ids, shape [M]; None where nobody asked.
        rows: which of the table's each row is, shape [M]; None for all of them in order.
    """

    table: Tensor
    entropy: Tensor
    likeliest: Tensor | None
    rows: Tensor | None = None

    @property
    def probs(self) -> Tensor:
        """p, shape [M, V]."""
        return self.table if self.rows is None else self.table[self.rows]

    def at(self, rows: Tensor) -> "TargetLaw":
        """That of rows, shape [n], which may name one several times."""
        likeliest = None if self.likeliest is None else self.likeliest[rows]
        mine = rows if self.rows is None else self.rows[rows]
        if self.table.device.type != "cpu":  # whose sweeps take all rows, so that the table need not stay beside them
            return TargetLaw(self.table[mine], self.entropy[rows], likeliest)
        return replace(self, entropy=self.entropy[rows], likeliest=likeliest, rows=mine)

    def prob_of(self, ids: Tensor) -> Tensor:
        """p of one token of each row, shape [M] as `ids`."""
        return self.table.gather(1, ids[:, None])[:, 0] if self.rows is None else self.table[self.rows, ids]


@torch.no_grad()
def target_law(
    target_logits: Tensor, temperature: float = 1.0, top_k: int | None = None, *, with_likeliest: bool = True
) -> TargetLaw:
    """The law of the logits.

    Args:
        target_logits: shape [M, V].
        temperature: of the law; drafts are to be compared at the same.
        top_k: only so many of the likeliest tokens keep their probability; None for all.
        with_likeliest: find the likeliest tokens, which takes as long as the rest.
    """
    probs = torch.empty_like(target_logits, dtype=torch.float32)
    entropy = probs.new_empty(len(probs))
    likeliest = torch.empty_like(entropy, dtype=torch.long) if with_likeliest else None
    for rows in _sweeps(probs):
        scores, cut = _scores(target_logits[rows], temperature), None
        if top_k is not None and top_k < scores.shape[-1]:
            cut = scores < scores.topk(top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(cut, float("-inf"))
        total = _softmax_into(probs[rows], scores)
        if likeliest is not None:
            likeliest[rows] = scores.argmax(dim=-1)
        if cut is not None:
            scores = scores.masked_fill(cut, 0.0)
        entropy[rows] = total - torch.linalg.vecdot(probs[rows], scores)
    return TargetLaw(probs, entropy, likeliest)


@dataclass(frozen=True)
class Comparison:
    """Draft beside target at every row, each of shape [M] and float32; all but `likeliest` differentiable.

    Attributes:
        kl: KL(p || q).
        overlap: sum min(p, q), the probability that a draft from q is accepted, 1 - TV(p, q) (arXiv:2211.17192,
            Theorem 3.5).
        log_likelihood: log q of one token of each row.
        likeliest: the draft's likeliest tokens, int64; None where nobody asked.
    """

    kl: Tensor
    overlap: Tensor
    log_likelihood: Tensor
    likeliest: Tensor | None

    def agreement(self, law: TargetLaw) -> Tensor:
        """1 where target and draft hold the same token likeliest, else 0, shape [M], float32; both must be known."""
        assert self.likeliest is not None
        assert law.likeliest is not None
        return (self.likeliest == law.likeliest).float()


def compare(
    logits: Tensor, law: TargetLaw, ids: Tensor, temperature: float = 1.0, *, with_likeliest: bool = True
) -> Comparison:
    """Compares draft laws with those of the target; gradients go to the logits alone.

    Args:
        logits: of the draft, shape [M, V], in any dtype, in which their gradient is returned.
        law: p.
        ids: one token of each row, shape [M].
        temperature: q is the softmax of logits / temperature.
        with_likeliest: find the draft's likeliest tokens.
    """
    cross, overlap, log_likelihood = _Compare.apply(logits, law.table, law.rows, ids, temperature)  # type: ignore[misc]
    # dividing by a temperature keeps the order; but logits that it makes equal are a tie only behind it
    likeliest = _scores(logits.detach(), temperature).argmax(dim=-1) if with_likeliest else None
    return Comparison(cross - law.entropy, overlap, log_likelihood, likeliest)


class _Compare(torch.autograd.Function):
    """Cross-entropy of p and q, sum min(p, q), and log q of a token."""

    @staticmethod
    def forward(ctx, logits: Tensor, table: Tensor, which: Tensor | None, ids: Tensor, temperature: float):  # type: ignore[override]
        q = torch.empty_like(logits, dtype=torch.float32)
        cross, overlap, log_likelihood = q.new_empty(3, len(q))
        for rows in _sweeps(q):
            scores, p = _scores(logits[rows], temperature), _rows_of(table, which, rows)
            total = _softmax_into(q[rows], scores)
            cross[rows] = total - torch.linalg.vecdot(p, scores)
            log_likelihood[rows] = scores.gather(1, ids[rows, None])[:, 0] - total
            overlap[rows] = torch.minimum(p, q[rows]).sum(dim=-1)
        ctx.save_for_backward(q, table, which, ids)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.set_materialize_grads(False)
        return cross, overlap, log_likelihood

    @staticmethod
    @once_differentiable
    def backward(ctx, of_cross, of_overlap, of_likelihood):  # type: ignore[override]
        q, table, which, ids = ctx.saved_tensors
        if of_cross is None and of_overlap is None and of_likelihood is None:
            return None, None, None, None, None
        gradient = torch.empty_like(q, dtype=ctx.dtype)
        for rows in _sweeps(q):
            slopes = [None if slope is None else slope[rows, None] for slope in (of_cross, of_overlap, of_likelihood)]
            found = _gradient(q[rows], _rows_of(table, which, rows), ids[rows, None], *slopes)
            gradient[rows] = found if ctx.temperature == 1 else found.div_(ctx.temperature)
        return gradient, None, None, None, None


def _gradient(
    q: Tensor, p: Tensor, ids: Tensor, of_cross: Tensor | None, of_overlap: Tensor | None, of_likelihood: Tensor | None
) -> Tensor:
    """Of scores, shape [n, V]; `ids` and slopes have shape [n, 1]."""
    of_q, below = 0.0, None  # every slope has a multiple of q in it
    if of_overlap is not None:
        # only where q is the smaller one does the sum grow with it
        below = q * (q < p)
        of_q = of_q - of_overlap * below.sum(dim=-1, keepdim=True)
    if of_cross is not None:
        of_q = of_q + of_cross
    if of_likelihood is not None:
        of_q = of_q - of_likelihood
    found = q * of_q
    if below is not None and of_overlap is not None:
        found += below.mul_(of_overlap)
    if of_cross is not None:
        found.addcmul_(p, of_cross, value=-1)
    if of_likelihood is not None:
        found.scatter_add_(1, ids, of_likelihood)
    return found


def _sweeps(like: Tensor) -> Iterator[slice]:
    """Rows of a tensor of shape [M, V], some at a time."""
    num_rows, V = like.shape
    at_once = max(_LEAST_ROWS, _ENTRIES_ON_CPU // V if like.device.type == "cpu" else num_rows)
    for first in range(0, num_rows, at_once):
        yield slice(first, first + at_once)


def _scores(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1 else logits.float() / temperature


def _softmax_into(probs: Tensor, scores: Tensor) -> Tensor:
    """Writes the softmax of scores, shape [n, V]; returns the log of the sum of their exponentials, shape [n]."""
    torch.softmax(scores, dim=-1, out=probs)
    # from the likeliest token's own probability, which is never 0
    return scores.amax(dim=-1) - probs.amax(dim=-1).log()


def _rows_of(table: Tensor, which: Tensor | None, rows: slice) -> Tensor:
    return table[rows] if which is None else table[which[rows]]
