"""Expected tokens per step of a fused chain with unequal blocks, and the best blocks for every number of rows.

Knows probabilities only: no model, no device, no cost.
Legend: K num_speculative_tokens, M shapes, each given by its block_lengths, see `pardec.layout`.
`conditional` is the chance that draft j is accepted given that those before it were: shape [K], or [K + 1, K] with
one row for each number of drafts that the step before accepted.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from pardec.layout import BlockLengths, check_block_lengths

# all shapes are tried up to this K: 5 ** 5 = 3,125 of them at most
EXHAUSTIVE_K = 4
# on 1,000 random laws of K = 3 and 4 the best shape was found for 99.9 % of the numbers of rows, else one within 1 %
BEAM_WIDTH = 64
# the chance over all rows counts as much as this many rounds of one row
_PRIOR_ROUNDS = 10
_DISCOUNT = 1 - 1e-8  # gives the long-run average to about 1e-8, whether or not the chain is ergodic


# ---------------------------------------------------------------------- expected tokens


def num_rows(block_lengths: Sequence[int]) -> int:
    """Rows of a fused step: K + 1 real ones and the mask rows."""
    return len(block_lengths) + sum(block_lengths)


def conditional_acceptance(runs: Sequence[Sequence[int]], num_speculative_tokens: int) -> np.ndarray:
    """Chances of acceptance by position and by what the step before accepted, from decoding with a full chain.

    After many accepted drafts the next ones are likelier to be accepted, which decides where to prune.

    Args:
        runs: accepted drafts in each step of each sequence, decoded with a full chain of at least K.
        num_speculative_tokens: K; what was accepted beyond it is ignored.

    Returns:
        Shape [K + 1, K]. Small samples are drawn towards the chance over all rows.
    """
    K = num_speculative_tokens
    reached, accepted = np.zeros((K + 1, K)), np.zeros((K + 1, K))
    for run in runs:
        for before, now in itertools.pairwise(min(count, K) for count in run):
            reached[before, : now + 1] += 1
            accepted[before, :now] += 1
    pooled = accepted.sum(0) / np.maximum(reached.sum(0), 1)
    return (accepted + _PRIOR_ROUNDS * pooled) / (reached + _PRIOR_ROUNDS)


def expected_tokens_per_step(conditional: ArrayLike, block_lengths: Sequence[int]) -> float:
    """Tokens that a step emits in the long run, bonus token included, beginning with K drafts after prefill.

    The number of accepted drafts is a Markov chain: it decides how many are drafted, hence how many can be accepted.

    Raises:
        ValueError: if block lengths or chances cannot be what they are said to be.
    """
    K = len(check_block_lengths(block_lengths)) - 1
    return 1.0 if K == 0 else float(_long_run_tokens(_table(conditional, K), np.array([block_lengths]))[0])


def expected_steps(conditional: ArrayLike, block_lengths: Sequence[int], num_tokens: int) -> np.ndarray:
    """Expected steps that emit the first n tokens after that of prefill, n = 0..num_tokens; shape [num_tokens + 1].

    Unlike a division by the tokens per step it counts what the last step emits in vain.
    """
    K = len(check_block_lengths(block_lengths)) - 1
    if K == 0:
        return np.arange(num_tokens + 1, dtype=float)
    table = _table(conditional, K)
    chances = _transitions(table, np.array([block_lengths]))[0]
    # steps[n, a]: to emit n tokens when the step before accepted a; those before n = 0 stand for too many tokens
    steps = np.zeros((K + 1 + num_tokens, K + 1))
    first = _first_step(table)
    found, accepted = np.zeros(num_tokens + 1), np.arange(K + 1)
    for n in range(1, num_tokens + 1):
        after = steps[K + n - 1 - accepted, accepted]
        steps[K + n] = 1 + chances @ after
        found[n] = 1 + first @ after
    return found


def expected_rounds(conditional: ArrayLike, num_tokens: int) -> np.ndarray:
    """Expected rounds of two_pass that emit the first n tokens after that of prefill, n = 0..num_tokens.

    A round emits a token of the target's own, the accepted drafts and a bonus token; it drafts K in any case.

    Args:
        conditional: shape [K].
        num_tokens: shape of the result less one.
    """
    chances = _first_step(_table(conditional, np.asarray(conditional).shape[-1]))
    found = np.zeros(num_tokens + 1)
    for n in range(1, num_tokens + 1):
        left = np.maximum(n - 2 - np.arange(len(chances)), 0)
        found[n] = 1 + chances @ found[left]
    return found


def _table(conditional: ArrayLike, K: int) -> np.ndarray:
    table = np.asarray(conditional, dtype=float)
    if table.ndim == 1 and table.shape[0] >= K:
        table = np.tile(table[:K], (K + 1, 1))
    if table.shape != (K + 1, K):
        raise ValueError(f"conditional: expected shape [{K}] or [{K + 1}, {K}], found {list(table.shape)}")
    if not ((table >= 0) & (table <= 1)).all():
        raise ValueError(f"conditional: expected probabilities, found {table.min()} to {table.max()}")
    return table


def _transitions(table: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Chance to accept a' after a; blocks of shape [M, K + 1], result [M, K + 1, K + 1]."""
    K = table.shape[1]
    # a draft that does not exist is never accepted
    chances = np.where(np.arange(K) < blocks[:, :, None], table, 0)
    end = np.zeros((*chances.shape[:2], 1))
    reached = np.cumprod(np.concatenate([end + 1, chances], axis=2), axis=2)
    return reached * (1 - np.concatenate([chances, end], axis=2))


def _first_step(table: np.ndarray) -> np.ndarray:
    """Chance to accept a of the K drafts of prefill, shape [K + 1]."""
    K = table.shape[1]
    return _transitions(table, np.full((1, K + 1), K))[0, K]


def _long_run_tokens(table: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Expected tokens per step of each of M shapes; blocks [M, K + 1], result [M]."""
    K = table.shape[1]
    system = np.eye(K + 1) - _DISCOUNT * _transitions(table, blocks)
    values = np.linalg.solve(system, np.arange(K + 1.0)[None, :, None])[..., 0]
    return 1 + (1 - _DISCOUNT) * values @ _first_step(table)


# ---------------------------------------------------------------------- search


def best_shapes(conditional: ArrayLike) -> dict[int, BlockLengths]:
    """For every number of rows, the shape of exactly this K with the most expected tokens per step.

    All shapes are tried up to K = `EXHAUSTIVE_K`. Beyond, rows are removed from the full chain one at a time, keeping
    the best `BEAM_WIDTH` shapes each time; then the best of each number of rows is improved by exchanging rows between
    two blocks.

    Args:
        conditional: its last dimension is K >= 1.
    """
    K = np.asarray(conditional).shape[-1]
    table = _table(conditional, K)
    if K > EXHAUSTIVE_K:
        return {num_rows(shape): _improved(table, shape) for shape in _pruned(table)}
    shapes = np.array([shape for shape in itertools.product(range(K + 1), repeat=K + 1) if max(shape) == K])
    ordered = shapes[np.argsort(_long_run_tokens(table, shapes), kind="stable")]
    return {num_rows(shape): tuple(shape) for shape in ordered.tolist()}  # later ones are better


def _pruned(table: np.ndarray) -> list[BlockLengths]:
    """The best shape found at each number of rows, from the full chain down to a single block."""
    K = table.shape[1]
    beam, found = np.full((1, K + 1), K), []
    while len(beam):
        found.append(tuple(beam[0].tolist()))
        fewer = (beam[:, None] - np.eye(K + 1, dtype=int)).reshape(-1, K + 1)
        fewer = np.unique(fewer[(fewer.min(1) >= 0) & (fewer.max(1) == K)], axis=0)
        beam = fewer[np.argsort(-_long_run_tokens(table, fewer), kind="stable")[:BEAM_WIDTH]]
    return found


def _improved(table: np.ndarray, shape: BlockLengths) -> BlockLengths:
    """The shape after moving a row from one block to another, or swapping two, for as long as that brings tokens."""
    K = table.shape[1]
    while True:
        near = [shape]
        for i, j in itertools.permutations(range(K + 1), 2):
            near.append(_replaced(shape, {i: shape[j], j: shape[i]}))
            near.append(_replaced(shape, {i: shape[i] - 1, j: shape[j] + 1}))
        near = [one for one in near if max(one) == K and min(one) >= 0]
        tokens = _long_run_tokens(table, np.array(near))
        best = int(np.argmax(tokens))
        if tokens[best] - tokens[0] < 1e-9:
            return shape
        shape = near[best]


def _replaced(shape: BlockLengths, changes: Mapping[int, int]) -> BlockLengths:
    return tuple(changes.get(i, length) for i, length in enumerate(shape))
