"""Measures acceptance with the real decoder: the figure that training keeps the best adapter by, and evals report.

Knows a model and prompts of token ids.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pardec.model import GenerationOutput, SelfSpeculativeModel
from pardec.stats import DecodeStats, SequenceCounts, acceptance_outside_repetition, pool

BOOTSTRAP_SAMPLES = 2000


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
    """

    stats: DecodeStats
    mean_acceptance_length: float
    interval: tuple[float, float]
    outside_repetition: float | None
    outside_interval: tuple[float, float] | None
    token_ids: list[list[int]]

    def to_dict(self) -> dict[str, object]:
        """Rounded figures for tables and JSON."""
        rates = self.stats.acceptance_rate_per_position
        return {
            "mean_acceptance_length": round(self.mean_acceptance_length, 4),
            "interval": [round(x, 4) for x in self.interval],
            "outside_repetition": None if self.outside_repetition is None else round(self.outside_repetition, 4),
            "outside_interval": self.outside_interval and [round(x, 4) for x in self.outside_interval],
            "num_drafts": self.stats.num_drafts,
            "acceptance_rate_per_position": {k: [round(x, 4) for x in v] for k, v in rates.items()},
        }


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
    batch_size: int = 16,
    on_batch: Callable[[int], None] = lambda num_prompts: None,
) -> Acceptance:
    """Generates from every prompt and counts; arguments as in `generate`.

    Args:
        model: with an adapter.
        prompts: token ids.
        max_new_tokens: see `generate`.
        temperature: see `generate`.
        top_k: see `generate`.
        seed: of the sampling; each batch adds its index.
        mode: see `generate`.
        num_speculative_tokens: see `generate`.
        batch_size: prompts decoded together.
        on_batch: told the number of prompts of each batch when it is done.
    """
    counts: list[SequenceCounts] = []
    outputs: list[list[int]] = []
    seconds = 0.0
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        out: GenerationOutput = model.generate(
            batch,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed + start,
            mode=mode,
            num_speculative_tokens=num_speculative_tokens,
        )
        counts += out.counts
        outputs += out.token_ids
        seconds += out.stats.seconds
        on_batch(len(batch))
    return summarise(prompts, outputs, counts, seconds)


def summarise(
    prompts: Sequence[list[int]], outputs: list[list[int]], counts: list[SequenceCounts], seconds: float
) -> Acceptance:
    """Pools what was generated from each prompt."""
    everywhere = [
        (sum(a for a, d in zip(one.accepted, one.drafted, strict=True) if d), sum(d > 0 for d in one.drafted))
        for one in counts
    ]
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
    )


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
