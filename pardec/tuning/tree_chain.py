"""Expected tokens per step of a tree of drafts: a step goes no deeper than the run was long where the last one ended.

Knows probabilities only: no model, no device, no cost.
Legend: K num_speculative_tokens, N nodes; `chances` are those of the rows' paths, N + 1 numbers, 1 for the root.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pardec.draft_tree import DraftTree

_DISCOUNT = 1 - 1e-8  # gives the long-run average to about 1e-8, whether or not the chain is ergodic


@dataclass(frozen=True)
class TreeChain:
    """The Markov chain of a tree over the lengths of the runs that drafts come from.

    Attributes:
        ends: chance that a step ends at each row, by the length of the run that its nodes come from, shape
            [K + 1, N + 1].
        depths: of the rows, shape [N + 1].
        runs: behind the rows, shape [N + 1].
    """

    ends: np.ndarray
    depths: np.ndarray
    runs: np.ndarray

    @classmethod
    def of(cls, parents: Sequence[int], depths: Sequence[int], runs: Sequence[int], chances: np.ndarray) -> "TreeChain":
        """The chain of a tree whose paths have these chances."""
        depth, K = np.array(depths), max(depths)
        alive = depth[None] <= np.arange(K + 1)[:, None]
        reached = np.where(alive, chances, 0.0)
        onward = reached[:, 1:] @ np.eye(len(depth))[np.array(parents, dtype=int)]
        return cls(np.maximum(reached - onward, 0.0), depth, np.array(runs))

    @property
    def accepted(self) -> np.ndarray:
        """Expected accepted nodes by the length of the run that they come from, shape [K + 1]."""
        return self.ends @ self.depths

    @property
    def tokens_per_step(self) -> float:
        """Expected tokens that a step emits in the long run, bonus token included."""
        return 1.0 + float(_shares(self.ends, self.runs) @ self.accepted)

    def expected_steps(self, num_tokens: int) -> np.ndarray:
        """Expected steps that emit the first n tokens after that of prefill, n = 0..num_tokens: [num_tokens + 1]."""
        K = len(self.ends) - 1
        joint = np.zeros((K + 1, K + 1, K + 1))  # by run, accepted nodes and next run
        for row, (depth, run) in enumerate(zip(self.depths, self.runs, strict=True)):
            joint[:, depth, run] += self.ends[:, row]
        steps = np.zeros((num_tokens + 1, K + 1))
        for n in range(1, num_tokens + 1):
            left = np.maximum(n - 1 - np.arange(K + 1), 0)
            steps[n] = 1 + np.einsum("sak,ak->s", joint, steps[left])
        return steps[:, K]


def chain_of(tree: DraftTree, chances: np.ndarray) -> TreeChain:
    """The chain of a tree whose rows have these chances."""
    return TreeChain.of(tree.parents, tree.depths, tree.runs, chances)


def shortened_runs(ends: np.ndarray, accepted: np.ndarray) -> Iterator[tuple[tuple[int, ...], float]]:
    """Runs behind the rows of a tree, whole ones first and one mask token less each time, with tokens per step.

    A run is shortened where that costs least: where a step seldom ends, and a deeper tree brings little. The root's is
    kept whole.

    Args:
        ends: chance that a step ends at each row, by the length of the run that its nodes come from, [K + 1, N + 1].
        accepted: expected accepted nodes, likewise, shape [K + 1].
    """
    gained, runs = np.diff(accepted, prepend=0.0), np.full(ends.shape[1], len(ends) - 1)
    while True:
        shares = _shares(ends, runs)
        yield tuple(runs.tolist()), 1.0 + float(shares @ accepted)
        loss = (shares @ ends) * gained[runs]
        loss[0], loss[runs == 0] = np.inf, np.inf
        if not np.isfinite(loss).any():
            return
        runs[int(np.argmin(loss))] -= 1


def _shares(ends: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """Long-run share of steps whose nodes come from a run of each length, shape [K + 1]; prefill's is whole."""
    K = len(ends) - 1
    # chance that drafts from a run of one length are followed by those from one of another, [K + 1, K + 1]
    transitions = np.stack([ends[:, runs == length].sum(axis=1) for length in range(K + 1)], axis=1)
    visits = np.linalg.solve((np.eye(K + 1) - _DISCOUNT * transitions).T, np.eye(K + 1)[K])
    return (1 - _DISCOUNT) * visits
