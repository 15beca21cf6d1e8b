"""Times shapes of the fused step on batches of prompts, predicts the others, and measures the best predicted.

Knows a function that decodes a batch with a shape and says how long it took; no model, no files. Time is that of whole
calls, so it contains whatever a step costs, and steps are timed as the difference of long and short calls.
Legend: K num_speculative_tokens; a shape is given by its block_lengths, see `pardec.layout`; (0,) is plain decoding.
"""

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from pardec.layout import PLAIN, BlockLengths, full_blocks
from pardec.tuning.chain import best_shapes, conditional_acceptance, num_rows
from pardec.tuning.choice import Candidate, Workload, choose, finalists, monotone_cost, predict, spread_over_rows


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        num_shapes: whose milliseconds per step are measured, beside plain decoding.
        num_batches: that they are measured on.
        num_finalists: that are measured on all batches, beside plain decoding and the full chain.
        repetitions: of everything that is timed; medians count.
    """

    num_shapes: int = 6  # with plain decoding no more than a model keeps engines for
    num_batches: int = 3
    num_finalists: int = 3
    repetitions: int = 3


QUICK = Effort(num_shapes=3, num_batches=2, num_finalists=2, repetitions=2)


@dataclass(frozen=True)
class Call:
    """What a call of `generate` did with one batch.

    Attributes:
        seconds: of all of it.
        new_tokens: emitted by each sequence.
        accepted: drafts in each step of each sequence.
    """

    seconds: float
    new_tokens: list[int]
    accepted: list[list[int]]

    @property
    def num_steps(self) -> int:
        """Steps of the batch, which runs until its last sequence is done."""
        return max(map(len, self.accepted))

    @property
    def mean_steps(self) -> float:
        """Steps of the mean sequence."""
        return statistics.fmean(map(len, self.accepted))


# (block_lengths, index of the batch, max_new_tokens)
Decode = Callable[[BlockLengths, int, int], Call]


@dataclass(frozen=True)
class Measured:
    """A candidate and what it did.

    Attributes:
        candidate: with what was predicted, at the speed that the machine had when this was measured.
        tokens_per_second: of whole calls, prefill included.
        ms_per_step: without prefill.
        tokens_per_step: of the mean sequence.
    """

    candidate: Candidate
    tokens_per_second: float
    ms_per_step: float
    tokens_per_step: float


@dataclass(frozen=True)
class StepCosts:
    """Milliseconds of a step and of what comes before the first one.

    Attributes:
        by_rows: of fused steps, by number of rows.
        plain: of a step of plain decoding.
        prefill: of a call that drafts, before its first step.
        plain_prefill: the same of plain decoding.
    """

    by_rows: dict[int, float]
    plain: float
    prefill: float
    plain_prefill: float


@dataclass(frozen=True)
class Findings:
    """What `measure` found.

    Attributes:
        measured: all that was measured on all prompts, fastest first.
        costs: of steps.
        conditional_acceptance: of the full chain by position, over all its steps.
        drift: speed of plain decoding in the last part, relative to when steps were timed; 1 on a quiet machine.
    """

    measured: list[Measured]
    costs: StepCosts
    conditional_acceptance: list[float]
    drift: float

    @property
    def plain(self) -> Measured:
        """Plain decoding."""
        return next(one for one in self.measured if one.candidate.block_lengths == PLAIN)

    @property
    def chosen(self) -> Measured:
        """What `choose` takes."""
        shape = choose({one.candidate.block_lengths: one.tokens_per_second for one in self.measured})
        return next(one for one in self.measured if one.candidate.block_lengths == shape)


def max_calls(effort: Effort, num_batches: int, warm_up: int) -> int:
    """At most so many calls of `generate`."""
    few = min(effort.num_batches, num_batches)
    costs = (effort.num_shapes + 1) * (min(warm_up, few) + 2 * few * effort.repetitions)
    final = (effort.num_finalists + 2) * (min(warm_up, num_batches) + num_batches * effort.repetitions)
    return num_batches + costs + final


def measure(
    decode: Decode, num_batches: int, num_speculative_tokens: int, max_new_tokens: int, effort: Effort, warm_up: int
) -> Findings:
    """Everything that is measured and predicted, whatever `decode` runs.

    Args:
        decode: decodes a batch with a shape; (0,) is plain.
        num_batches: that it knows.
        num_speculative_tokens: K of the full chain, the largest that is tried.
        max_new_tokens: for each sequence.
        effort: how much is measured.
        warm_up: batches that every shape runs untimed first.
    """
    K = num_speculative_tokens
    calls = [decode(full_blocks(K), batch, max_new_tokens) for batch in range(num_batches)]
    runs = [run for call in calls for run in call.accepted]
    if not any(runs):
        raise ValueError("prompts: expected some that the model continues by more than one token, found none")
    tables = {k: conditional_acceptance(runs, k) for k in range(1, K + 1)}
    shapes = [shape for k in tables for shape in best_shapes(tables[k]).values()]
    timeable = [batch for batch in range(num_batches) if calls[batch].num_steps]
    few = min(effort.num_batches, len(timeable))
    spread = [timeable[i * len(timeable) // few] for i in range(few)]
    probes = spread_over_rows(shapes, tables, effort.num_shapes)
    costs = measure_costs(decode, probes, spread, max_new_tokens, effort.repetitions, warm_up)
    workload = Workload(
        new_tokens=[call.new_tokens for call in calls],
        prefill_ms=costs.prefill,
        plain_prefill_ms=costs.plain_prefill,
        waiting=sum(call.num_steps for call in calls) / sum(call.mean_steps for call in calls),
    )

    def predicted(shape: BlockLengths) -> Candidate:
        if shape == PLAIN:
            return predict(shape, [], costs.plain, workload)
        return predict(shape, tables[len(shape) - 1], monotone_cost(costs.by_rows, num_rows(shape)), workload)

    chosen = finalists([predicted(shape) for shape in shapes], effort.num_finalists)
    # plain decoding is the floor, the full chain what would be used untuned
    extra = [predicted(shape) for shape in (full_blocks(K), PLAIN) if shape not in {c.block_lengths for c in chosen}]
    measured, drift = measure_finalists(
        decode, [*chosen, *extra], costs, range(num_batches), max_new_tokens, effort.repetitions, warm_up
    )
    pooled = [_ratio(sum(a >= j for r in runs for a in r), sum(a >= j - 1 for r in runs for a in r)) for j in tables]
    return Findings(measured, costs, pooled, drift)


def measure_costs(
    decode: Decode,
    shapes: Sequence[BlockLengths],
    batches: Sequence[int],
    max_new_tokens: int,
    repetitions: int,
    warm_up: int,
) -> StepCosts:
    """Milliseconds per step of plain decoding and of some shapes: long calls less calls that end with prefill.

    A shape's cost is the median of its ratios to plain decoding of the same batch at about the same time.
    """
    both = [PLAIN, *shapes]
    _warm_up(decode, both, batches[:warm_up], max_new_tokens)
    keys = [(shape, batch, n) for batch in batches for shape in both for n in (max_new_tokens, 1)]
    calls = _repeated(decode, keys, repetitions)

    def step_ms(shape: BlockLengths) -> list[float]:
        return [
            1000 * max(long.seconds - short.seconds, 1e-6) / max(long.num_steps, 1)
            for batch in batches
            for long, short in zip(calls[shape, batch, max_new_tokens], calls[shape, batch, 1], strict=True)
        ]

    def prefill_ms(shapes: Iterable[BlockLengths]) -> float:
        pairs = itertools.product(shapes, batches)
        return 1000 * statistics.median(call.seconds for shape, batch in pairs for call in calls[shape, batch, 1])

    plain = step_ms(PLAIN)
    ratios = {
        shape: statistics.median(ms / base for ms, base in zip(step_ms(shape), plain, strict=True)) for shape in shapes
    }
    return StepCosts(
        by_rows={num_rows(shape): ratios[shape] * statistics.median(plain) for shape in shapes},
        plain=statistics.median(plain),
        prefill=prefill_ms(shapes),
        plain_prefill=prefill_ms([PLAIN]),
    )


def measure_finalists(
    decode: Decode,
    candidates: Sequence[Candidate],
    costs: StepCosts,
    batches: Sequence[int],
    max_new_tokens: int,
    repetitions: int,
    warm_up: int,
) -> tuple[list[Measured], float]:
    """Runs the candidates on every batch in turn, so that they share the machine's moods.

    Predictions are scaled by the drift of plain decoding, which must be among the candidates: that the machine has
    become slower or faster since its steps were timed is not their matter.

    Returns:
        The candidates, fastest first, and the drift.
    """
    shapes = [candidate.block_lengths for candidate in candidates]
    _warm_up(decode, shapes, batches[:warm_up], max_new_tokens)
    calls = _repeated(decode, [(shape, batch, max_new_tokens) for batch in batches for shape in shapes], repetitions)

    def seen(shape: BlockLengths) -> list[Call]:
        return [_median_call(calls[shape, batch, max_new_tokens]) for batch in batches]

    predicted_plain = next(one for one in candidates if one.block_lengths == PLAIN).tokens_per_second
    drift = tokens_per_second(seen(PLAIN)) / predicted_plain
    measured = []
    for candidate in candidates:
        mine = seen(candidate.block_lengths)
        prefill_ms = (costs.plain_prefill if candidate.block_lengths == PLAIN else costs.prefill) / drift
        ms_after_prefill = sum(1000 * call.seconds - prefill_ms for call in mine)
        tokens_after_prefill = sum(n - 1 for call in mine for n in call.new_tokens)
        at_this_speed = replace(
            candidate,
            ms_per_step=candidate.ms_per_step / drift,
            tokens_per_second=candidate.tokens_per_second * drift,
        )
        measured.append(
            Measured(
                at_this_speed,
                tokens_per_second=tokens_per_second(mine),
                ms_per_step=_ratio(ms_after_prefill, sum(call.num_steps for call in mine)),
                tokens_per_step=_ratio(tokens_after_prefill, sum(len(run) for call in mine for run in call.accepted)),
            )
        )
    return sorted(measured, key=lambda one: -one.tokens_per_second), drift


def tokens_per_second(calls: Sequence[Call]) -> float:
    """Of whole calls, prefill included."""
    return sum(sum(call.new_tokens) for call in calls) / sum(call.seconds for call in calls)


def _warm_up(decode: Decode, shapes: Iterable[BlockLengths], batches: Iterable[int], max_new_tokens: int) -> None:
    """Runs everything untimed: what is captured, compiled or allocated once is no step's cost."""
    for shape, batch in itertools.product(shapes, batches):
        decode(shape, batch, max_new_tokens)


def _repeated(
    decode: Decode, keys: Sequence[tuple[BlockLengths, int, int]], repetitions: int
) -> dict[tuple[BlockLengths, int, int], list[Call]]:
    """Calls for each key; every other repetition runs backwards, so that drift cancels."""
    calls: dict[tuple[BlockLengths, int, int], list[Call]] = {key: [] for key in keys}
    for repetition in range(repetitions):
        for key in keys if repetition % 2 == 0 else reversed(keys):
            calls[key].append(decode(*key))
    return calls


def _median_call(calls: Sequence[Call]) -> Call:
    return replace(calls[0], seconds=statistics.median(call.seconds for call in calls))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
