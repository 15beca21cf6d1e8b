"""Verification: how many drafted tokens stand, and which token follows them.

Knows probabilities and token ids, no model, no tokenizer, no cache.
Legend: B batch, K num_speculative_tokens, V vocabulary; p is the target's law, q the draft's, r the reach of a draft.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Verification = Literal["token", "block"]
VERIFICATIONS: tuple[Verification, ...] = get_args(Verification)

_BLOCK = 256  # probabilities that are summed up first where one of many is drawn


@dataclass(frozen=True)
class Verdict:
    """Outcome of verifying one draft per row.

    Attributes:
        tokens: shape [B, K + 1], valid up to and including index `num_accepted` (the bonus token).
        num_accepted: accepted drafts, without the bonus token, shape [B], in 0..draft_length.
    """

    tokens: Tensor
    num_accepted: Tensor


def verify_greedy(target_tokens: Tensor, draft_tokens: Tensor, draft_length: Tensor) -> Verdict:
    """Accept the drafts that are the target's own choice, up to the first that is not.

    Args:
        target_tokens: the target's choice after each real row, shape [B, K + 1], int64: its argmax, or, where the
            drafts are copied tokens, a draw.
        draft_tokens: drafted token ids, shape [B, K], int64.
        draft_length: drafts that exist in each row, shape [B], in 0..K; what stands behind is ignored.

    Raises:
        ValueError: if shapes disagree.
    """
    K = draft_tokens.shape[1]
    _check_shapes(draft_tokens, draft_length, target_tokens=(target_tokens, K + 1))
    if K == 0:
        return Verdict(target_tokens, torch.zeros_like(draft_length))
    accepted = (target_tokens[:, :K] == draft_tokens) & _exists(draft_length, K)
    # accepted drafts equal the target's tokens, so the target's tokens are what is emitted
    return Verdict(target_tokens, accepted.cumprod(dim=1).sum(dim=1))


def verify_copies(verdict: Verdict, target_tokens: Tensor, candidates: Tensor, length: Tensor) -> Verdict:
    """Goes on where a line of candidates begins with what stands, for as long as the target's own tokens are the next.

    A copy is a draft whose law is a point mass: min(1, p/q) is p of it, and the residual p without it. Both are had by
    drawing from p and accepting the copy where it was drawn. What is drawn behind a candidate is looked at only where
    the drafts, with their bonus token, led there and no further: so each token is one fresh draw from its own law,
    whether these drafts are how the line begins or stand beside it, as the nodes of a tree do.

    Args:
        verdict: of the K drafts, whose bonus token is a draw from p wherever the line may be followed.
        target_tokens: drawn from p behind each candidate, shape [B, W].
        candidates: a line of tokens from the first draft's place on, drafts and then copies, or copies alone, shape
            [B, W].
        length: candidates that exist, 0 where the line must not be followed, shape [B].

    Returns:
        tokens of shape [B, max(K, W) + 1]; accepted drafts, or all of the line that stands if that is more.
    """
    W, K = candidates.shape[1], verdict.tokens.shape[1] - 1
    width = max(K, W)
    index = torch.arange(width + 1, device=candidates.device)
    drafted = F.pad(verdict.tokens, (0, width - K)) if W > K else verdict.tokens
    drawn = F.pad(target_tokens, (1, width - W))
    tokens = torch.where(index <= verdict.num_accepted[:, None], drafted, drawn)
    stands = (tokens[:, :W] == candidates) & (index[:W] < length[:, None])
    return Verdict(tokens, torch.maximum(verdict.num_accepted, stands.cumprod(dim=1).sum(dim=1)))


def accept_probability(target_probs: Tensor, draft_probs: Tensor, draft_tokens: Tensor) -> Tensor:
    """min(1, p/q) of each draft once those before it are accepted, shape [B, K].

    Args:
        target_probs: p of the rows that verify them, shape [B, K, V].
        draft_probs: q, shape [B, K, V].
        draft_tokens: shape [B, K], int64.

    Source: Leviathan et al. 2023, arXiv:2211.17192, Algorithm 1; Chen et al. 2023, arXiv:2302.01318, Theorem 1.
    """
    return _ratio(target_probs, draft_probs, draft_tokens).clamp_max(1.0)


def block_accept_probability(
    target_probs: Tensor, draft_probs: Tensor, draft_tokens: Tensor, draft_length: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What block verification accepts by: with all drafts of a row judged together, more of them stand.

    With r_0 = 1, r_i = min(1, r_{i-1} p(d_i) / q(d_i)) and Z_i = sum max(0, r_i p - q) over the vocabulary behind
    draft i, h_i = Z_i / (Z_i + 1 - r_i), and h = r at the last draft. Each draft is held against h_i by itself, and
    those up to the last one that passes are accepted: i drafts or more with probability r_i.

    Args:
        target_probs: p, shape [B, K + 1, V].
        draft_probs: q, shape [B, K, V].
        draft_tokens: shape [B, K], int64.
        draft_length: shape [B].

    Returns:
        accept: h, shape [B, K], 0 behind the last draft; reach: r, shape [B, K + 1], of dead drafts anything; length:
        drafts that can be judged, shape [B]: fewer than `draft_length` where some q are NaN.

    Source: Sun et al. 2024, arXiv:2403.10444, Algorithm 2, with its p and q in our letters.
    """
    K = draft_tokens.shape[1]
    index = torch.arange(1, K + 1, device=draft_tokens.device)
    ratio = _ratio(target_probs[:, :K], draft_probs, draft_tokens)
    reached = [torch.ones_like(ratio[:, 0])]
    for i in range(K):
        reached.append((reached[-1] * ratio[:, i]).clamp_max(1.0))
    reach = torch.stack(reached, dim=1)
    # a draft of NaN, from numbers that overflow, is none; r stays NaN behind it
    length = (_exists(draft_length, K) & ~reach[:, 1:].isnan()).sum(dim=1)
    inner = reach[:, 1:K]
    total = (inner[:, :, None] * target_probs[:, 1:K] - draft_probs[:, 1:]).clamp_min_(0).sum(dim=2)
    denominator = total + (1 - inner)
    # 0 / 0 where r = 1 and p = q: nothing could go wrong behind that draft
    accept = torch.where(denominator > 0, total / denominator, 1.0)
    accept = torch.where(index == length[:, None], reach[:, 1:], torch.cat([accept, reach[:, K:]], dim=1))
    return torch.where(index <= length[:, None], accept, 0.0), reach, length


def _ratio(target_probs: Tensor, draft_probs: Tensor, draft_tokens: Tensor) -> Tensor:
    """p / q of each draft, shape [B, K]."""
    p = target_probs.gather(2, draft_tokens[:, :, None]).squeeze(2)
    q = draft_probs.gather(2, draft_tokens[:, :, None]).squeeze(2)
    return p / q.clamp_min(torch.finfo(q.dtype).tiny)


def bonus_law(target_probs: Tensor, draft_probs: Tensor, rejected: Tensor, reach: Tensor | float = 1.0) -> Tensor:
    """Law of the bonus token: norm(max(0, r p - q)) where a draft was rejected, p elsewhere.

    Where the residual sums to 0 (p = q, so only rounding rejects), it is p as well.

    Args:
        target_probs: p, shape [..., V].
        draft_probs: q of the draft in that place, same shape.
        rejected: shape [...].
        reach: r of the drafts before, shape [..., 1], under block verification; 1 where drafts are judged one by one.
    """
    residual = (reach * target_probs - draft_probs).clamp_min_(0)
    total = residual.sum(dim=-1, keepdim=True)
    from_residual = rejected[..., None] & (total > 0)
    tiny = torch.finfo(target_probs.dtype).tiny
    return torch.where(from_residual, residual / total.clamp_min(tiny), target_probs)


def verify_sample(
    target_probs: Tensor,
    draft_probs: Tensor,
    draft_tokens: Tensor,
    draft_length: Tensor,
    *,
    verification: Verification = "token",
    generator: Generator | None = None,
) -> Verdict:
    """Accept a prefix of each row's drafts so that the emitted tokens follow the target's law exactly.

    Args:
        target_probs: p after the warpers, shape [B, K + 1, V], float32, rows sum to 1; row k conditions on the
            drafts before k.
        draft_probs: q the drafts were drawn from, shape [B, K, V], float32.
        draft_tokens: drafted token ids, shape [B, K], int64.
        draft_length: drafts that exist in each row, shape [B], in 0..K; what stands behind is ignored. It may
            depend on q and on earlier drafts, never on the value of a draft that it drops.
        verification: `token` judges drafts one by one up to the first that falls; `block` judges them together, see
            `block_accept_probability`. The law is the same.
        generator: source of randomness, on the same device; None for torch's global one.

    Raises:
        ValueError: if shapes disagree (names both) or probabilities are not float32.

    Source: Leviathan et al. 2023, arXiv:2211.17192, Algorithm 1, same letters; Sun et al. 2024, arXiv:2403.10444.
    """
    K = draft_tokens.shape[1]
    _check_probs(target_probs, draft_probs, draft_tokens, draft_length)
    if K == 0:
        bonus = sample_from(target_probs, generator)
        return Verdict(bonus, draft_length.new_zeros(draft_length.shape))
    u = torch.rand(draft_tokens.shape, device=draft_tokens.device, generator=generator)
    if verification == "block":
        accept, reach, draft_length = block_accept_probability(target_probs, draft_probs, draft_tokens, draft_length)
        # up to the last that passes, whatever has failed before it
        num_accepted = ((u < accept) * torch.arange(1, K + 1, device=u.device)).amax(dim=1)
        before = reach.gather(1, num_accepted[:, None])
    else:
        accept = accept_probability(target_probs[:, :K], draft_probs, draft_tokens) * _exists(draft_length, K)
        num_accepted, before = (u < accept).cumprod(dim=1).sum(dim=1), 1.0
    # only the law at the end of the accepted run is needed
    p = _row(target_probs, num_accepted)
    q = _row(draft_probs, num_accepted.clamp_max(K - 1))
    bonus = sample_from(bonus_law(p, q, num_accepted < draft_length, before), generator)
    tokens = torch.cat([draft_tokens, draft_tokens.new_zeros(draft_tokens.shape[0], 1)], dim=1)
    return Verdict(tokens.scatter(1, num_accepted[:, None], bonus[:, None]), num_accepted)


def _row(probs: Tensor, index: Tensor) -> Tensor:
    """probs[b, index[b]], shape [B, V]."""
    return probs.gather(1, index[:, None, None].expand(-1, -1, probs.shape[2])).squeeze(1)


def sample_from(probs: Tensor, generator: Generator | None = None) -> Tensor:
    """One index per row of `probs`, shape [..., V], drawn from it without a device-to-host synchronisation."""
    return _by_inversion(probs, generator) if probs.device.type == "cpu" else _by_race(probs, generator)


def _by_race(probs: Tensor, generator: Generator | None) -> Tensor:
    """Exponential races: argmax p_i / e_i with e_i ~ Exp(1) is distributed as p. V random numbers, all in parallel."""
    race = torch.empty_like(probs).exponential_(generator=generator)
    # an exact 0 would turn 0 / 0 into NaN, which argmax prefers
    return (probs / race.clamp_min_(torch.finfo(probs.dtype).tiny)).argmax(dim=-1)


def _by_inversion(probs: Tensor, generator: Generator | None) -> Tensor:
    """The first index whose cumulative probability exceeds a uniform number.

    One random number, where a CPU draws one after another. Sums run in order, so they never fall, and an index of
    probability 0 is never first. Of a large vocabulary sums of blocks come first: only one block is looked into.
    """
    V, flat = probs.shape[-1], probs.reshape(-1, probs.shape[-1])
    num_whole = V // _BLOCK * _BLOCK
    parts = [flat[:, :num_whole].unflatten(1, (-1, _BLOCK)).sum(dim=-1)] if num_whole else []
    if num_whole < V:
        parts.append(flat[:, num_whole:].sum(dim=-1, keepdim=True))
    ends = torch.cat(parts, dim=1).cumsum(dim=-1, dtype=torch.float64)
    u = torch.rand(ends[:, -1:].shape, dtype=torch.float64, device=probs.device, generator=generator) * ends[:, -1:]
    block = _first_beyond(ends, u)
    u = u - torch.where(block > 0, ends.gather(1, (block - 1).clamp_min(0)), 0.0)
    index = block * _BLOCK + torch.arange(min(_BLOCK, V), device=probs.device)
    inside = torch.where(index < V, flat.gather(1, index.clamp_max(V - 1)), 0.0)
    chosen = block * _BLOCK + _first_beyond(inside.cumsum(dim=-1, dtype=torch.float64), u)
    # a law of NaN, as drafts from numbers that overflow have, gives the last index, and is then never accepted
    return chosen.clamp_max_(V - 1).view(probs.shape[:-1])


def _first_beyond(cumulative: Tensor, u: Tensor) -> Tensor:
    """The first index whose cumulative sum, shape [n, m], exceeds u, shape [n, 1]: shape [n, 1]."""
    total = cumulative[:, -1:]
    # rounding may have carried u to the total, behind every index
    u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, u, right=True).clamp_max_(cumulative.shape[1] - 1)


def _exists(draft_length: Tensor, num_speculative_tokens: int) -> Tensor:
    return torch.arange(num_speculative_tokens, device=draft_length.device) < draft_length[:, None]


def _check_probs(target_probs: Tensor, draft_probs: Tensor, draft_tokens: Tensor, draft_length: Tensor) -> None:
    K = draft_tokens.shape[1]
    _check_shapes(draft_tokens, draft_length, target_probs=(target_probs, K + 1), draft_probs=(draft_probs, K))
    if target_probs.shape[2] != draft_probs.shape[2]:
        raise ValueError(
            f"expected one vocabulary, found target_probs of shape {tuple(target_probs.shape)} and draft_probs of "
            f"shape {tuple(draft_probs.shape)}"
        )
    if target_probs.dtype != torch.float32 or draft_probs.dtype != torch.float32:
        raise ValueError(f"expected float32 probabilities, found {target_probs.dtype} and {draft_probs.dtype}")


def _check_shapes(draft_tokens: Tensor, draft_length: Tensor, **others: tuple[Tensor, int]) -> None:
    B = draft_tokens.shape[0]
    if tuple(draft_length.shape) != (B,):
        raise ValueError(
            f"draft_length: expected shape {(B,)} for draft_tokens of shape {tuple(draft_tokens.shape)}, "
            f"found {tuple(draft_length.shape)}"
        )
    for name, (tensor, length) in others.items():
        if tuple(tensor.shape[:2]) != (B, length):
            raise ValueError(
                f"{name}: expected leading shape {(B, length)} for draft_tokens of shape "
                f"{tuple(draft_tokens.shape)}, found {tuple(tensor.shape)}"
            )
