"""The shape of a tree of drafts: which nodes there are, which guess each of them takes, and where drafting goes on.

`DraftTree` says all of it before decoding; of a `DynamicTree` every step says anew which nodes there are.

Knows numbers only. Rows count from the root, row 0, which is the bonus token; nodes are rows 1..N.
Legend: N nodes, K num_speculative_tokens, which is the depth of the deepest node.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pardec.arguments import integer
from pardec.errors import shown
from pardec.layout import MAX_SPECULATIVE_TOKENS, BlockLengths, check_block_lengths

MAX_NODES = 512  # walking a tree compares every node with every other
MAX_RANK = 63  # of guesses, the likeliest being 0; shortlists of sampler heads end there


@dataclass(frozen=True)
class DraftTree:
    """A tree of candidates that one forward verifies, and the mask tokens behind each of its nodes.

    A node at depth d holds the token of its rank among those that mask token d of the last run, or a sampler head
    behind the node's parent, finds likeliest. The next drafts come from the run behind the node where verification
    ended; nodes deeper than that run was long are dead for one step. Runs of two_pass, which drafts in a forward of its
    own, do not count.

    Attributes:
        parents: row of each node's parent, N >= 1 numbers, each below the node's own row.
        ranks: of each node's token, 0 for the likeliest; siblings differ.
        runs: mask tokens behind each row, the root's first, N + 1 numbers in 0..K of which K is the largest.

    Raises:
        ValueError: for numbers that are no such tree, naming what was expected and found.

    Source: PPD, arXiv:2405.18628, section 3; Medusa, arXiv:2401.10774, for trees of guesses by rank.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    runs: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("parents", "ranks", "runs"):
            object.__setattr__(self, name, _integers(name, getattr(self, name)))
        N = len(self.parents)
        if not 1 <= N <= MAX_NODES:
            raise ValueError(f"tree: expected 1 to {MAX_NODES} nodes, found {N}")
        if (len(self.ranks), len(self.runs)) != (N, N + 1):
            raise ValueError(
                f"tree: expected {N} ranks and {N + 1} runs for {N} nodes, found {len(self.ranks)} and {len(self.runs)}"
            )
        for row, (parent, rank) in enumerate(zip(self.parents, self.ranks, strict=True), start=1):
            if not 0 <= parent < row:
                raise ValueError(f"tree: expected a parent from 0 to {row - 1} for node {row}, found {parent}")
            if not 0 <= rank <= MAX_RANK:
                raise ValueError(f"tree: expected ranks from 0 to {MAX_RANK}, found {rank} for node {row}")
        if len(set(zip(self.parents, self.ranks, strict=True))) < N:
            raise ValueError("tree: expected another rank for each child of a node, found two of one rank")
        K = self.num_speculative_tokens
        if K > MAX_SPECULATIVE_TOKENS:
            raise ValueError(f"tree: expected a depth of at most {MAX_SPECULATIVE_TOKENS}, found {K}")
        if min(self.runs) < 0 or max(self.runs) != K:
            raise ValueError(f"tree: expected runs from 0 to its depth {K}, which is the largest, found {self.runs}")

    @classmethod
    def chain(cls, block_lengths: Sequence[int]) -> "DraftTree":
        """The chain of these block lengths: one child each, the likeliest token everywhere.

        Raises:
            ValueError: for what are no block lengths, or those of plain decoding.
        """
        blocks: BlockLengths = check_block_lengths(_integers("runs", block_lengths))
        K = len(blocks) - 1
        return cls(tuple(range(K)), (0,) * K, blocks)

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.parents)

    @property
    def num_rows(self) -> int:
        """Rows of a fused step."""
        return len(self.runs) + sum(self.runs)

    @property
    def depths(self) -> tuple[int, ...]:
        """Of the rows, N + 1 numbers; 0 of the root."""
        return tuple(len(path) - 1 for path in self.paths)

    @property
    def num_speculative_tokens(self) -> int:
        """K."""
        return max(self.depths)

    @property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """Rows from the root to each row, both of them included."""
        found: list[tuple[int, ...]] = [(0,)]
        for row, parent in enumerate(self.parents, start=1):
            found.append((*found[parent], row))
        return tuple(found)

    @property
    def rank_paths(self) -> tuple[tuple[int, ...], ...]:
        """Ranks on the way to each row, that of the row the last; empty for the root."""
        return tuple(tuple(self.ranks[row - 1] for row in path[1:]) for path in self.paths)


@dataclass(frozen=True)
class DynamicTree:
    """A tree of candidates that every step draws anew: the paths of tokens that its drafts make the likeliest.

    A path is as likely as the product of what the mask rows of the last run, or a sampler head behind each token, give
    its tokens; the N likeliest are the nodes, no deeper than the run was long. Which tokens they hold, and behind which
    parents, is data; their number, and the mask tokens behind each, are not. Exact as any tree is: it is a function of
    what was committed. Runs of two_pass, which drafts in a forward of its own, do not count.

    Attributes:
        runs: mask tokens behind each row, the root's first and then the nodes' from the likeliest on, N + 1 numbers in
            0..K of which K, the depth that the tree may have, is the largest; N >= K.

    Raises:
        ValueError: for numbers that are no such tree, naming what was expected and found.

    Source: EAGLE-2, arXiv:2406.16858, section 4 (dynamic draft trees).
    """

    runs: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", _integers("runs", self.runs))
        N = self.num_nodes
        if not 1 <= N <= MAX_NODES:
            raise ValueError(f"tree: expected 1 to {MAX_NODES} nodes, a run for each and the root's, found {max(N, 0)}")
        K = self.num_speculative_tokens
        if min(self.runs) < 0 or not 1 <= K <= min(N, MAX_SPECULATIVE_TOKENS):
            most = min(N, MAX_SPECULATIVE_TOKENS)
            raise ValueError(f"tree: expected runs from 0 to a depth of 1 to {most}, found {shown(self.runs)}")

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.runs) - 1

    @property
    def num_rows(self) -> int:
        """Rows of a fused step."""
        return len(self.runs) + sum(self.runs)

    @property
    def num_speculative_tokens(self) -> int:
        """K."""
        return max(self.runs, default=0)


AnyTree = DraftTree | DynamicTree


def _integers(name: str, values: Any) -> tuple[int, ...]:
    """As plain numbers of Python: layouts and tables are made of them, and a tree may be a key."""
    try:
        return tuple(integer(name, value, -(2**63)) for value in values)
    except (TypeError, ValueError):
        raise ValueError(f"tree: expected integers as {name}, found {shown(values)}") from None
