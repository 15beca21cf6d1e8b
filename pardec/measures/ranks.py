"""How high drafts rank the target's own next tokens, by position: what a tree of drafts could catch.

Teacher-forced along continuations that the target has emitted, see `place_rows`.
Legend: B batch, N blocks of a forward, K num_speculative_tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pardec.decoding.drafting import HeadDrafter
from pardec.decoding.sampling import TokenLaw
from pardec.measures.place_rows import PlaceRows, look_by_place
from pardec.measures.share import ALL_OF_IT, Share
from pardec.model import SelfSpeculativeModel

TOP = (1, 5, 10)


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
    return look_by_place(
        model,
        prompts,
        continuations,
        _look_for_ranks,
        num_speculative_tokens=num_speculative_tokens,
        use_head=use_head,
        stride=stride,
        batch_size=batch_size,
        share=share,
    )


def summarise_ranks(ranks: Tensor) -> RankAccuracy:
    """Shares from ranks, shape [places, K], 0 for the likeliest token, -1 where there is no token."""
    exists, first = ranks >= 0, ranks == 0
    reached = torch.cat([torch.ones_like(first[:, :1]), first[:, :-1]], dim=1).cumprod(dim=1).bool() & exists

    def shares(among: Tensor) -> dict[int, list[float]]:
        total = among.sum(dim=0).clamp_min(1)
        return {n: ((ranks < n) & among).sum(dim=0).div(total).tolist() for n in TOP}

    return RankAccuracy(exists.sum(dim=0).tolist(), shares(exists), reached.sum(dim=0).tolist(), shares(reached))


def _look_for_ranks(head: HeadDrafter | None, rows: PlaceRows) -> Tensor:
    scores = rows.logits
    if head is not None and rows.hidden is not None:
        scores = _head_scores(head, scores, rows.hidden, rows.before)
    return _ranks(scores, rows.wanted)


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
