"""Chains and trees side by side: which shapes are compared, what is expected of them, and what they accept.

Knows a model and prompts; chooses shapes on some and measures on others.
Legend: K num_speculative_tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pardec.decoding.stats import SequenceCounts
from pardec.draft_tree import AnyTree, DraftTree, DynamicTree
from pardec.layout import BlockLengths
from pardec.measures.acceptance import Acceptance, summarise
from pardec.measures.drawn_paths import drawn_rows_by_place
from pardec.measures.ranks import ranks_by_place
from pardec.model import SelfSpeculativeModel
from pardec.tuning.chain import best_shapes, conditional_acceptance, num_rows
from pardec.tuning.dynamic_trees import DrawnTexts, best_dynamic_trees
from pardec.tuning.rank_paths import RankPaths
from pardec.tuning.tree_growth import GrownTree, best_trees, full_tree
from pardec.tuning.tree_replay import RankReplay

_NUM_REPLAYED = 12  # of the trees of about so many rows, those that promise most


@dataclass(frozen=True)
class Setting:
    """How texts are decoded.

    Attributes:
        name: of the way to choose tokens.
        max_new_tokens: of each.
        sampling: arguments of `generate`; none for greedy.
        use_head: whether the sampler head drafts, where there is one.
        batch_size: prompts decoded together.
    """

    name: str
    max_new_tokens: int
    sampling: dict[str, Any]
    use_head: bool | None
    batch_size: int


@dataclass(frozen=True)
class Shape:
    """A shape of fused steps.

    Attributes:
        kind: `chain`, `tree of N` with whole runs, or `tree` of the best runs, and the same of a `dynamic tree`.
        rows: of a step.
        tree: also that of a chain, of one child each.
        block_lengths: of a chain; None for a tree.
    """

    kind: str
    rows: int
    tree: AnyTree
    block_lengths: BlockLengths | None = None


class RankedTexts:
    """What a model goes on with behind some prompts, and where that stands in its drafts."""

    def __init__(
        self, model: SelfSpeculativeModel, prompts: Sequence[list[int]], setting: Setting, seed: int, num_nodes: int
    ):
        """Decodes plainly, a few tokens further than is counted, so that the last steps find what they would accept.

        `num_nodes` = of the largest dynamic tree.
        """
        assert model.adapter is not None
        self.new_tokens = setting.max_new_tokens
        beyond, continuations = model.adapter.metadata.num_speculative_tokens + 1, []
        for start in range(0, len(prompts), setting.batch_size):
            out = model.generate(
                list(prompts[start : start + setting.batch_size]),
                max_new_tokens=setting.max_new_tokens + beyond,
                mode="plain",
                seed=seed + start,
                **setting.sampling,
            )
            continuations += out.token_ids
        self.lengths = [min(len(ids), setting.max_new_tokens) for ids in continuations]
        self._continuations = continuations
        ranks = ranks_by_place(model, prompts, continuations, use_head=setting.use_head)
        self.ranks = [one.numpy() for one in ranks]
        self._replay = RankReplay(self.ranks)
        rows = drawn_rows_by_place(model, prompts, continuations, num_nodes, use_head=setting.use_head)
        self.drawn = DrawnTexts([one.numpy() for one in rows])

    def expected(self, tree: AnyTree) -> float:
        """Mean acceptance length of decoding these texts with a tree, bonus token included."""
        return 1 + float(np.mean([count for one in self.runs(tree) for count in one]))

    def runs(self, tree: AnyTree) -> list[list[int]]:
        """Accepted nodes of each step of each text."""
        if isinstance(tree, DynamicTree):
            return self.drawn.accepted(tree, self.lengths)
        return self._replay.accepted(tree, self.lengths)

    def replayed(self, prompts: Sequence[list[int]], tree: AnyTree) -> Acceptance:
        """What decoding these texts, behind their prompts, with a tree accepts, as if it had been done."""
        counts = [
            SequenceCounts(accepted, [tree.num_speculative_tokens] * len(accepted), length)
            for accepted, length in zip(self.runs(tree), self.lengths, strict=True)
        ]
        tokens = [ids[:length] for ids, length in zip(self._continuations, self.lengths, strict=True)]
        return summarise(prompts, tokens, counts, 1.0)


def shapes_of(texts: RankedTexts, nodes: Sequence[int], rows: Sequence[int]) -> list[Shape]:
    """The best chain and tree of up to each number of rows, and trees of so many nodes with the whole run behind each.

    Args:
        texts: that shapes are chosen on.
        nodes: of trees with whole runs.
        rows: of chains and trees.
    """
    paths = RankPaths.of(np.concatenate(texts.ranks))
    K = paths.num_speculative_tokens
    found = []
    for number in nodes:
        tree = full_tree(paths, number)
        if tree is not None and tree.num_nodes == number:
            found.append(Shape(f"tree of {number}", tree.num_rows, tree))
            drawn = DynamicTree((tree.num_speculative_tokens,) * (number + 1))  # as many nodes, rows and levels
            found.append(Shape(f"dynamic tree of {number}", drawn.num_rows, drawn))
    accepted = texts.runs(DraftTree.chain((K,) * (K + 1)))
    chains = [one for k in range(1, K + 1) for one in best_shapes(conditional_acceptance(accepted, k)).values()]
    grown: dict[str, list[GrownTree]] = {
        "tree": [*best_trees(paths, max(rows))],
        "dynamic tree": [*best_dynamic_trees(texts.drawn, max(rows))],
    }
    for limit in rows:
        small = [one for one in chains if num_rows(one) <= limit]
        if small:
            best = max(small, key=lambda one: texts.expected(DraftTree.chain(one)))
            found.append(Shape("chain", num_rows(best), DraftTree.chain(best), best))
        for kind, trees in grown.items():
            fitting = [one for one in trees if limit / 2 < one.tree.num_rows <= limit]
            likely = sorted(fitting, key=lambda one: -one.tokens_per_step)[:_NUM_REPLAYED]
            wide = max((one.tree for one in likely), key=texts.expected, default=None)
            if wide is not None:
                found.append(Shape(kind, wide.num_rows, wide))
    return list(dict.fromkeys(found))


def measured_row(
    model: SelfSpeculativeModel,
    prompts: Sequence[list[int]],
    shape: Shape,
    setting: Setting,
    texts: RankedTexts,
    seed: int,
    on_batch: Callable[[int], object],
    most_rows: int,
) -> tuple[dict[str, Any], Acceptance]:
    """What a shape accepts, beside what its texts let expect: a row, and what it comes from.

    A shape of more than `most_rows` rows is not decoded with: what is expected stands for it.
    """
    is_decoded = shape.rows <= most_rows
    found = (
        _decoded(model, prompts, shape, setting, seed, on_batch) if is_decoded else texts.replayed(prompts, shape.tree)
    )
    row = {
        "law": setting.name,
        "kind": shape.kind,
        "rows": shape.rows,
        "nodes": shape.tree.num_nodes,
        "depth": shape.tree.num_speculative_tokens,
        "block_lengths": shape.block_lengths and list(shape.block_lengths),
        "expected": round(texts.expected(shape.tree), 4),
        "measured": round(found.mean_acceptance_length, 4) if is_decoded else None,
        "interval": [round(x, 4) for x in found.interval],
        "outside_repetition": None if found.outside_repetition is None else round(found.outside_repetition, 4),
        "tokens_per_step": round(found.stats.tokens_per_step, 4),
    }
    return row, found


def _decoded(
    model: SelfSpeculativeModel,
    prompts: Sequence[list[int]],
    shape: Shape,
    setting: Setting,
    seed: int,
    on_batch: Callable[[int], object],
) -> Acceptance:
    tokens, counts, seconds = [], [], 0.0
    for start in range(0, len(prompts), setting.batch_size):
        out = model.generate(
            list(prompts[start : start + setting.batch_size]),
            max_new_tokens=setting.max_new_tokens,
            seed=seed + start,
            mode="fused",
            use_head=setting.use_head,
            block_lengths=shape.block_lengths,
            tree=None if shape.block_lengths is not None else shape.tree,
            **setting.sampling,
        )
        tokens += out.token_ids
        # a step behind an empty run verifies nothing, and costs as much as any other
        counts += [replace(one, drafted=[max(drafted, 1) for drafted in one.drafted]) for one in out.counts]
        seconds += out.stats.seconds
        on_batch(len(out.token_ids))
    return summarise(prompts, tokens, counts, seconds)


def gain_over(chain: Acceptance, other: Acceptance, *, num_samples: int = 2000) -> dict[str, Any]:
    """Gain of accepted length outside repetition over the chain's on the same prompts, with a paired 95 % interval."""
    pairs = np.array([[*a, *b] for a, b in zip(chain.outside_pairs, other.outside_pairs, strict=True)], dtype=float)
    draws = np.random.default_rng(0).integers(len(pairs), size=(num_samples, len(pairs)))

    def gain(chosen: np.ndarray) -> float:
        a, n, b, m = chosen.sum(axis=0)
        return (1 + b / max(m, 1)) / (1 + a / max(n, 1)) - 1

    low, high = np.percentile([gain(pairs[draw]) for draw in draws], [2.5, 97.5])
    return {"gain": round(gain(pairs), 4), "gain_interval": [round(float(low), 4), round(float(high), 4)]}
