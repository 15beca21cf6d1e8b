"""Ways to decode with trees: which are worth timing and which worth measuring, by where a model's own tokens stand.

Knows numbers only; no model, no clock.
Legend: K num_speculative_tokens, T places of a text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pardec.draft_tree import AnyTree, DynamicTree
from pardec.tuning.choice import Candidate, Kind, Way, Workload, monotone_cost, predict_replayed, tree_way
from pardec.tuning.dynamic_trees import DrawnTexts, best_dynamic_trees
from pardec.tuning.rank_paths import RankPaths
from pardec.tuning.timing import StepCosts
from pardec.tuning.tree_growth import NUM_NODES, GrownTree, best_trees, full_tree
from pardec.tuning.tree_replay import RankReplay


@dataclass(frozen=True)
class TreeWays:
    """Trees of one kind for one way to rank candidates, with the sampler head or without.

    Attributes:
        kind: of the trees.
        use_head: which.
        by_rows: the best fused tree of every number of rows.
        for_two_pass: trees to verify in a forward of their own.
        replay: the texts that they are tried on.
        num_batches: that these make up, evenly.
    """

    kind: Kind
    use_head: bool
    by_rows: dict[int, AnyTree]
    for_two_pass: list[AnyTree]
    replay: RankReplay | DrawnTexts
    num_batches: int

    @classmethod
    def of(cls, ranks: Sequence[np.ndarray], num_batches: int, max_rows: int, use_head: bool) -> "TreeWays":
        """Grows trees of up to so many rows for ranks, shape [T, K] for each text, all batches one after the other."""
        paths = RankPaths.of(np.concatenate(list(ranks)))
        K = paths.num_speculative_tokens
        deep = {full_tree(paths, nodes, depth) for nodes in NUM_NODES for depth in range(1, K + 1)}
        few = [tree for tree in deep if tree is not None and tree.num_nodes < max_rows]
        two_pass = sorted(few, key=lambda tree: (tree.parents, tree.ranks))
        fused = _best_by_rows(best_trees(paths, max_rows))
        return cls("tree", use_head, fused, [*two_pass], RankReplay(ranks), num_batches)

    @classmethod
    def of_drawn(cls, rows: Sequence[np.ndarray], num_batches: int, max_rows: int, use_head: bool) -> "TreeWays":
        """Dynamic trees of up to so many rows, by rows in drawn ones, shape [T, K, K] for each text; as `of`."""
        texts = DrawnTexts(rows)
        grown, depths = best_dynamic_trees(texts, max_rows), range(1, texts.num_speculative_tokens + 1)
        sizes = [(N, depth) for N in NUM_NODES for depth in depths if depth <= N < max_rows]
        two_pass = [DynamicTree((depth,) * (N + 1)) for N, depth in sizes] if grown else []
        return cls("dynamic tree", use_head, _best_by_rows(grown), [*two_pass], texts, num_batches)

    def probes(self, count: int) -> list[Way]:
        """Up to `count` ways to be timed, from the fewest rows to the most."""
        wanted = np.geomspace(min(self.by_rows), max(self.by_rows), max(count, 2)).tolist() if self.by_rows else []
        nearest = {min(self.by_rows, key=lambda rows: abs(rows - want)) for want in wanted}
        return [tree_way("fused", self.by_rows[rows], self.use_head) for rows in sorted(nearest)]

    def predicted(self, costs: StepCosts, workload: Workload) -> list[Candidate]:
        """What decoding with each tree will give that has no more rows than were timed."""
        timed = costs.fused(self.use_head, self.kind)
        if not timed:
            return []
        found = [
            self._predicted(tree_way("fused", tree, self.use_head), monotone_cost(timed, rows), workload)
            for rows, tree in self.by_rows.items()
            if rows <= max(timed)
        ]
        drafting, verifying = costs.fused(self.use_head), verifying_ms(costs)
        for tree in self.for_two_pass:
            if tree.num_nodes + 1 <= max(verifying):
                ms = monotone_cost(drafting, tree.num_speculative_tokens + 1)
                ms += monotone_cost(verifying, tree.num_nodes + 1)
                found.append(self._predicted(tree_way("two_pass", tree, self.use_head), ms, workload))
        return found

    def _predicted(self, way: Way, ms_per_step: float, workload: Workload) -> Candidate:
        new_tokens = [n for batch in workload.new_tokens for n in batch]
        accepted = self.replay.accepted(way.tree, new_tokens, two_pass=way.mode == "two_pass")  # type: ignore[arg-type]
        size = len(accepted) // self.num_batches
        batches = [accepted[start : start + size] for start in range(0, len(accepted), size)]
        return predict_replayed(way, batches, ms_per_step, workload)


def _best_by_rows(grown: Sequence[GrownTree]) -> dict[int, AnyTree]:
    best: dict[int, GrownTree] = {}
    for one in grown:
        rows = one.tree.num_rows
        best[rows] = max(one, best.get(rows, one), key=lambda grown: grown.tokens_per_step)
    return {rows: best[rows].tree for rows in sorted(best)}


def verifying_ms(costs: StepCosts) -> Mapping[int, float]:
    """Milliseconds of a forward that verifies, which draws no drafts, by rows: as chains take, and trees beyond."""
    head = not costs.by_rows_without_head
    chains, trees = costs.fused(head), costs.fused(head, "tree")
    return chains | {rows: ms for rows, ms in trees.items() if rows > max(chains)}
