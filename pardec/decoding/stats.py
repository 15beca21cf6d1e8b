"""Counts of a generation, and what they say: acceptance, tokens per forward, tokens per second.

Knows lists of integers only. Rates are pooled as sums over sums, never as means of means, and are counted before
EOS and length cuts; tokens per step and per second are counted after them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any


@dataclass(frozen=True)
class SequenceCounts:
    """What happened to one sequence.

    Attributes:
        accepted: number of accepted drafted tokens in each round, bonus token excluded.
        drafted: number of drafted tokens that each round verified.
        num_new_tokens: emitted tokens, after cuts.
        forwards_per_step: 1, or 2 for two_pass; each gives an exact token besides the accepted ones.
        accepted_copies: number of accepted copied tokens in each round; empty where nothing was copied.
        copied: number of copied tokens that each round verified; as long.
    """

    accepted: list[int]
    drafted: list[int]
    num_new_tokens: int
    forwards_per_step: int = 1
    accepted_copies: list[int] = field(default_factory=list)
    copied: list[int] = field(default_factory=list)

    @property
    def accepted_in_all(self) -> list[int]:
        """Accepted tokens of each round, drafted or copied."""
        copies = self.accepted_copies or [0] * len(self.accepted)
        return [a + c for a, c in zip(self.accepted, copies, strict=True)]

    @property
    def verified_in_all(self) -> list[int]:
        """Tokens that each round verified, drafted or copied."""
        return [d + c for d, c in zip(self.drafted, self.copied or [0] * len(self.drafted), strict=True)]


def share_with_copies(counts: Sequence[SequenceCounts]) -> float:
    """Share of the steps of a batch in which some sequence had copied tokens; 0 without a step."""
    steps = [any(copied) for copied in zip_longest(*(one.copied for one in counts), fillvalue=0)]
    return sum(steps) / max(len(steps), 1)


@dataclass(frozen=True)
class DecodeStats:
    """Figures of one or several sequences.

    Attributes:
        num_new_tokens: emitted tokens, after cuts.
        num_steps: rounds, summed over sequences.
        num_forwards: forwards of each sequence, prefill included, summed.
        num_drafts: rounds that verified a draft, or copied tokens.
        num_draft_tokens: drafted tokens in them.
        num_accepted_tokens: accepted ones.
        mean_acceptance_length: 1 + (num_accepted_tokens + num_accepted_copies) / num_drafts; 1 where nothing was
            drafted or copied. Counted before cuts: drafts behind an EOS or the length limit count, as they do
            everywhere in the field.
        draft_acceptance_rate: num_accepted_tokens / num_draft_tokens.
        tokens_per_step: emitted tokens after cuts, those of prefill aside, per round: what drafting really gave, below
            the mean acceptance length where texts are short against it, or rounds found nothing to verify; 0 without
            a round.
        tokens_per_forward: tokens emitted by the forwards after prefill, before cuts, per such forward.
        acceptance_rate_per_position: `unconditional`: share of drafts whose token j was accepted; `conditional`:
            share among those whose tokens before j were accepted. Copies do not count here.
        seconds: wall clock with prefill, without loading.
        tokens_per_second: num_new_tokens / seconds.
        num_copied_tokens: tokens copied from the text that were verified behind the drafts.
        num_accepted_copies: accepted ones.
        sequences: the same for each sequence (seconds are those of the whole call); empty inside a sequence.
        accepted_per_step: accepted drafted tokens of each round; only inside a sequence.
    """

    num_new_tokens: int
    num_steps: int
    num_forwards: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    mean_acceptance_length: float
    draft_acceptance_rate: float
    tokens_per_step: float
    tokens_per_forward: float
    acceptance_rate_per_position: dict[str, list[float]]
    seconds: float
    tokens_per_second: float
    num_copied_tokens: int = 0
    num_accepted_copies: int = 0
    sequences: list["DecodeStats"] = field(default_factory=list)
    accepted_per_step: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts."""
        return asdict(self)


def pool(counts: Sequence[SequenceCounts], seconds: float) -> DecodeStats:
    """Figures of all sequences together, and of each."""
    stats = _figures(counts, seconds)
    each = [_figures([one], seconds, accepted_per_step=list(one.accepted)) for one in counts]
    return DecodeStats(**{**vars(stats), "sequences": each})


def _figures(
    counts: Sequence[SequenceCounts], seconds: float, accepted_per_step: list[int] | None = None
) -> DecodeStats:
    rounds = [(a, d) for one in counts for a, d in zip(one.accepted, one.drafted, strict=True)]
    drafts = [(a, d) for a, d in rounds if d > 0]
    num_accepted = sum(a for a, _ in drafts)
    num_drafted = sum(d for _, d in drafts)
    num_verifying = sum(n > 0 for one in counts for n in one.verified_in_all)
    accepted_in_all = sum(sum(one.accepted_in_all) for one in counts)
    forwards = sum(len(one.accepted) * one.forwards_per_step for one in counts)
    tokens = accepted_in_all + forwards
    num_new = sum(one.num_new_tokens for one in counts)
    return DecodeStats(
        num_new_tokens=num_new,
        num_steps=len(rounds),
        num_forwards=forwards + len(counts),
        num_drafts=num_verifying,
        num_draft_tokens=num_drafted,
        num_accepted_tokens=num_accepted,
        mean_acceptance_length=1 + _ratio(accepted_in_all, num_verifying),
        draft_acceptance_rate=_ratio(num_accepted, num_drafted),
        tokens_per_step=_ratio(sum(max(one.num_new_tokens - 1, 0) for one in counts), len(rounds)),
        tokens_per_forward=_ratio(tokens, forwards),
        acceptance_rate_per_position=_rates_per_position(drafts),
        seconds=seconds,
        tokens_per_second=_ratio(num_new, seconds),
        num_copied_tokens=sum(sum(one.copied) for one in counts),
        num_accepted_copies=sum(sum(one.accepted_copies) for one in counts),
        accepted_per_step=accepted_per_step or [],
    )


def _rates_per_position(drafts: Sequence[tuple[int, int]]) -> dict[str, list[float]]:
    K = max((d for _, d in drafts), default=0)
    unconditional, conditional = [], []
    for j in range(1, K + 1):
        accepted = sum(a >= j for a, _ in drafts)
        reached = sum(a >= j - 1 and d >= j for a, d in drafts)
        unconditional.append(_ratio(accepted, len(drafts)))
        conditional.append(_ratio(accepted, reached))
    return {"unconditional": unconditional, "conditional": conditional}


def inside_repetition(token_ids: Sequence[int], max_period_tokens: int = 32, min_span_tokens: int = 8) -> list[bool]:
    """Which tokens lie inside exact repetition.

    A token is inside if it belongs to a span of at least `min_span_tokens`, and of at least 2 p, each token of
    which equals the one p tokens earlier, for some p <= `max_period_tokens`. Loops of a greedy small model flatter
    acceptance; this tells them apart.
    """
    n = len(token_ids)
    inside = [False] * n
    for p in range(1, max_period_tokens + 1):
        start = None
        for i in range(p, n + 1):
            equal = i < n and token_ids[i] == token_ids[i - p]
            if equal and start is None:
                start = i
            elif not equal and start is not None:
                if i - start >= max(min_span_tokens, 2 * p):
                    inside[start:i] = [True] * (i - start)
                start = None
    return inside


def acceptance_everywhere(counts: SequenceCounts) -> tuple[int, int]:
    """(accepted tokens, drafts) of all rounds that verified a draft, or copied tokens."""
    rounds = [(a, d) for a, d in zip(counts.accepted_in_all, counts.verified_in_all, strict=True) if d > 0]
    return sum(a for a, _ in rounds), len(rounds)


def acceptance_outside_repetition(
    prompt_ids: Sequence[int], output_ids: Sequence[int], counts: SequenceCounts
) -> tuple[int, int]:
    """(accepted tokens, drafts) of the rounds whose first verified token lies outside exact repetition."""
    inside = inside_repetition([*prompt_ids, *output_ids])[len(prompt_ids) :]
    accepted = drafts = 0
    verified = counts.forwards_per_step  # index of the first drafted token of the first round; 0 is prefill's token
    for a, d in zip(counts.accepted_in_all, counts.verified_in_all, strict=True):
        if d > 0 and not inside[min(verified, len(inside) - 1)]:
            accepted += a
            drafts += 1
        verified += a + counts.forwards_per_step
    return accepted, drafts


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
