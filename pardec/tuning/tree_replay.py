"""Decoding with a tree played again on ranks that were measured: how many nodes each step of each text accepts.

What `tree_chain` expects of chances this counts on the texts themselves, so that it knows how easy and hard places
follow each other. Knows numbers only: no model, no device.
Legend: K num_speculative_tokens, T places of a text.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from pardec.draft_tree import DraftTree


class RankReplay:
    """The ranks of some texts, on which trees are tried."""

    def __init__(self, ranks: Sequence[ArrayLike]):
        """Takes the ranks at every place of each text, shape [T, K], as `pardec.measures.ranks.ranks_by_place` does.

        The first place is the prompt's last token, -1 stands where there is no token.

        Raises:
            ValueError: for ranks of another shape, or none.
        """
        self._texts = [np.asarray(one) for one in ranks]
        shapes = [list(one.shape) for one in self._texts]
        if not shapes or any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
            raise ValueError(f"ranks: expected shape [places, K] for each of some texts, found {shapes[:3]}")
        self._lists = [one.tolist() for one in self._texts]  # many trees are tried, each by looking up single numbers

    def accepted(self, tree: DraftTree, num_tokens: Sequence[int], *, two_pass: bool = False) -> list[list[int]]:
        """Accepted nodes of each step of each text, until it has so many new tokens, that of prefill among them.

        Args:
            tree: whose depth is at most K.
            num_tokens: for each text.
            two_pass: a round drafts behind the bonus token of the one before, whatever stood, and emits a token of the
                target's own before the nodes.
        """
        K, depth = self._texts[0].shape[1], tree.num_speculative_tokens
        if depth > K:
            raise ValueError(f"tree: expected a depth of at most {K}, that of the ranks, found {depth}")
        children = [{} for _ in tree.runs]  # by row: rank to row
        for row, (parent, rank) in enumerate(zip(tree.parents, tree.ranks, strict=True), start=1):
            children[parent][rank] = row
        return [
            _steps(tree, children, text, wanted, two_pass) for text, wanted in zip(self._lists, num_tokens, strict=True)
        ]


def _steps(
    tree: DraftTree, children: Sequence[dict[int, int]], ranks: list[list[int]], wanted: int, two_pass: bool
) -> list[int]:
    K, found = tree.num_speculative_tokens, []
    place, num_new, length = int(two_pass), 1, K
    while num_new < wanted and place < len(ranks):
        row = depth = 0
        while depth < length and ranks[place][depth] in children[row]:
            row, depth = children[row][ranks[place][depth]], depth + 1
        found.append(depth)
        num_new += depth + 1 + two_pass
        place += depth + 1 + two_pass
        length = K if two_pass else tree.runs[row]
    return found
