"""Measures acceptance and cost of ways to decode, predicts the others, and measures the best predicted.

Knows a function that decodes a batch one way and says how long it took; no model, no files.
Legend: K num_speculative_tokens; a shape is given by its block_lengths, see `pardec.layout`; (0,) is plain decoding.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pardec.layout import BlockLengths
from pardec.tuning.chain import best_shapes, conditional_acceptance
from pardec.tuning.choice import (
    PLAIN_WAY,
    Candidate,
    Way,
    Workload,
    choose,
    finalists,
    full_chain,
    monotone_cost,
    predict,
    spread_over_rows,
    with_copies,
)
from pardec.tuning.timing import Call, Decode, Measured, StepCosts, measure_costs, measure_finalists
from pardec.tuning.tree_ways import TreeWays, verifying_ms

# that draft, fused with copied tokens and trees among them: the best of each is measured, if predicted to lose too
_NUM_MODES = 5
_NUM_DYNAMIC_MODES = 2  # besides, with the head
_WAYS_WITH_COPIES = 3  # of each number of copied tokens, beside copies alone
_TREES_WITH_COPIES = 2  # of one number, of which the better is measured

# of what calls emitted, with the head or without, for each of their sequences the ranks, [places, K], and the rows in
# drawn trees, [places, K, K]; None where none are to be tried; see `TreeWays`
Rank = Callable[[bool, Sequence[Call]], tuple[Sequence[np.ndarray], Sequence[np.ndarray] | None]]


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        num_shapes: whose milliseconds per step are measured, beside plain decoding; half of them with the sampler head
            and half without, where there is one.
        num_batches: that they are measured on.
        num_finalists: that are measured on all batches, beside plain decoding, the full chain, and the best of every
            mode with and without the head.
        repetitions: of everything that is timed; medians count.
        copy_tokens: numbers of copied tokens that are tried: alone, and behind the drafts predicted to be fastest.
        copies_beside_tree: whether the best of these is tried beside the tree predicted to be fastest.
        num_trees: whose milliseconds per step are measured besides, with the head and without.
        num_dynamic_trees: likewise, with the head alone; of 0 none is thought of.
    """

    num_shapes: int = 6
    num_batches: int = 3
    num_finalists: int = 3
    repetitions: int = 3
    copy_tokens: tuple[int, ...] = (4, 8, 16)
    copies_beside_tree: bool = True
    num_trees: int = 3
    num_dynamic_trees: int = 3

    def num_shapes_of(self, num_heads: int) -> int:
        """Shapes that are timed with the head, and without, where there are two such ways."""
        return max(self.num_shapes // num_heads, 2)


# dynamic trees accept hardly more than others, as `eval/trees.py` found: not worth a quick look's time
QUICK = Effort(
    num_shapes=3,
    num_batches=2,
    num_finalists=2,
    repetitions=2,
    copy_tokens=(6,),
    num_trees=2,
    num_dynamic_trees=0,
)


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
        return self.of(PLAIN_WAY)

    @property
    def chosen(self) -> Measured:
        """What `choose` takes."""
        return self.of(choose({one.candidate.way: one.tokens_per_second for one in self.measured}))

    def of(self, way: Way) -> Measured:
        """What was measured of a way."""
        return next(one for one in self.measured if one.candidate.way == way)


@dataclass(frozen=True)
class _Acceptance:
    """What the full chain accepted, with the head or without.

    Attributes:
        calls: one for each batch.
        tables: chances of acceptance by K, see `conditional_acceptance`.
        pooled: chances of acceptance by position, over all steps.
        shapes: the best of every number of rows and K.
    """

    calls: list[Call]
    tables: dict[int, np.ndarray]
    pooled: list[float]
    shapes: list[BlockLengths]

    @classmethod
    def of(cls, calls: list[Call], num_speculative_tokens: int) -> "_Acceptance":
        runs = [run for call in calls for run in call.accepted]
        if not any(runs):
            raise ValueError("prompts: expected some that the model continues by more than one token, found none")
        tables = {k: conditional_acceptance(runs, k) for k in range(1, num_speculative_tokens + 1)}
        reached = [sum(a >= j for run in runs for a in run) for j in range(num_speculative_tokens + 1)]
        pooled = [now / before if before else 0.0 for before, now in itertools.pairwise(reached)]
        return cls(calls, tables, pooled, [shape for k in tables for shape in best_shapes(tables[k]).values()])


def max_calls(effort: Effort, num_batches: int, warm_up: int, has_head: bool = False) -> int:
    """At most so many calls of `generate`."""
    few, num_heads = min(effort.num_batches, num_batches), 2 if has_head else 1
    num_timed, num_ways = _ways_in_turn(effort, has_head)
    costs = num_timed * (min(warm_up, few) + 2 * few * effort.repetitions)
    beside = effort.copies_beside_tree and bool(effort.copy_tokens)
    tried = num_heads + len(effort.copy_tokens) * (1 + _WAYS_WITH_COPIES * num_heads) + _TREES_WITH_COPIES * beside
    return tried * num_batches + costs + num_ways * (min(warm_up, num_batches) + num_batches * effort.repetitions)


def max_ways_in_turn(effort: Effort, has_head: bool = False) -> int:
    """At most so many ways take turns under the clock."""
    return max(_ways_in_turn(effort, has_head))


def _ways_in_turn(effort: Effort, has_head: bool) -> tuple[int, int]:
    """At most so many whose steps are timed, and so many finalists."""
    num_heads, num_dynamic = 2 if has_head else 1, effort.num_dynamic_trees if has_head else 0
    num_timed = num_heads * (effort.num_shapes_of(num_heads) + effort.num_trees) + num_dynamic + 1
    beside = effort.copies_beside_tree and bool(effort.copy_tokens)
    finalists = effort.num_finalists + _NUM_MODES * num_heads + _NUM_DYNAMIC_MODES * bool(num_dynamic) + 3 + beside
    return num_timed, finalists


def measure(
    decode: Decode,
    num_batches: int,
    num_speculative_tokens: int,
    max_new_tokens: int,
    effort: Effort,
    warm_up: int,
    has_head: bool = False,
    rank: Rank | None = None,
    max_tree_rows: int = 64,
) -> Findings:
    """Everything that is measured and predicted, whatever `decode` runs.

    Args:
        decode: decodes a batch one way.
        num_batches: that it knows.
        num_speculative_tokens: K of the full chain, the largest that is tried.
        max_new_tokens: for each sequence.
        effort: how much is measured.
        warm_up: batches that every way runs untimed first.
        has_head: whether ways with and without a sampler head differ.
        rank: of what the calls of the full chain emitted; None measures no trees.
        max_tree_rows: rows of the largest tree that is thought of.

    Raises:
        ValueError: if no prompt is continued by more than one token.
    """
    K, heads = num_speculative_tokens, (True, False) if has_head else (True,)
    accepted = {
        head: _Acceptance.of([decode(full_chain(K, head), batch, max_new_tokens) for batch in range(num_batches)], K)
        for head in heads
    }
    calls = accepted[True].calls
    timeable = [batch for batch in range(num_batches) if calls[batch].num_steps]
    few = min(effort.num_batches, len(timeable))
    spread = [timeable[i * len(timeable) // few] for i in range(few)]
    probes = [
        Way("fused", shape, head)
        for head in heads
        for shape in spread_over_rows(accepted[head].shapes, accepted[head].tables, effort.num_shapes_of(len(heads)))
    ]
    trees: list[TreeWays] = []
    for head in heads:
        for one, number in [] if rank is None else _grown(rank, head, accepted[head].calls, max_tree_rows, effort):
            trees.append(one)
            probes += one.probes(number)
    costs = measure_costs(decode, probes, spread, max_new_tokens, effort.repetitions, warm_up)
    workload = Workload(
        new_tokens=[call.new_tokens for call in calls],
        prefill_ms=costs.prefill,
        plain_prefill_ms=costs.plain_prefill,
        waiting=sum(call.num_steps for call in calls) / sum(call.mean_steps for call in calls),
    )
    predicted = [one for head in heads for one in _predicted(accepted[head], costs, workload, head)]

    def seen(ways: Sequence[Way]) -> list[Candidate]:
        return [_seen(way, [decode(way, batch, max_new_tokens) for batch in range(num_batches)], costs) for way in ways]

    copying = seen(_ways_with_copies(predicted, effort.copy_tokens))
    grown = [candidate for one in trees for candidate in one.predicted(costs, workload)]
    beside = seen(_trees_with_copies(grown, copying)) if effort.copies_beside_tree else []
    predicted += [*copying, *grown, *beside]
    plain = predict(PLAIN_WAY, [], costs.plain, workload)
    # plain decoding is the floor, the full chain what would be used untuned
    full = next(one for one in predicted if one.way == full_chain(K))
    candidates = list(dict.fromkeys([*finalists(predicted, effort.num_finalists), full, plain]))
    measured, drift = measure_finalists(
        decode, candidates, costs, range(num_batches), max_new_tokens, effort.repetitions, warm_up
    )
    return Findings(measured, costs, accepted[True].pooled, drift)


def _grown(
    rank: Rank, head: bool, calls: Sequence[Call], max_rows: int, effort: Effort
) -> Iterator[tuple[TreeWays, int]]:
    """Trees of every kind for what these calls, one for each batch, emitted, and how many of them are to be timed."""
    ranks, rows = rank(head, calls)
    yield TreeWays.of(ranks, len(calls), max_rows, head), effort.num_trees
    if rows is not None and effort.num_dynamic_trees:
        yield TreeWays.of_drawn(rows, len(calls), max_rows, head), effort.num_dynamic_trees


def _predicted(accepted: _Acceptance, costs: StepCosts, workload: Workload, head: bool) -> Sequence[Candidate]:
    """Every fused shape worth a thought, and two_pass of every K."""
    fused = [
        predict(
            Way("fused", shape, head),
            accepted.tables[len(shape) - 1],
            monotone_cost(costs.fused(head), len(shape) + sum(shape)),
            workload,
        )
        for shape in accepted.shapes
    ]
    verifying = costs.fused(use_head=not costs.by_rows_without_head)  # which draws no drafts
    two_pass = []
    for k in accepted.tables:
        ms = monotone_cost(costs.fused(head), k + 1) + monotone_cost(verifying, k + 1)
        two_pass.append(predict(Way("two_pass", (k,) * (k + 1), head), accepted.pooled[:k], ms, workload))
    return [*fused, *two_pass]


def _ways_with_copies(predicted: Sequence[Candidate], copy_tokens: Sequence[int]) -> list[Way]:
    """Copies alone, and behind one draft and the fastest drafts, these also with drafts behind the copies."""
    found: dict[Way, None] = {}
    for head in dict.fromkeys(one.way.use_head for one in predicted):
        fused = [one for one in predicted if one.way.mode == "fused" and one.way.use_head is head]
        best = max(fused, key=lambda one: one.tokens_per_second).way
        for number in copy_tokens:
            found[with_copies(PLAIN_WAY, number)] = None
            found[with_copies(full_chain(1, head), number)] = None
            found[with_copies(best, number)] = None
            found[with_copies(best, number, best.num_speculative_tokens)] = None
    return list(found)


def _trees_with_copies(trees: Sequence[Candidate], copying: Sequence[Candidate]) -> list[Way]:
    """As many copies as the best of those tried has, beside the fastest tree, also with drafts behind the copies."""
    if not trees or not copying:
        return []
    best, copies = (max(some, key=lambda one: one.tokens_per_second).way for some in (trees, copying))
    found = [with_copies(best, copies.copy_tokens, length) for length in (0, best.num_speculative_tokens)]
    return list(dict.fromkeys(found))


def _ms_per_step(way: Way, costs: StepCosts) -> tuple[float, float]:
    """Of the steps of a way with copies, and of those in which none are found."""
    drafts, L = way.num_speculative_tokens > 0, way.copy_tokens
    if way.mode == "two_pass":
        drafting = monotone_cost(costs.fused(way.use_head), way.num_speculative_tokens + 1)
        rows = way.num_rows_without_copies - way.num_speculative_tokens - 1
        longer, shorter = (monotone_cost(verifying_ms(costs), rows + more) for more in (L, 0))
        return drafting + longer, drafting + shorter
    by_rows = costs.fused(way.use_head if drafts else not costs.by_rows_without_head, way.kind)
    shorter = monotone_cost(by_rows, way.num_rows_without_copies) if drafts else costs.plain
    return monotone_cost(by_rows, way.num_rows), shorter


def _seen(way: Way, calls: Sequence[Call], costs: StepCosts) -> Candidate:
    """What is predicted for a way by the steps that it took, at what steps of so many rows cost."""
    has_block = way.mode == "fused" and way.num_speculative_tokens > 0
    prefill_ms = costs.prefill if has_block else costs.plain_prefill
    longer, shorter = _ms_per_step(way, costs)
    ms = [call.num_steps * (call.copying * longer + (1 - call.copying) * shorter) for call in calls]
    tokens = sum(n - 1 for call in calls for n in call.new_tokens)
    steps = sum(len(run) for call in calls for run in call.accepted)
    return Candidate(
        way,
        tokens / steps,
        sum(ms) / sum(call.num_steps for call in calls),
        1000 * sum(sum(call.new_tokens) for call in calls) / (len(calls) * prefill_ms + sum(ms)),
    )
