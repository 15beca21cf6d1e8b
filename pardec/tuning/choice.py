"""Which shape of the fused step to use on a device: cost by rows, prediction, choice.

Knows numbers only; no model, no clock.
Legend: a shape is given by its block_lengths, see `pardec.layout`; (0,) is plain decoding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from pardec.layout import PLAIN, BlockLengths
from pardec.tuning.chain import expected_steps, expected_tokens_per_step, num_rows


def monotone_cost(measured_ms: Mapping[int, float], rows: int) -> float:
    """Milliseconds of a step with `rows` rows: linear between measured numbers of rows, never falling.

    Where a measurement falls below that of fewer rows, both take their mean (pool adjacent violators); outside the
    measured range the nearest value holds.

    Args:
        measured_ms: milliseconds per step by number of rows, at least one.
        rows: of the step asked about.
    """
    pools: list[tuple[float, int]] = []  # mean, number of measurements
    places = sorted(measured_ms)
    for place in places:
        pools.append((measured_ms[place], 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (low, n), (high, m) = pools[-2:]
            pools[-2:] = [((low * n + high * m) / (n + m), n + m)]
    values = [mean for mean, count in pools for _ in range(count)]
    return float(np.interp(rows, places, values))


@dataclass(frozen=True)
class Workload:
    """What is to be decoded, as far as time depends on it.

    Attributes:
        new_tokens: of each sequence of each batch.
        prefill_ms: per batch, with what else a call costs once, when tokens are drafted.
        plain_prefill_ms: the same in plain decoding.
        waiting: steps of a batch per step of its mean sequence, as a batch runs until its last sequence is done.
    """

    new_tokens: Sequence[Sequence[int]]
    prefill_ms: float
    plain_prefill_ms: float
    waiting: float = 1.0


@dataclass(frozen=True)
class Candidate:
    """A shape and what is predicted for it.

    Attributes:
        block_lengths: (0,) for plain decoding.
        tokens_per_step: expected in the long run, bonus token included.
        ms_per_step: of one forward and what a step does around it.
        tokens_per_second: of whole calls, prefill included.
    """

    block_lengths: BlockLengths
    tokens_per_step: float
    ms_per_step: float
    tokens_per_second: float


def predict(block_lengths: BlockLengths, conditional: ArrayLike, ms_per_step: float, workload: Workload) -> Candidate:
    """What decoding the workload with this shape will give."""
    batches = workload.new_tokens
    if block_lengths == PLAIN:
        prefill_ms, steps = workload.plain_prefill_ms, sum(max(batch) - 1 for batch in batches)
    else:
        by_tokens = expected_steps(conditional, block_lengths, max(map(max, batches)))
        means = [np.mean([by_tokens[n - 1] for n in batch]) for batch in batches]
        prefill_ms, steps = workload.prefill_ms, workload.waiting * float(np.sum(means))
    seconds = (len(batches) * prefill_ms + steps * ms_per_step) / 1000
    tokens_per_step = expected_tokens_per_step(conditional, block_lengths)
    return Candidate(block_lengths, tokens_per_step, ms_per_step, sum(map(sum, batches)) / seconds)


def spread_over_rows(
    shapes: Sequence[BlockLengths], tables: Mapping[int, np.ndarray], count: int
) -> list[BlockLengths]:
    """Up to `count` shapes from the fewest rows to the most, each the best of its number of rows."""
    by_rows: dict[int, BlockLengths] = {}
    for shape in sorted(shapes, key=lambda one: expected_tokens_per_step(tables[len(one) - 1], one)):
        by_rows[num_rows(shape)] = shape
    wanted = np.geomspace(min(by_rows), max(by_rows), max(count, 2))
    nearest = {min(by_rows, key=lambda rows: abs(rows - want)) for want in wanted.tolist()}
    return [by_rows[rows] for rows in sorted(nearest)]


def finalists(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """The `count` best predicted of those that are the best of their K: neighbours in rows hardly differ."""
    best: dict[int, Candidate] = {}
    for candidate in sorted(candidates, key=lambda one: -one.tokens_per_second):
        best.setdefault(len(candidate.block_lengths), candidate)
    return list(best.values())[:count]


def choose(measured_tokens_per_second: Mapping[BlockLengths, float]) -> BlockLengths:
    """The fastest measured shape; plain decoding, which must be among them, unless one is faster."""
    plain = measured_tokens_per_second[PLAIN]
    best = max(measured_tokens_per_second, key=lambda shape: measured_tokens_per_second[shape])
    return best if measured_tokens_per_second[best] > plain else PLAIN
