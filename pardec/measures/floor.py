"""What limits drafts that do not see the tokens between: the most that any could reach, and what an adapter does.

Source: arXiv:2608.27339, which measures this floor of the total variation for one model; here from samples of the
target alone, through the rows, cache and gate of the decoder, so that adapter and floor are of the same places.
Knows no file and no table.
Legend: C contexts, B of them at once, N sampled futures of each, P predecessors, K num_speculative_tokens,
V vocabulary; the overlap sum min(p, q) = 1 - TV(p, q) is the probability that a draft from q is accepted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pardec.decoding.drafting import HeadDrafter
from pardec.decoding.prefill import prefill_prompts
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw, make_warpers
from pardec.decoding.verify import sample_from
from pardec.layout import RowLayout, block_layout
from pardec.measures.barycentre import barycentre, mean_overlap
from pardec.model import SelfSpeculativeModel
from pardec.target.cache import SlotCache

# of one forward, all rows together: bounds the memory of logits
_LOGITS_PER_FORWARD = 2**25


@dataclass(frozen=True)
class Overlaps:
    """Overlap of target and draft by context and depth, shape [C, K] each, float64: means over sampled futures.

    Attributes:
        blind: the most that drafts can have which see the context alone; not even the bonus token, which is drawn in
            the forward that makes them. One law is fitted to N futures and judged
            by the same, so on average this is too much, the less the larger N.
        blind_shown: what such a draft does have that was fitted to one half of the futures, on the other half; on
            average too little.
        behind_one: the most where each draft sees the token before it too, as with a sampler head; too much likewise.
        behind_one_shown: too little likewise.
        drafted: what the mask rows have.
        with_head: what they have with the sampler head; without one as `drafted`.
    """

    blind: Tensor
    blind_shown: Tensor
    behind_one: Tensor
    behind_one_shown: Tensor
    drafted: Tensor
    with_head: Tensor


def measure_overlaps(
    model: SelfSpeculativeModel,
    contexts: Sequence[list[int]],
    *,
    num_futures: int,
    num_predecessors: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    on_batch: Callable[[int], object] = lambda num_contexts: None,
) -> Overlaps:
    """Overlaps behind each context, with futures that the target samples from there.

    Args:
        model: with an adapter.
        contexts: token ids, none empty; what comes behind is drafted.
        num_futures: N, even and at least 4; the laws of each are known exactly, only futures are sampled.
        num_predecessors: P, even, from 2 to N: of so many futures the token before is given, and N pasts for each.
        temperature: of target and draft, above 0.
        top_k: likewise.
        seed: of the futures.
        on_batch: told the number of contexts that are done.

    Raises:
        ValueError: without an adapter or contexts, or for numbers out of range.
    """
    if model.adapter is None or not contexts:
        raise ValueError("model, contexts: expected an adapter and at least one context, found none")
    if num_futures < 4 or num_futures % 2:
        raise ValueError(f"num_futures: expected an even number from 4 on, found {num_futures}")
    if not 2 <= num_predecessors <= num_futures or num_predecessors % 2:
        raise ValueError(f"num_predecessors: expected an even number from 2 to {num_futures}, found {num_predecessors}")
    if temperature <= 0:
        raise ValueError(f"temperature: expected a number above 0, as greedy drafts are no laws, found {temperature}")
    K = model.adapter.metadata.num_speculative_tokens
    head = model.engines.chosen_head(None)
    forward = model.engines.row_forward(K, head)
    generator = torch.Generator(model.target.device).manual_seed(seed)
    law = TokenLaw(False, tuple(make_warpers(temperature, top_k, None, None)), generator)
    rows = 1 + num_futures * (K - 1 + num_predecessors)
    at_once = max(1, _LOGITS_PER_FORWARD // (rows * model.target.vocab_size))
    found = []
    for start in range(0, len(contexts), at_once):
        batch = contexts[start : start + at_once]
        places = _Places.behind(forward, law, batch, rows)
        with forward.attached(), torch.no_grad():
            found.append(_of_batch(places, head, K, num_futures, num_predecessors))
        on_batch(len(batch))
    return Overlaps(*(torch.cat([getattr(one, field.name) for one in found]) for field in fields(Overlaps)))


@dataclass
class _Places:
    """Contexts whose last token is run again, with whatever hangs behind it, into slots behind the rest."""

    forward: RowForward
    law: TokenLaw
    cache: SlotCache
    lengths: Tensor  # of what is before the last token, [B]
    last: Tensor  # the last token, [B, 1]

    @classmethod
    def behind(cls, forward: RowForward, law: TokenLaw, contexts: Sequence[list[int]], rows: int) -> "_Places":
        """Runs the contexts; there is room for so many rows."""
        target, longest = forward.target, max(map(len, contexts))
        padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in contexts], device=target.device)
        lengths = torch.tensor([len(ids) for ids in contexts], device=target.device)
        cache = SlotCache(target.num_layers, longest + rows)
        with torch.no_grad():
            prefill_prompts(target, padded, lengths, cache, None, None)
        return cls(forward, law, cache, lengths - 1, padded.gather(1, lengths[:, None] - 1))

    def run(self, layout: RowLayout, ids: Tensor) -> Tensor:
        """Logits [B, R, V] of a layout whose real rows are the last token and `ids`, shape [B, num_real - 1]."""
        return self.forward.run(self.forward.plan(layout), self.cache, self.lengths, torch.cat([self.last, ids], dim=1))


def futures_layout(num_futures: int, length: int, num_predecessors: int = 0) -> RowLayout:
    """Rows of the last token, of N futures of `length` tokens one after another, and behind each of them P leaves."""
    N, P, t = num_futures, num_predecessors, length
    future = torch.cat([torch.arange(N).repeat_interleave(t), torch.arange(N).repeat_interleave(P)])
    depth = torch.cat([torch.arange(1, t + 1).repeat(N), torch.full((N * P,), t + 1)])
    before = (future[:, None] == future) & (depth > 0) & (depth[:, None] > depth)
    visible = torch.ones(1 + len(depth), 1 + len(depth), dtype=torch.bool).tril()
    visible[1:, 1:] = before | torch.eye(len(depth), dtype=torch.bool)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), depth])
    return RowLayout(len(offsets), offsets, visible, torch.empty(0, dtype=torch.long))


def _of_batch(places: _Places, head: HeadDrafter | None, K: int, N: int, P: int) -> Overlaps:
    """Everything of a few contexts."""
    law, B = places.law, len(places.last)
    none = places.last.new_empty(B, 0)
    logits = places.run(block_layout(K), none)
    hidden = None if places.forward.hidden is None else places.forward.hidden[:, 1:].clone()
    drafts = logits[:, 1:].clone()
    p = law.probs(logits[:, :1]).expand(-1, N, -1)  # of the next token behind each future so far, [B, N, V]
    futures, columns = none.unsqueeze(1).expand(-1, N, -1), []
    for depth in range(1, K + 1):
        before = p  # of the token that is drawn now: the bonus token, then what accepted drafts would be
        tokens = sample_from(p.flatten(0, 1), law.generator).view(B, N, 1)
        futures = torch.cat([futures, tokens], dim=2)
        p = law.probs(places.run(futures_layout(N, depth), futures.flatten(1))[:, depth::depth])
        row = drafts[:, depth - 1]
        q = law.probs(row[:, None])
        q_of_head = q if head is None else _head_laws(head, law, row, hidden, depth - 1, futures[..., -1])
        behind_one = _behind_one(places, before, futures, P) if depth > 1 else _certain(B)
        columns.append([*_blind(p), *behind_one, _drafted(p, q), _drafted(p, q_of_head)])
    by_figure = zip(*columns, strict=True)
    return Overlaps(*(torch.stack(list(one), dim=1).cpu() for one in by_figure))


def _certain(B: int) -> tuple[Tensor, Tensor]:
    """Where the bonus token is all that is between, a draft that sees it is limited by nothing."""
    ones = torch.ones(B, dtype=torch.float64)
    return ones, ones


def _drafted(p: Tensor, q: Tensor) -> Tensor:
    return p.minimum(q).sum(dim=-1).double().mean(dim=1).cpu()


def _blind(p: Tensor) -> tuple[Tensor, Tensor]:
    """`blind` and `blind_shown` of laws [B, N, V], each [B]."""
    half = p.shape[1] // 2
    most, shown = [], []
    for laws in p:
        flat = torch.full((len(laws),), 1 / len(laws), dtype=torch.float64, device=laws.device)
        own = torch.full((half,), 1 / half, dtype=torch.float64, device=laws.device)
        halves = laws[:half], laws[half:]
        most.append(barycentre(laws, flat)[0])
        fitted = [barycentre(one, own)[1] for one in halves]
        shown.append(sum(mean_overlap(halves[1 - i], own, fitted[i]) for i in (0, 1)) / 2)
    return torch.tensor(most, dtype=torch.float64), torch.tensor(shown, dtype=torch.float64)


def _behind_one(places: _Places, before: Tensor, futures: Tensor, P: int) -> tuple[Tensor, Tensor]:
    """`behind_one` and `behind_one_shown` of the next token, each [B].

    Of the N pasts that end before the last token of `futures` each is taken to be as likely; behind a token v past n
    then has the weight that v has in its law, over the sum of all.

    Args:
        places: the contexts.
        before: the law of the last token behind each past, shape [B, N, V].
        futures: shape [B, N, t], t at least 2.
        P: predecessors, the last tokens of the first P / 2 futures of each half.
    """
    (B, N, t), half = futures.shape, futures.shape[1] // 2
    chosen = torch.cat([torch.arange(P // 2), half + torch.arange(P // 2)]).to(futures.device)
    given = futures[:, chosen, -1]  # [B, P]
    pasts = futures[..., :-1]
    ids = torch.cat([pasts.flatten(1), given.repeat(1, N)], dim=1)
    logits = places.run(futures_layout(N, t - 1, P), ids)[:, 1 + N * (t - 1) :]
    laws = places.law.probs(logits).view(B, N, P, -1)
    weights = before.double().gather(2, given[:, None].expand(-1, N, -1))  # [B, N, P]
    most, shown = [], []
    for b in range(B):
        both = [_given_one(laws[b, :, m], weights[b, :, m], own_half=0 if m < P // 2 else 1) for m in range(P)]
        most.append(sum(one for one, _ in both) / P)
        shown.append(sum(two for _, two in both) / P)
    return torch.tensor(most, dtype=torch.float64), torch.tensor(shown, dtype=torch.float64)


def _given_one(laws: Tensor, weights: Tensor, own_half: int) -> tuple[float, float]:
    """The two overlaps behind one predecessor, which is drawn from a past of `own_half`.

    That half judges what the other is fitted to: its own past is among it, so the judgement is by the true law of
    pasts, whatever is judged.
    """
    half = len(laws) // 2
    halves = [(laws[part], weights[part]) for part in (slice(half), slice(half, None))]
    judging, judged_by = halves[own_half]
    fitting, fitted_by = halves[1 - own_half]
    # no past of the other half may go on with this token: then the draft can only go by all of them
    fitted_by = fitted_by if float(fitted_by.sum()) > 0 else torch.ones_like(fitted_by)
    q = barycentre(fitting, fitted_by / fitted_by.sum())[1]
    return barycentre(laws, weights / weights.sum())[0], mean_overlap(judging, judged_by / judged_by.sum(), q)


def _head_laws(
    head: HeadDrafter, law: TokenLaw, logits: Tensor, hidden: Tensor | None, depth: int, previous: Tensor
) -> Tensor:
    """What the head drafts by at one depth behind each of the tokens [B, N], shape [B, N, V]; `logits` [B, V]."""
    assert hidden is not None
    (B, N), H = previous.shape, hidden.shape[-1]
    rows = logits[:, None].expand(-1, N, -1).reshape(B * N, 1, -1)
    states = hidden[:, depth, None].expand(-1, N, -1).reshape(B * N, 1, H)
    # its draws must not move those of the futures
    own = TokenLaw(False, law.processors, torch.Generator(logits.device).manual_seed(0))
    _, q = head.draft(own, rows, states, previous.flatten())
    assert q is not None
    return q[:, 0].view(B, N, -1)
