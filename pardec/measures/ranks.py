"""How high drafts rank the target's own next tokens, by position: what a tree of drafts could catch.

Teacher-forced along continuations that the target has emitted, through the rows, cache and gate of the decoder: real
tokens of the continuation, with a block of mask tokens behind every few of them, in one forward for many places.
Legend: B batch, C real rows of a forward, N blocks of a forward, K num_speculative_tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pardec.decoding.drafting import HeadDrafter
from pardec.decoding.prefill import prefill_prompts
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw
from pardec.layout import chain_layout
from pardec.measures.share import ALL_OF_IT, Share
from pardec.model import SelfSpeculativeModel
from pardec.target.cache import SlotCache

TOP = (1, 5, 10)
# of one forward, all rows together: bounds the memory of logits
_LOGITS_PER_FORWARD = 2**26
_BLOCKS_PER_FORWARD = 16


@dataclass(frozen=True)
class RankAccuracy:
    """Shares of places at which drafts rank the target's own token among their n likeliest, by position.

    Attributes:
        num_places: places that have a token for each position, K numbers.
        unconditional: by n of `TOP`, share of those places, K numbers.
        num_reached: places at which the tokens of all earlier positions were ranked first, K numbers.
        conditional: by n, share of those, K numbers.
    """

    num_places: list[int]
    unconditional: dict[int, list[float]]
    num_reached: list[int]
    conditional: dict[int, list[float]]

    def to_dict(self) -> dict[str, object]:
        """Rounded figures for tables and JSON."""
        by_condition = {"unconditional": self.unconditional, "conditional": self.conditional}
        figures = {
            name: {f"top{n}": [round(rate, 4) for rate in values] for n, values in rates.items()}
            for name, rates in by_condition.items()
        }
        return {**figures, "num_places": self.num_places, "num_reached": self.num_reached}


def measure_ranks(
    model: SelfSpeculativeModel,
    prompts: Sequence[list[int]],
    continuations: Sequence[list[int]],
    *,
    num_speculative_tokens: int | None = None,
    use_head: bool | None = None,
    stride: int = 1,
    batch_size: int = 16,
    share: Share = ALL_OF_IT,
) -> RankAccuracy:
    """Ranks of the continuations' own tokens in what is drafted behind them.

    A place is a token that a step may draft behind: the prompt's last, or one of the continuation. Mask token j
    behind it predicts the token at distance j + 1, which is what is looked for. A sampler head is told the
    continuation's token before that one; what is not on its shortlist has no rank.

    Args:
        model: with an adapter.
        prompts: token ids, none empty.
        continuations: of each prompt, emitted by the model: greedy ones say how drafts rank its argmax, sampled ones
            how they rank what it draws.
        num_speculative_tokens: K; default what the adapter was trained with.
        use_head: rank what the sampler head scores; default if the adapter has one.
        stride: tokens from one place to the next, from the prompt's last token on.
        batch_size: sequences in one forward.
        share: the batches that this process ranks; figures are of all.

    Raises:
        ValueError: without an adapter, or a head that is asked for, or if prompts and continuations do not go together.
    """
    found = ranks_by_place(
        model,
        prompts,
        continuations,
        num_speculative_tokens=num_speculative_tokens,
        use_head=use_head,
        stride=stride,
        batch_size=batch_size,
        share=share,
    )
    return summarise_ranks(torch.cat(found))


def ranks_by_place(
    model: SelfSpeculativeModel,
    prompts: Sequence[list[int]],
    continuations: Sequence[list[int]],
    *,
    num_speculative_tokens: int | None = None,
    use_head: bool | None = None,
    stride: int = 1,
    batch_size: int = 16,
    share: Share = ALL_OF_IT,
) -> list[Tensor]:
    """The ranks themselves at every place of each sequence, in order: a tensor [places, K] for each, int64.

    0 stands for the likeliest token, -1 where the continuation has no token. Arguments and errors as in
    `measure_ranks`.
    """
    if model.adapter is None:
        raise ValueError("model: expected one with an adapter, found none")
    if not prompts or len(prompts) != len(continuations):
        raise ValueError(
            f"continuations: expected one for each of some prompts, found {len(continuations)} for {len(prompts)}"
        )
    if stride < 1:
        raise ValueError(f"stride: expected an integer >= 1, found {stride}")
    K = num_speculative_tokens or model.adapter.metadata.num_speculative_tokens
    head = model.engines.chosen_head(use_head)
    # rows as the decoder runs them, but for weights that are packed and steps that are captured
    forward = model.engines.row_forward(K, head)
    mine = []
    for start in share.mine(range(0, len(prompts), batch_size)):
        part = slice(start, start + batch_size)
        mine.append((start, _ranks_of_batch(forward, head, prompts[part], continuations[part], K, stride).cpu()))
    return [ranks for batch in share.of_all(mine) for ranks in batch]


def summarise_ranks(ranks: Tensor) -> RankAccuracy:
    """Shares from ranks, shape [places, K], 0 for the likeliest token, -1 where there is no token."""
    exists, first = ranks >= 0, ranks == 0
    reached = torch.cat([torch.ones_like(first[:, :1]), first[:, :-1]], dim=1).cumprod(dim=1).bool() & exists

    def shares(among: Tensor) -> dict[int, list[float]]:
        total = among.sum(dim=0).clamp_min(1)
        return {n: ((ranks < n) & among).sum(dim=0).div(total).tolist() for n in TOP}

    return RankAccuracy(exists.sum(dim=0).tolist(), shares(exists), reached.sum(dim=0).tolist(), shares(reached))


@torch.no_grad()
def _ranks_of_batch(
    forward: RowForward,
    head: HeadDrafter | None,
    prompts: Sequence[list[int]],
    continuations: Sequence[list[int]],
    K: int,
    stride: int,
) -> Tensor:
    """Ranks at every place of a few sequences, shape [B, places, K]."""
    target, device = forward.target, forward.target.device
    B, P = len(prompts), max(map(len, prompts))
    # real rows: the prompt's last token and the continuation, C at a time, a block behind each `stride`-th of them
    tails = [[prompt[-1], *tokens] for prompt, tokens in zip(prompts, continuations, strict=True)]
    longest = max(map(len, tails))
    affordable = max(1, _LOGITS_PER_FORWARD // (B * (K + stride) * target.vocab_size))
    N = min(affordable, _BLOCKS_PER_FORWARD, -(-longest // stride))
    C = N * stride
    plan = forward.plan(chain_layout([K if row % stride == 0 else 0 for row in range(C)]))
    num_forwards = -(-longest // C)
    tokens = _padded(tails, num_forwards * C + K + 1, device)

    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    cache = SlotCache(target.num_layers, P + num_forwards * C + plan.layout.num_rows)
    prefill_prompts(target, _padded(prompts, P, device).clamp_min(0), lengths, cache, None, None)
    ranks, ahead = [], torch.arange(1, K + 1, device=device)
    with forward.attached():
        for start in range(0, longest, C):
            ids = tokens[:, start : start + C].clamp_min(0)
            # the prompt's last token is run again, into its own slot
            scores = forward.run(plan, cache, lengths - 1 + start, ids)[:, C:].unflatten(1, (N, K))
            before = torch.arange(start, start + C, stride, device=device)[:, None] + ahead  # [N, K]
            if head is not None and forward.hidden is not None:
                hidden = forward.hidden[:, C:].unflatten(1, (N, K))
                scores = _head_scores(head, scores, hidden, tokens[:, before].clamp_min(0))
            ranks.append(_ranks(scores, tokens[:, before + 1]))
    return torch.cat(ranks, dim=1)


def _head_scores(head: HeadDrafter, logits: Tensor, hidden: Tensor, previous: Tensor) -> Tensor:
    """What the head drafts by, shape [B, N, K, V], if the tokens before are `previous`, shape [B, N, K]."""
    # rows as blocks of one draft each, in the law that keeps their order
    law = TokenLaw(greedy=False, generator=torch.Generator(logits.device).manual_seed(0))
    _, q = head.draft(law, logits.flatten(0, 2)[:, None], hidden.flatten(0, 2)[:, None], previous.flatten())
    assert q is not None
    return q[:, 0].log().view_as(logits)


def _ranks(scores: Tensor, wanted: Tensor) -> Tensor:
    """How many tokens score higher than the wanted one, shape [B, N, K]; of equals the first comes first.

    Args:
        scores: shape [B, N, K, V]; a token at -inf cannot be drafted and comes behind all others.
        wanted: shape [B, N, K], -1 where there is no token, as then in the result.
    """
    scores = scores.float()  # what greedy decoding compares
    ids = wanted.clamp_min(0)[..., None]
    own = scores.gather(-1, ids)
    higher = (scores > own) | ((scores == own) & (torch.arange(scores.shape[-1], device=ids.device) < ids))
    ranks = higher.sum(dim=-1).masked_fill(own[..., 0] == float("-inf"), scores.shape[-1])
    return ranks.masked_fill(wanted < 0, -1)


def _padded(rows: Sequence[list[int]], length: int, device: torch.device) -> Tensor:
    """Token ids, shape [B, length], -1 behind their end."""
    return torch.tensor([list(row) + [-1] * (length - len(row)) for row in rows], device=device)
