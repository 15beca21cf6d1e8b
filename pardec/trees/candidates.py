"""Tokens of a tree's nodes: the likeliest ones of mask rows, or what a sampler head finds likeliest behind each parent.

Knows logits and hidden states of mask rows; no layout, no cache, no verification.
Legend: B batch, N nodes, K num_speculative_tokens, V vocabulary, S tokens of a shortlist, H width of a hidden state.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from pardec.adapters.head import SamplerHead
from pardec.decoding.drafting import pair_scores
from pardec.decoding.sampling import largest
from pardec.draft_tree import DraftTree


@dataclass(frozen=True)
class _Level:
    """The nodes of one depth.

    Attributes:
        with_children: places, among the nodes of the depth before, of those that have children, shape [p].
        num_ranks: guesses that are looked at.
        flat: of each node, its place among all guesses behind those parents, in order, shape [n].
    """

    with_children: Tensor
    num_ranks: int
    flat: Tensor


@dataclass(frozen=True)
class TreeCandidates:
    """Which guess each node takes, made once for a tree.

    Attributes:
        num_ranks: guesses of a mask row that are looked at.
        by_rank: of each node, its place among the guesses of all mask rows, shape [N].
        levels: the nodes by depth, from 1 on.
        order: of the nodes in the order of levels, the place of each node, shape [N].
        path_ranks: of each depth, for every node the rank on its path, any behind its end, each of shape [N].
        ends: of each node, its place among the nodes of all depths if each depth had all N, shape [N].
        depths: of the nodes, from 0 on, shape [N].
        sequences: by B, 0..B-1, shape [B, 1].
    """

    num_ranks: int
    by_rank: Tensor
    levels: tuple[_Level, ...]
    order: Tensor
    path_ranks: tuple[Tensor, ...]
    ends: Tensor
    depths: Tensor
    sequences: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, tree: DraftTree, device: torch.device) -> "TreeCandidates":
        """The candidates of a tree on a device."""
        num_ranks, depths = max(tree.ranks) + 1, tree.depths
        by_rank = [(depths[row] - 1) * num_ranks + tree.ranks[row - 1] for row in range(1, len(depths))]
        levels, before, order = [], [0], []
        for depth in range(1, tree.num_speculative_tokens + 1):
            rows = [row for row, found in enumerate(depths) if found == depth]
            above = [tree.parents[row - 1] for row in rows]
            parents = sorted(set(above), key=before.index)
            ranks = [tree.ranks[row - 1] for row in rows]
            flat = [parents.index(row) * (max(ranks) + 1) + rank for row, rank in zip(above, ranks, strict=True)]
            with_children = torch.tensor([before.index(row) for row in parents], device=device)
            levels.append(_Level(with_children, max(ranks) + 1, torch.tensor(flat, device=device)))
            before, order = rows, [*order, *rows]
        K, paths, below = tree.num_speculative_tokens, tree.rank_paths[1:], torch.tensor(depths[1:], device=device) - 1
        padded = torch.tensor([[*path, *(0,) * (K - len(path))] for path in paths], device=device)
        ends = below * tree.num_nodes + torch.arange(tree.num_nodes, device=device)
        places = torch.tensor(order, device=device).argsort()
        by_rank = torch.tensor(by_rank, device=device)
        return cls(num_ranks, by_rank, tuple(levels), places, tuple(padded.T.contiguous()), ends, below)

    def from_rows(self, logits: Tensor) -> Tensor:
        """Nodes by the ranks of mask rows alone, shape [B, N]; `logits` of a run's K mask rows, shape [B, K, V]."""
        return largest(logits, self.num_ranks)[1].flatten(1).index_select(1, self.by_rank)

    def from_head(
        self,
        head: SamplerHead,
        logits: Tensor,
        hidden: Tensor,
        bonus: Tensor,
        embed: Callable[[Tensor], Tensor],
        output_embeddings: Tensor,
        shortlist: int,
    ) -> Tensor:
        """Nodes by the ranks that a sampler head gives a shortlist behind each node's parent, shape [B, N].

        Arguments as in `pardec.decoding.drafting.draft_in_turn`; depth after depth, and all parents of a depth at once.
        """
        values, ids = largest(logits, min(shortlist, logits.shape[2]))
        vectors, read = F.embedding(ids, output_embeddings), head.read(hidden)
        tokens, found = bonus[:, None], []
        for depth, level in enumerate(self.levels):
            before = embed(tokens.index_select(1, level.with_children))  # [B, p, D]
            corrections = head.correct(read[:, depth, None], before) @ vectors[:, depth].transpose(1, 2)
            best = (values[:, depth, None] + corrections).topk(level.num_ranks, dim=2).indices  # [B, p, ranks]
            tokens = ids[:, depth].gather(1, best.flatten(1).index_select(1, level.flat))
            found.append(tokens)
        return torch.cat(found, dim=1).index_select(1, self.order)

    def from_pairs(
        self,
        head: SamplerHead,
        logits: Tensor,
        hidden: Tensor,
        bonus: Tensor,
        embed: Callable[[Tensor], Tensor],
        output_embeddings: Tensor,
        shortlist: int,
    ) -> Tensor:
        """`from_head` by other means: every shortlist is ranked behind each token that may come before it, at once."""
        scores, ids = pair_scores(head, logits, hidden, bonus, embed, output_embeddings, shortlist)
        B, best = len(ids), scores.topk(self.num_ranks, dim=3).indices  # [B, K, S before, ranks]
        if B not in self.sequences:  # kept for graphs
            self.sequences[B] = torch.arange(B, device=ids.device)[:, None]
        sequences, (first, *deeper) = self.sequences[B], self.path_ranks
        # paths of all nodes, from depth to depth; behind the bonus token all lists are the same
        places = [best[:, 0, 0].index_select(1, first)]
        for depth, ranks in enumerate(deeper, start=1):
            places.append(best[:, depth][sequences, places[-1], ranks])
        ends = torch.cat(places, dim=1).index_select(1, self.ends)
        return ids[sequences, self.depths, ends]
