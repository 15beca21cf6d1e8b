"""How likely the target's next tokens are to be guessed on a given path of ranks, from ranks that were measured.

Knows numbers only. A path of ranks names the guess of each depth in turn: (0, 2) is the likeliest token at depth 1 and
the third likeliest at depth 2.
Legend: K num_speculative_tokens, R ranks that are told apart.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

NUM_RANKS = 16  # R: guesses beyond are hardly ever worth a row
# what is known of a depth as a whole counts as much as this many places on a path
_PRIOR_PLACES = 20

RankPath = tuple[int, ...]


@dataclass(frozen=True)
class RankPaths:
    """Chances of paths, from the ranks of the target's own tokens at many places.

    Attributes:
        by_depth: chance of each rank where all tokens before were guessed, shape [K, R].
        counts: places at which the tokens were guessed on each path, that of no token among them.
        reached: of those, places that had a further token.
    """

    by_depth: np.ndarray
    counts: Counter[RankPath]
    reached: Counter[RankPath]

    @classmethod
    def of(cls, ranks: ArrayLike) -> "RankPaths":
        """Counts ranks, shape [places, K]: 0 for the likeliest token, -1 where there is none.

        Raises:
            ValueError: for ranks of another shape, or without a place.
        """
        table = np.asarray(ranks)
        if table.ndim != 2 or 0 in table.shape:
            raise ValueError(f"ranks: expected shape [places, K], found {list(table.shape)}")
        counts: Counter[RankPath] = Counter()
        reached: Counter[RankPath] = Counter()
        hits = np.zeros((table.shape[1], NUM_RANKS))
        met = np.zeros(table.shape[1])
        for row in table.tolist():
            path: RankPath = ()
            counts[path] += 1
            for depth, rank in enumerate(row):
                if rank < 0:
                    break
                reached[path] += 1
                met[depth] += 1
                if rank >= NUM_RANKS:
                    break
                hits[depth, rank] += 1
                path = (*path, rank)
                counts[path] += 1
        return cls(hits / np.maximum(met, 1)[:, None], counts, reached)

    @property
    def num_speculative_tokens(self) -> int:
        """K."""
        return len(self.by_depth)

    def given(self, path: RankPath) -> np.ndarray:
        """Chance of each rank behind a path whose tokens were all guessed, shape [R]; small samples lean on the depth.

        Ranks of one place go together: where the first guess was right, so is the second more often. So a path has
        chances of its own where it was met often enough, instead of a product of those of its depths.
        """
        seen = np.array([self.counts[(*path, rank)] for rank in range(NUM_RANKS)], dtype=float)
        return (seen + _PRIOR_PLACES * self.by_depth[len(path)]) / (self.reached[path] + _PRIOR_PLACES)


def chances_of(paths: RankPaths, rank_paths: Sequence[RankPath]) -> np.ndarray:
    """Chance of each path, shape [n]; the paths of a tree's rows, parents before children, the root's among them."""
    found: dict[RankPath, float] = {(): 1.0}
    behind: dict[RankPath, np.ndarray] = {}
    for path in rank_paths:
        if path and path not in found:
            before = path[:-1]
            if before not in behind:
                behind[before] = paths.given(before)
            found[path] = found[before] * float(behind[before][path[-1]]) if path[-1] < NUM_RANKS else 0.0
    return np.array([found[path] for path in rank_paths])
