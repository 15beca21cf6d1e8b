"""Which way to decode on a device: cost by rows, prediction, choice.

Knows numbers only; no model, no clock.
Legend: K num_speculative_tokens; a shape is given by its block_lengths, see `pardec.layout`; (0,) is plain decoding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from pardec.draft_tree import AnyTree, DynamicTree
from pardec.layout import PLAIN, BlockLengths, full_blocks
from pardec.tuning import chain

Kind = Literal["chain", "tree", "dynamic tree"]
TREES: tuple[Kind, ...] = ("tree", "dynamic tree")


@dataclass(frozen=True)
class Way:
    """A way to decode.

    Attributes:
        mode: `plain`, `two_pass` or `fused`.
        block_lengths: of a fused step, with one for each copied token; K everywhere for two_pass, (0,) for plain.
        use_head: whether drafts are drawn by the adapter's sampler head, where it has one.
        copy_tokens: copied tokens behind the drafts, or beside the tree.
        tree: of candidates in place of a chain; `block_lengths` are then those of the full chain of its depth, and
            behind the copies of a fused step.
    """

    mode: Literal["plain", "two_pass", "fused"]
    block_lengths: BlockLengths
    use_head: bool = True
    copy_tokens: int = 0
    tree: AnyTree | None = None

    @property
    def num_speculative_tokens(self) -> int:
        """K; 0 for plain decoding, and for copies alone."""
        return max(self.block_lengths)

    @property
    def kind(self) -> Kind:
        """Of what it drafts."""
        if self.tree is None:
            return "chain"
        return "dynamic tree" if isinstance(self.tree, DynamicTree) else "tree"

    @property
    def num_rows(self) -> int:
        """Rows of a step, in two_pass of its two forwards together."""
        return self.num_rows_without_copies + self.copy_tokens + sum(self.block_lengths[self._num_drafting :])

    @property
    def num_rows_without_copies(self) -> int:
        """Rows of a step in which nothing is copied, where the host sees that."""
        drafts = self.num_speculative_tokens if self.tree is None else self.tree.num_nodes
        if self.mode == "two_pass":
            return self._num_drafting + drafts + 1
        return chain.num_rows(self.block_lengths[: self._num_drafting]) if self.tree is None else self.tree.num_rows

    @property
    def _num_drafting(self) -> int:
        """K + 1: block lengths of drafts, those behind copies aside."""
        return self.num_speculative_tokens + 1


PLAIN_WAY = Way("plain", PLAIN)


def full_chain(num_speculative_tokens: int, use_head: bool = True) -> Way:
    """The fused step that drafts K tokens whatever was accepted."""
    return Way("fused", full_blocks(num_speculative_tokens), use_head)


def with_copies(way: Way, copy_tokens: int, block_length: int = 0) -> Way:
    """A way with copied tokens, and where it is fused, as plain decoding then is, blocks of this length behind each."""
    mode: Literal["two_pass", "fused"] = "two_pass" if way.mode == "two_pass" else "fused"
    blocks = (*way.block_lengths, *(block_length,) * copy_tokens * (mode == "fused"))
    return replace(way, mode=mode, block_lengths=blocks, copy_tokens=copy_tokens)


def tree_way(mode: Literal["two_pass", "fused"], tree: AnyTree, use_head: bool = True) -> Way:
    """The way that drafts a tree."""
    return Way(mode, full_blocks(tree.num_speculative_tokens), use_head, tree=tree)


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
    """A way and what is predicted for it.

    Attributes:
        way: to decode.
        tokens_per_step: expected in the long run, bonus token included.
        ms_per_step: of its forwards and what a step does around them.
        tokens_per_second: of whole calls, prefill included.
    """

    way: Way
    tokens_per_step: float
    ms_per_step: float
    tokens_per_second: float


def predict(way: Way, conditional: ArrayLike, ms_per_step: float, workload: Workload) -> Candidate:
    """What decoding the workload this way will give; `conditional` as in `chain`, of shape [K] for two_pass."""
    batches = workload.new_tokens
    longest = max(map(max, batches))
    if way.mode == "plain":
        steps = sum(max(batch) - 1 for batch in batches)
    else:
        by_tokens = (
            chain.expected_rounds(conditional, longest)
            if way.mode == "two_pass"
            else chain.expected_steps(conditional, way.block_lengths, longest)
        )
        means = [np.mean([by_tokens[n - 1] for n in batch]) for batch in batches]
        steps = workload.waiting * float(np.sum(means))
    # a round of two_pass emits a token of the target's own besides
    tokens_per_step = chain.expected_tokens_per_step(conditional, way.block_lengths) + (way.mode == "two_pass")
    return _candidate(way, tokens_per_step, steps, ms_per_step, workload)


def predict_replayed(
    way: Way, accepted: Sequence[Sequence[Sequence[int]]], ms_per_step: float, workload: Workload
) -> Candidate:
    """What decoding this way will give if each step of each sequence of each batch accepts so many drafts."""
    steps = workload.waiting * sum(float(np.mean([len(one) for one in batch])) for batch in accepted)
    counts = [count for batch in accepted for one in batch for count in one]
    tokens_per_step = 1 + (way.mode == "two_pass") + float(np.mean(counts or [0]))
    return _candidate(way, tokens_per_step, steps, ms_per_step, workload)


def _candidate(way: Way, tokens_per_step: float, steps: float, ms_per_step: float, workload: Workload) -> Candidate:
    """With the tokens/s of so many steps of batches, prefill included."""
    batches = workload.new_tokens
    prefill_ms = workload.prefill_ms if way.mode == "fused" else workload.plain_prefill_ms
    seconds = (len(batches) * prefill_ms + steps * ms_per_step) / 1000
    return Candidate(way, tokens_per_step, ms_per_step, sum(map(sum, batches)) / seconds)


def spread_over_rows(
    shapes: Sequence[BlockLengths], tables: Mapping[int, np.ndarray], count: int
) -> list[BlockLengths]:
    """Up to `count` shapes from the fewest rows to the most, each the best of its number of rows."""
    by_rows: dict[int, BlockLengths] = {}
    for shape in sorted(shapes, key=lambda one: chain.expected_tokens_per_step(tables[len(one) - 1], one)):
        by_rows[chain.num_rows(shape)] = shape
    wanted = np.geomspace(min(by_rows), max(by_rows), max(count, 2))
    nearest = {min(by_rows, key=lambda rows: abs(rows - want)) for want in wanted.tolist()}
    return [by_rows[rows] for rows in sorted(nearest)]


def finalists(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """What is worth measuring: the `count` best predicted, and the best of every kind.

    A kind is a mode, with a head or without, a chain, a tree or a dynamic one, with copied tokens or without, and
    copies alone. Of one kind and K only the best counts: neighbours in rows hardly differ.
    """
    best: dict[tuple, Candidate] = {}
    kinds: dict[tuple, Candidate] = {}
    for one in sorted(candidates, key=lambda one: -one.tokens_per_second):
        K, copies = one.way.num_speculative_tokens, one.way.copy_tokens > 0
        kind = (one.way.mode, one.way.use_head, copies, copies and K == 0, one.way.kind)
        best.setdefault((*kind, K), one)
        kinds.setdefault(kind, one)
    return list(dict.fromkeys([*list(best.values())[:count], *kinds.values()]))


def choose(measured_tokens_per_second: Mapping[Way, float]) -> Way:
    """The fastest measured way; plain decoding, which must be among them, unless one is faster."""
    plain = measured_tokens_per_second[PLAIN_WAY]
    best = max(measured_tokens_per_second, key=lambda way: measured_tokens_per_second[way])
    return best if measured_tokens_per_second[best] > plain else PLAIN_WAY
