"""Dynamic trees: what is expected of every size and of every way to shorten its runs, from texts that were looked at.

Knows numbers only: no model, no device, no cost.
Legend: K num_speculative_tokens, N nodes, T places of a text.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from pardec.draft_tree import DynamicTree
from pardec.tuning.tree_chain import shortened_runs
from pardec.tuning.tree_growth import NUM_NODES, GrownTree


class DrawnTexts:
    """Rows of some texts' own tokens in the trees that are drawn along them, on which dynamic trees are tried."""

    def __init__(self, rows: Sequence[ArrayLike]):
        """Takes the rows of each text, shape [T, K, K], as `pardec.measures.drawn_paths.drawn_rows_by_place` does.

        Raises:
            ValueError: for rows of another shape, or none.
        """
        self._texts = [np.asarray(one) for one in rows]
        shapes = [list(one.shape) for one in self._texts]
        if not shapes or any(len(s) != 3 or s[1] != s[2] or s[1:] != shapes[0][1:] for s in shapes):
            raise ValueError(f"rows: expected shape [places, K, K] for each of some texts, found {shapes[:3]}")
        self._lists = [one.tolist() for one in self._texts]  # many trees are tried, each by looking up single numbers

    @property
    def num_speculative_tokens(self) -> int:
        """K."""
        return self._texts[0].shape[1]

    def accepted(self, tree: DynamicTree, num_tokens: Sequence[int], *, two_pass: bool = False) -> list[list[int]]:
        """Accepted nodes of each step of each text; as `pardec.tuning.tree_replay.RankReplay.accepted`."""
        if tree.num_speculative_tokens > self.num_speculative_tokens:
            raise ValueError(
                f"tree: expected a depth of at most {self.num_speculative_tokens}, that of the rows, found "
                f"{tree.num_speculative_tokens}"
            )
        return [_steps(tree, *one, two_pass) for one in zip(self._lists, num_tokens, strict=True)]

    def ends(self, num_nodes: int, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Of trees of N nodes, at most so deep, by the length of the run that they come from.

        Returns:
            share of places at which a walk ends at each row, [depth + 1, N + 1]; mean accepted nodes, [depth + 1].
        """
        shares, accepted = np.zeros((depth + 1, num_nodes + 1)), np.zeros(depth + 1)
        shares[0, 0] = 1.0
        rows = np.concatenate(self._texts)
        for length in range(1, depth + 1):
            path = rows[:, length - 1, :length]
            path = np.where((path > 0) & (path <= num_nodes), path, 0)
            # a node's parent comes before it, so paths have no gaps, and the deepest node has the last row
            shares[length] = np.bincount(path.max(axis=1), minlength=num_nodes + 1) / len(rows)
            accepted[length] = (path > 0).sum() / len(rows)
        return shares, accepted


def _steps(tree: DynamicTree, rows: list[list[list[int]]], wanted: int, two_pass: bool) -> list[int]:
    K, N, found = tree.num_speculative_tokens, tree.num_nodes, []
    place, num_new, length = int(two_pass), 1, K
    while num_new < wanted and place < len(rows):
        row = depth = 0
        while depth < length and 0 < rows[place][length - 1][depth] <= N:
            row, depth = rows[place][length - 1][depth], depth + 1
        found.append(depth)
        num_new += depth + 1 + two_pass
        place += depth + 1 + two_pass
        length = K if two_pass else tree.runs[row]
    return found


def best_dynamic_trees(
    texts: DrawnTexts, max_rows: int, nodes: Sequence[int] = NUM_NODES
) -> list[GrownTree[DynamicTree]]:
    """For each number of nodes, trees of every number of rows up to `max_rows`, the best that were found.

    Arguments and choice of runs as in `pardec.tuning.tree_growth.best_trees`.
    """
    found: dict[tuple[int, int], GrownTree[DynamicTree]] = {}
    for runs, tokens_per_step in _every_shape(texts, nodes):
        key = len(runs), len(runs) + sum(runs)
        if key[1] <= max_rows and (key not in found or tokens_per_step > found[key].tokens_per_step):
            found[key] = GrownTree(DynamicTree(runs), tokens_per_step)
    return list(found.values())


def _every_shape(texts: DrawnTexts, nodes: Sequence[int]) -> Iterator[tuple[tuple[int, ...], float]]:
    for num_nodes in nodes:
        for depth in range(1, min(texts.num_speculative_tokens, num_nodes) + 1):
            shares, accepted = texts.ends(num_nodes, depth)
            if accepted[depth] > 0:
                yield from shortened_runs(shares, accepted)
