"""The best trees for every number of nodes and rows, from the chances of paths of ranks.

Knows probabilities only: no model, no device, no cost.
Legend: K num_speculative_tokens, N nodes.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pardec.draft_tree import AnyTree, DraftTree
from pardec.tuning.rank_paths import RankPath, RankPaths, chances_of
from pardec.tuning.tree_chain import TreeChain, shortened_runs

NUM_NODES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


Shape = TypeVar("Shape", bound=AnyTree)


@dataclass(frozen=True)
class GrownTree(Generic[Shape]):
    """A tree and what is expected of it.

    Attributes:
        tree: its shape.
        tokens_per_step: expected in the long run, bonus token included.
    """

    tree: Shape
    tokens_per_step: float


def grow(paths: RankPaths, num_nodes: int, depth: int) -> list[RankPath]:
    """The paths of greatest chance, the root's first, parents before children.

    A path is never likelier than its beginning, so taking the best that may follow what was taken is best altogether.

    Args:
        paths: chances.
        num_nodes: N, the root aside; fewer are returned where no others have a chance.
        depth: of the deepest, at most.

    Source: PPD, arXiv:2405.18628, section 4; Sequoia, arXiv:2402.12374, for the greedy choice.
    """
    taken: list[RankPath] = [()]
    heap: list[tuple[float, RankPath]] = []

    def offer(path: RankPath, chance: float) -> None:
        if len(path) < depth:
            for rank, given in enumerate(paths.given(path).tolist()):
                if given > 0:
                    heapq.heappush(heap, (-chance * given, (*path, rank)))

    offer((), 1.0)
    while heap and len(taken) <= num_nodes:
        negative, path = heapq.heappop(heap)
        taken.append(path)
        offer(path, -negative)
    return taken


def tree_of(rank_paths: Sequence[RankPath], runs: dict[RankPath, int]) -> DraftTree:
    """The tree of these paths, that of the root among them, with runs behind them.

    The likeliest path comes first and in order, so that where it is accepted nothing has to move in the cache.
    """
    first: list[RankPath] = [()]
    path: RankPath = ()
    while (*path, 0) in rank_paths:
        path = (*path, 0)
        first.append(path)
    ordered = [*first, *sorted((one for one in rank_paths if one not in first), key=lambda one: (len(one), one))]
    rows = {path: row for row, path in enumerate(ordered)}
    return DraftTree(
        parents=tuple(rows[path[:-1]] for path in ordered[1:]),
        ranks=tuple(path[-1] for path in ordered[1:]),
        runs=tuple(runs[path] for path in ordered),
    )


def best_trees(paths: RankPaths, max_rows: int, nodes: Sequence[int] = NUM_NODES) -> list[GrownTree[DraftTree]]:
    """For each number of nodes, trees of every number of rows up to `max_rows`, the best that were found.

    Runs are shortened one mask token at a time where that costs least: where a step seldom ends, and a deeper tree
    brings little. The root's is kept whole.

    Args:
        paths: chances.
        max_rows: of a fused step.
        nodes: numbers of nodes, root aside.
    """
    found: dict[tuple[int, int], GrownTree[DraftTree]] = {}
    for num_nodes in nodes:
        for depth in range(1, paths.num_speculative_tokens + 1):
            taken = grow(paths, num_nodes, depth)
            if max(map(len, taken)) < depth:
                continue
            rows = {path: row for row, path in enumerate(taken)}
            parents, depths = [rows[path[:-1]] for path in taken[1:]], [len(path) for path in taken]
            chain = TreeChain.of(parents, depths, [depth] * len(taken), chances_of(paths, taken))
            for runs, tokens_per_step in shortened_runs(chain.ends, chain.accepted):
                num_rows = len(runs) + sum(runs)
                best = found.get((len(runs), num_rows))
                if num_rows <= max_rows and (best is None or tokens_per_step > best.tokens_per_step):
                    tree = tree_of(taken, dict(zip(taken, runs, strict=True)))
                    found[len(runs), num_rows] = GrownTree(tree, tokens_per_step)
    return list(found.values())


def full_tree(paths: RankPaths, num_nodes: int, depth: int | None = None) -> DraftTree | None:
    """The best tree of so many nodes, at most so deep, with the whole run behind each; arguments as in `grow`.

    None where no guess of the first depth has a chance.
    """
    taken = grow(paths, num_nodes, depth or paths.num_speculative_tokens)
    K = max(map(len, taken))
    if not K:
        return None
    return tree_of(taken, dict.fromkeys(taken, K))
