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
from pardec.decoding.sampling import TokenLaw, make_warpers
from pardec.decoding.verify import sample_from
from pardec.layout import block_layout
from pardec.measures.barycentre import barycentre, mean_overlap
from pardec.measures.futures import Places, futures_layout
from pardec.measures.share import ALL_OF_IT, Share
from pardec.model import SelfSpeculativeModel

# of one forward, all rows together: bounds the memory of logits
_LOGITS_PER_FORWARD = 2**25
_CONTEXTS_OF_A_LINE = 8  # in a picture


@dataclass(frozen=True)
class Overlaps:
    """Overlap of target and draft by context and depth, shape [C, K] each, float64: means over sampled futures.

    The last two are of shape [C]: accepted drafts of a step whose drafts follow the laws that were fitted for `blind`
    and `behind_one` and are verified one by one, K at most; of futures as in `expected_accepted_length`.

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
        blind_length: see above.
        behind_one_length: see above.
    """

    blind: Tensor
    blind_shown: Tensor
    behind_one: Tensor
    behind_one_shown: Tensor
    drafted: Tensor
    with_head: Tensor
    blind_length: Tensor
    behind_one_length: Tensor


def measure_overlaps(
    model: SelfSpeculativeModel,
    contexts: Sequence[list[int]],
    *,
    num_futures: int,
    num_predecessors: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    on_batch: Callable[[int], object] = lambda num_contexts: None,
    share: Share = ALL_OF_IT,
) -> Overlaps:
    """Overlaps behind each context, with futures that the target samples from there.

    Args:
        model: with an adapter.
        contexts: token ids, none empty; what comes behind is drafted.
        num_futures: N, even and at least 4; the laws of each are known exactly, only futures are sampled.
        num_predecessors: P, even, from 2 to N: of so many futures the token before is given, and N pasts for each.
        temperature: of target and draft, above 0.
        top_k: likewise.
        seed: of the futures; each batch adds the index of its first context.
        batch_size: contexts at once, at most; fewer where memory is short.
        on_batch: told the number of contexts that are done.
        share: the batches that this process measures; figures are of all.

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
    warpers = tuple(make_warpers(temperature, top_k, None, None))
    rows = 1 + num_futures * (K - 1 + num_predecessors)
    at_once = max(1, min(_LOGITS_PER_FORWARD // (rows * model.target.vocab_size), batch_size or len(contexts)))
    mine: list[tuple[int, Overlaps]] = []
    for start in share.mine(range(0, len(contexts), at_once)):
        batch = contexts[start : start + at_once]
        law = TokenLaw(False, warpers, torch.Generator(model.target.device).manual_seed(seed + start))
        places = Places.behind(forward, law, batch, rows)
        with forward.attached(), torch.no_grad():
            mine.append((start, _of_batch(places, head, K, num_futures, num_predecessors)))
        on_batch(len(batch))
    found = share.of_all(mine)
    return Overlaps(*(torch.cat([getattr(one, field.name) for one in found]) for field in fields(Overlaps)))


def measure_floor(
    model: SelfSpeculativeModel,
    contexts: Sequence[list[int]],
    *,
    temperature: float,
    top_k: int,
    seed: int,
    batch_size: int | None = None,
    share: Share = ALL_OF_IT,
) -> dict[str, float]:
    """Mean acceptance lengths that drafts of the largest overlap have, for trackers, from few contexts and futures.

    Args:
        model: with an adapter.
        contexts: as in `measure_overlaps`, of which the first eight are taken.
        temperature: likewise.
        top_k: likewise; with the whole vocabulary it would take minutes.
        seed: likewise.
        batch_size: likewise.
        share: likewise.
    """
    found = measure_overlaps(
        model,
        contexts[:_CONTEXTS_OF_A_LINE],
        num_futures=16,
        num_predecessors=2,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        batch_size=batch_size,
        share=share,
    )
    lengths = {"floor/length": found.blind_length}
    if model.adapter is not None and model.adapter.head is not None:
        lengths["floor/length_with_head"] = found.behind_one_length
    return {name: 1 + float(one.mean()) for name, one in lengths.items()}


def _of_batch(places: Places, head: HeadDrafter | None, K: int, N: int, P: int) -> Overlaps:
    """Everything of a few contexts."""
    law, B = places.law, len(places.last)
    none = places.last.new_empty(B, 0)
    logits = places.run(block_layout(K), none)
    hidden = None if places.forward.hidden is None else places.forward.hidden[:, 1:].clone()
    drafts = logits[:, 1:].clone()
    p = law.probs(logits[:, :1]).expand(-1, N, -1)  # of the next token behind each future so far, [B, N, V]
    futures, columns = none.unsqueeze(1).expand(-1, N, -1), []
    chosen = torch.cat([torch.arange(P // 2), N // 2 + torch.arange(P // 2)]).to(p.device)
    blind, behind_one = _Chain.begun(B, N, p.device), _Chain.begun(B, P, p.device)
    for depth in range(1, K + 1):
        before = p  # of the token that is drawn now: the bonus token, then what accepted drafts would be
        tokens = sample_from(p.flatten(0, 1), law.generator).view(B, N, 1)
        futures = torch.cat([futures, tokens], dim=2)
        blind.follow(tokens[..., 0])
        behind_one.follow(tokens[:, chosen, 0])
        p = law.probs(places.run(futures_layout(N, depth), futures.flatten(1))[:, depth::depth])
        row = drafts[:, depth - 1]
        q = law.probs(row[:, None])
        q_of_head = q if head is None else _head_laws(head, law, row, hidden, depth - 1, futures[..., -1])
        *of_blind, q_blind = _blind(p)
        *of_one, q_one = _behind_one(places, before, futures, chosen) if depth > 1 else _certain(p[:, chosen])
        blind.add(p, q_blind[:, None].expand_as(p))
        behind_one.add(p[:, chosen], q_one)
        columns.append([*of_blind, *of_one, _drafted(p, q), _drafted(p, q_of_head)])
    by_figure = [torch.stack(list(one), dim=1).cpu() for one in zip(*columns, strict=True)]
    return Overlaps(*[*by_figure, blind.length.cpu(), behind_one.length.cpu()])


@dataclass
class _Chain:
    """Accepted drafts along futures, n of each context, whose tokens are accepted with min(1, q / p)."""

    reached: Tensor  # probability that all drafts so far were accepted, [B, n]
    length: Tensor  # [B]
    laws: tuple[Tensor, Tensor] | None = None  # p and q of the draft that was added last, [B, n, V]

    @classmethod
    def begun(cls, B: int, n: int, device: torch.device) -> "_Chain":
        """Before the first draft."""
        return cls(torch.ones(B, n, device=device).double(), torch.zeros(B, device=device).double())

    def add(self, p: Tensor, q: Tensor) -> None:
        """The next draft."""
        self.length += (self.reached * p.minimum(q).sum(dim=-1)).mean(dim=1)
        self.laws = p, q

    def follow(self, tokens: Tensor) -> None:
        """What came at the place of the last draft, shape [B, n]."""
        if self.laws is not None:
            p, q = (one.gather(2, tokens[..., None])[..., 0] for one in self.laws)
            self.reached = self.reached * (q / p).clamp_max(1)


def _certain(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `_behind_one` where the bonus token is all that is between: a draft that sees it is limited by nothing."""
    ones = torch.ones(len(p), dtype=torch.float64)
    return ones, ones, p


def _drafted(p: Tensor, q: Tensor) -> Tensor:
    return p.minimum(q).sum(dim=-1).double().mean(dim=1).cpu()


def _blind(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`blind` and `blind_shown` of laws [B, N, V], each [B], and the fitted law, [B, V]."""
    half = p.shape[1] // 2
    most, shown, laws_of_drafts = [], [], []
    for laws in p:
        flat = torch.full((len(laws),), 1 / len(laws), dtype=torch.float64, device=laws.device)
        own = torch.full((half,), 1 / half, dtype=torch.float64, device=laws.device)
        halves = laws[:half], laws[half:]
        overlap, q = barycentre(laws, flat)
        most.append(overlap)
        laws_of_drafts.append(q.float())
        fitted = [barycentre(one, own)[1] for one in halves]
        shown.append(sum(mean_overlap(halves[1 - i], own, fitted[i]) for i in (0, 1)) / 2)
    figures = torch.tensor([most, shown], dtype=torch.float64)
    return figures[0], figures[1], torch.stack(laws_of_drafts)


def _behind_one(places: Places, before: Tensor, futures: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`behind_one` and `behind_one_shown` of the next token, each [B], and the fitted laws, [B, P, V].

    Of the N pasts that end before the last token of `futures` each is taken to be as likely; behind a token v past n
    then has the weight that v has in its law, over the sum of all.

    Args:
        places: the contexts.
        before: the law of the last token behind each past, shape [B, N, V].
        futures: shape [B, N, t], t at least 2.
        chosen: those whose last tokens are predecessors, shape [P], half of them of each half of the futures.
    """
    (B, N, t), P = futures.shape, len(chosen)
    given = futures[:, chosen, -1]  # [B, P]
    ids = torch.cat([futures[..., :-1].flatten(1), given.repeat(1, N)], dim=1)
    logits = places.run(futures_layout(N, t - 1, P), ids)[:, 1 + N * (t - 1) :]
    laws = places.law.probs(logits).view(B, N, P, -1)
    weights = before.double().gather(2, given[:, None].expand(-1, N, -1))  # [B, N, P]
    found = [
        [_given_one(laws[b, :, m], weights[b, :, m], own_half=0 if m < P // 2 else 1) for m in range(P)]
        for b in range(B)
    ]
    figures = torch.tensor([[one[:2] for one in row] for row in found], dtype=torch.float64).mean(dim=1)
    return figures[:, 0], figures[:, 1], torch.stack([torch.stack([one[2] for one in row]) for row in found])


def _given_one(laws: Tensor, weights: Tensor, own_half: int) -> tuple[float, float, Tensor]:
    """The two overlaps behind one predecessor, which is drawn from a past of `own_half`, and the law of the first.

    That half judges what the other is fitted to: its own past is among it, so the judgement is by the true law of
    pasts, whatever is judged.
    """
    half = len(laws) // 2
    halves = [(laws[part], weights[part]) for part in (slice(half), slice(half, None))]
    judging, judged_by = halves[own_half]
    fitting, fitted_by = halves[1 - own_half]
    # no past of the other half may go on with this token: then the draft can only go by all of them
    fitted_by = fitted_by if float(fitted_by.sum()) > 0 else torch.ones_like(fitted_by)
    q_of_half = barycentre(fitting, fitted_by / fitted_by.sum())[1]
    most, q = barycentre(laws, weights / weights.sum())
    return most, mean_overlap(judging, judged_by / judged_by.sum(), q_of_half), q.float()


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
