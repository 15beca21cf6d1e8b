"""Measures acceptance with the real decoder: the figure that training keeps the best adapter by, and evals report.

Knows a model and prompts of token ids.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from pardec.arguments import integer
from pardec.decoding.stats import (
    DecodeStats,
    SequenceCounts,
    acceptance_everywhere,
    acceptance_outside_repetition,
    pool,
)
from pardec.decoding.verify import Verification
from pardec.measures.share import ALL_OF_IT, Share
from pardec.model import SelfSpeculativeModel

BATCH_SIZE = 16
BOOTSTRAP_SAMPLES = 2000


@dataclass(frozen=True)
class CategoryAcceptance:
    """Acceptance over the prompts of one category; figures as in `Acceptance`."""

    mean_acceptance_length: float
    interval: tuple[float, float]
    num_prompts: int
    num_drafts: int

    def to_dict(self) -> dict[str, object]:
        """Rounded figures for tables and JSON."""
        length, interval = round(self.mean_acceptance_length, 4), [round(x, 4) for x in self.interval]
        return asdict(self) | {"mean_acceptance_length": length, "interval": interval}


@dataclass(frozen=True)
class Acceptance:
    """Acceptance over prompts.

    Attributes:
        stats: pooled figures.
        mean_acceptance_length: 1 + accepted / drafts, all rounds.
        interval: its bootstrap 95 % interval over prompts.
        outside_repetition: the same counting only rounds outside exact repetition; None where there are none.
        outside_interval: its interval.
        token_ids: continuations.
        pairs: (accepted tokens, drafts) of each prompt.
        outside_pairs: the same outside exact repetition.
        by_category: the prompts of each category alone, in the order in which categories are met; empty without any.
    """

    stats: DecodeStats
    mean_acceptance_length: float
    interval: tuple[float, float]
    outside_repetition: float | None
    outside_interval: tuple[float, float] | None
    token_ids: list[list[int]]
    pairs: list[tuple[int, int]]
    outside_pairs: list[tuple[int, int]]
    by_category: dict[str, CategoryAcceptance] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Rounded figures for tables and JSON, with the digest of the continuations that they were counted on."""
        rates = self.stats.acceptance_rate_per_position
        figures: dict[str, object] = {
            "mean_acceptance_length": round(self.mean_acceptance_length, 4),
            "interval": [round(x, 4) for x in self.interval],
            "outside_repetition": None if self.outside_repetition is None else round(self.outside_repetition, 4),
            "outside_interval": self.outside_interval and [round(x, 4) for x in self.outside_interval],
            "tokens_per_step": round(self.stats.tokens_per_step, 4),
            "num_drafts": self.stats.num_drafts,
            "acceptance_rate_per_position": {k: [round(x, 4) for x in v] for k, v in rates.items()},
            "tokens_sha256": digest(self.token_ids),
        }
        if self.by_category:
            figures["by_category"] = {name: one.to_dict() for name, one in self.by_category.items()}
        return figures


@dataclass(frozen=True)
class Decoded:
    """What one batch has come to, of its prompts in order."""

    token_ids: list[list[int]]
    counts: list[SequenceCounts]
    seconds: float


def digest(token_ids: Sequence[Sequence[int]]) -> str:
    """sha256 of lists of token ids: equal for equal lists, on every machine."""
    return hashlib.sha256(json.dumps([list(map(int, ids)) for ids in token_ids]).encode()).hexdigest()


def measure_acceptance(
    model: SelfSpeculativeModel,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    mode: str = "fused",
    num_speculative_tokens: int | None = None,
    use_head: bool | None = None,
    verification: Verification = "token",
    batch_size: int = BATCH_SIZE,
    categories: Sequence[str] | None = None,
    on_batch: Callable[[int], object] = lambda num_prompts: None,
    share: Share = ALL_OF_IT,
) -> Acceptance:
    """Generates from every prompt and counts; arguments as in `generate`.

    Greedy figures depend on nothing but model and prompts. Sampled ones also depend on seed and batch size, by which
    draws are shared out; their law does not.

    Args:
        model: with an adapter.
        prompts: token ids.
        max_new_tokens: see `generate`.
        temperature: see `generate`.
        top_k: see `generate`.
        seed: of the sampling; each batch adds the index of its first prompt.
        mode: see `generate`.
        num_speculative_tokens: see `generate`.
        use_head: see `generate`.
        verification: see `generate`.
        batch_size: prompts decoded together.
        categories: of each prompt; default none.
        on_batch: told the number of prompts of each batch when it is done.
        share: the batches that this process decodes; figures are of all.

    Raises:
        ValueError: if there are no prompts, or not one category for each, and for what `generate` refuses.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one prompt, found none")
    if categories is not None and len(categories) != len(prompts):
        raise ValueError(f"categories: expected {len(prompts)}, one for each prompt, found {len(categories)}")
    batch_size = integer("batch_size", batch_size, 1)
    mine: list[tuple[int, Decoded]] = []
    for start in share.mine(range(0, len(prompts), batch_size)):
        batch = list(prompts[start : start + batch_size])
        out = model.generate(
            batch,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed + start,
            mode=mode,
            num_speculative_tokens=num_speculative_tokens,
            use_head=use_head,
            verification=verification,
        )
        mine.append((start, Decoded(out.token_ids, out.counts, out.stats.seconds)))
        on_batch(len(batch))
    batches = share.of_all(mine)
    tokens = [ids for one in batches for ids in one.token_ids]
    counts = [count for one in batches for count in one.counts]
    return summarise(prompts, tokens, counts, sum(one.seconds for one in batches), categories)


def summarise(
    prompts: Sequence[list[int]],
    outputs: list[list[int]],
    counts: list[SequenceCounts],
    seconds: float,
    categories: Sequence[str] | None = None,
) -> Acceptance:
    """Pools what was generated from each prompt."""
    everywhere = [acceptance_everywhere(one) for one in counts]
    outside = [
        acceptance_outside_repetition(prompt, output, one)
        for prompt, output, one in zip(prompts, outputs, counts, strict=True)
    ]
    stats = pool(counts, seconds)
    has_outside = sum(drafts for _, drafts in outside) > 0
    return Acceptance(
        stats=stats,
        mean_acceptance_length=stats.mean_acceptance_length,
        interval=bootstrap_interval(everywhere),
        outside_repetition=_mean_length(np.array(outside)) if has_outside else None,
        outside_interval=bootstrap_interval(outside) if has_outside else None,
        token_ids=outputs,
        pairs=everywhere,
        outside_pairs=outside,
        by_category=_by_category(everywhere, categories or []),
    )


def _by_category(pairs: Sequence[tuple[int, int]], categories: Sequence[str]) -> dict[str, CategoryAcceptance]:
    found = {}
    for name in dict.fromkeys(categories):
        own = [pair for pair, category in zip(pairs, categories, strict=True) if category == name]
        drafts = sum(drafts for _, drafts in own)
        found[name] = CategoryAcceptance(_mean_length(np.array(own)), bootstrap_interval(own), len(own), drafts)
    return found


def bootstrap_interval(accepted_and_drafts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """95 % interval of 1 + sum of accepted / sum of drafts, resampling prompts."""
    pairs = np.array(accepted_and_drafts)
    draws = np.random.default_rng(0).integers(len(pairs), size=(BOOTSTRAP_SAMPLES, len(pairs)))
    lengths = [_mean_length(pairs[draw]) for draw in draws]
    low, high = np.percentile(lengths, [2.5, 97.5])
    return float(low), float(high)


def _mean_length(pairs: np.ndarray) -> float:
    accepted, drafts = pairs.sum(axis=0)
    return float(1 + accepted / max(drafts, 1))
