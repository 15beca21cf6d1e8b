"""Times ways to decode on batches of prompts, in turn, so that they share the machine's moods.

Knows a function that decodes a batch one way and says how long it took; no model, no files. Time is that of whole
calls, so it contains whatever a step costs, and steps are timed as the difference of long and short calls.
"""

import itertools
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from pardec.tuning.choice import PLAIN_WAY, TREES, Candidate, Kind, Way

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Call:
    """What a call of `generate` did with one batch.

    Attributes:
        seconds: of all of it.
        new_tokens: emitted by each sequence.
        accepted: drafts in each step of each sequence.
        token_ids: emitted by each sequence; empty where nobody asks.
        copying: share of the steps that had rows of copied tokens, which are left out on a CPU where nothing is copied.
    """

    seconds: float
    new_tokens: list[int]
    accepted: list[list[int]]
    token_ids: list[list[int]] = field(default_factory=list)
    copying: float = 1.0

    @property
    def num_steps(self) -> int:
        """Steps of the batch, which runs until its last sequence is done."""
        return max(map(len, self.accepted))

    @property
    def mean_steps(self) -> float:
        """Steps of the mean sequence."""
        return statistics.fmean(map(len, self.accepted))


# (way, index of the batch, max_new_tokens)
Decode = Callable[[Way, int, int], Call]


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
        by_rows: of fused steps, by number of rows; by the head's drafts, where there is one.
        plain: of a step of plain decoding.
        prefill: of a call that drafts, before its first step.
        plain_prefill: the same of plain decoding.
        by_rows_without_head: of fused steps that leave out the head that there is.
        by_rows_of_trees: of fused steps of trees, by kind and by whether they use the head, and then by number of rows.
    """

    by_rows: dict[int, float]
    plain: float
    prefill: float
    plain_prefill: float
    by_rows_without_head: dict[int, float] = field(default_factory=dict)
    by_rows_of_trees: dict[tuple[Kind, bool], dict[int, float]] = field(default_factory=dict)

    def fused(self, use_head: bool, kind: Kind = "chain") -> dict[int, float]:
        """Of fused steps of one kind by number of rows; those of trees may be empty."""
        if kind != "chain":
            return self.by_rows_of_trees.get((kind, use_head), {})
        return self.by_rows if use_head else self.by_rows_without_head


def measure_costs(
    decode: Decode,
    ways: Sequence[Way],
    batches: Sequence[int],
    max_new_tokens: int,
    repetitions: int,
    warm_up: int,
) -> StepCosts:
    """Milliseconds per step of plain decoding and of some fused ways: long calls less calls that end with prefill.

    A way's cost is the median of its ratios to plain decoding of the same batch at about the same time.
    """
    both = [PLAIN_WAY, *ways]
    _warm_up(decode, both, batches[:warm_up], max_new_tokens)
    keys = [(way, batch, n) for batch in batches for way in both for n in (max_new_tokens, 1)]
    calls = in_turn(lambda key: decode(*key), keys, repetitions)

    def step_ms(way: Way) -> list[float]:
        return [
            1000 * max(long.seconds - short.seconds, 1e-6) / max(long.num_steps, 1)
            for batch in batches
            for long, short in zip(calls[way, batch, max_new_tokens], calls[way, batch, 1], strict=True)
        ]

    def prefill_ms(ways: Iterable[Way]) -> float:
        pairs = itertools.product(ways, batches)
        return 1000 * statistics.median(call.seconds for way, batch in pairs for call in calls[way, batch, 1])

    plain = step_ms(PLAIN_WAY)

    def by_rows(use_head: bool, kind: Kind = "chain") -> dict[int, float]:
        return {
            way.num_rows: statistics.median(plain)
            * statistics.median(ms / base for ms, base in zip(step_ms(way), plain, strict=True))
            for way in ways
            if (way.use_head, way.kind) == (use_head, kind)
        }

    return StepCosts(
        by_rows=by_rows(True),
        plain=statistics.median(plain),
        prefill=prefill_ms(ways),
        plain_prefill=prefill_ms([PLAIN_WAY]),
        by_rows_without_head=by_rows(False),
        by_rows_of_trees={
            (kind, head): found
            for kind, head in itertools.product(TREES, (True, False))
            if (found := by_rows(head, kind))
        },
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
    ways = [candidate.way for candidate in candidates]
    _warm_up(decode, ways, batches[:warm_up], max_new_tokens)
    keys = [(way, batch, max_new_tokens) for batch in batches for way in ways]
    calls = in_turn(lambda key: decode(*key), keys, repetitions)

    def seen(way: Way) -> list[Call]:
        return [median_call(calls[way, batch, max_new_tokens]) for batch in batches]

    predicted_plain = next(one for one in candidates if one.way == PLAIN_WAY).tokens_per_second
    drift = tokens_per_second(seen(PLAIN_WAY)) / predicted_plain
    measured = []
    for candidate in candidates:
        mine = seen(candidate.way)
        drafts = candidate.way.mode == "fused" and candidate.way.num_speculative_tokens > 0
        prefill_ms = (costs.prefill if drafts else costs.plain_prefill) / drift
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


def in_turn(run: Callable[[Key], Call], keys: Sequence[Key], repetitions: int) -> dict[Key, list[Call]]:
    """Calls for each key; every other repetition runs backwards, so that drift cancels."""
    calls: dict[Key, list[Call]] = {key: [] for key in keys}
    for repetition in range(repetitions):
        for key in keys if repetition % 2 == 0 else reversed(keys):
            calls[key].append(run(key))
    return calls


def median_call(calls: Sequence[Call]) -> Call:
    """The first of equal calls, with their median time."""
    return replace(calls[0], seconds=statistics.median(call.seconds for call in calls))


def _warm_up(decode: Decode, ways: Iterable[Way], batches: Iterable[int], max_new_tokens: int) -> None:
    """Runs everything untimed: what is captured, compiled or allocated once is no step's cost."""
    for way, batch in itertools.product(ways, batches):
        decode(way, batch, max_new_tokens)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
