"""Which nodes a dynamic tree has in a step: the likeliest paths of next tokens, as mask rows or a sampler head say.

Knows logits and hidden states of mask rows; no layout, no cache, no verification. All shapes are fixed: which tokens
and parents the nodes have is data.
Legend: B batch, N nodes, K num_speculative_tokens, V vocabulary, S tokens of a shortlist, H width of a hidden state.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from pardec.adapters.head import SamplerHead
from pardec.decoding.drafting import HeadDrafter, pair_scores, scores_pairs
from pardec.decoding.sampling import largest
from pardec.draft_tree import MAX_RANK, DynamicTree
from pardec.target.hidden import rows_of_each

# of log-probabilities: none counts as less than the first, and each as less by the second, so that a path always falls
# behind its own beginning, by more than float32 rounds at the end of the longest; by the third what stands deeper than
# the run was long falls behind all that does not
_LEAST, _STEP, _TOO_DEEP = -100.0, -1e-3, -1e4


@dataclass(frozen=True)
class DrawnTree:
    """The nodes of each sequence's tree, from the likeliest on, parents before children.

    Attributes:
        tokens: shape [B, N], int64; siblings differ.
        parents: row of each node's parent, 0 for the root, shape [B, N], int64.
    """

    tokens: Tensor
    parents: Tensor


@dataclass(frozen=True)
class Drawing:
    """Draws trees of one size on one device.

    Attributes:
        num_nodes: N.
        rows: 1..N, shape [N].
        steps: by length of a run, what is added to the log-probabilities of each depth, shape [K + 1, K].
        least: of them, a number.
        codes: by S, what is added to a path's number among all that one depth offers, see `_nodes`.
        bases: by S, where the shortlist of each path's last token begins among those of all depths.
    """

    num_nodes: int
    rows: Tensor
    steps: Tensor
    least: Tensor
    codes: dict[int, Tensor] = field(default_factory=dict)
    bases: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, tree: DynamicTree, device: torch.device) -> "Drawing":
        """For trees of so many nodes and such a depth."""
        K, rows = tree.num_speculative_tokens, torch.arange(1, tree.num_nodes + 1, device=device)
        exists = torch.arange(K) < torch.arange(K + 1)[:, None]
        steps = torch.where(exists, _STEP, _TOO_DEEP).to(device)
        return cls(tree.num_nodes, rows, steps, torch.tensor(_LEAST, device=device))

    def draw(
        self, head: HeadDrafter | None, logits: Tensor, hidden: Tensor | None, previous: Tensor, length: Tensor
    ) -> DrawnTree:
        """The tree of a run's mask rows.

        Args:
            head: says what follows each token; None where the mask rows alone say it.
            logits: of the mask rows, shape [B, K, V].
            hidden: what the output head read there, shape [B, K, H], where there is a head.
            previous: the token before the first, shape [B].
            length: mask rows that exist, shape [B]; nodes deeper than that are drawn only where there are no others.
        """
        if head is None or hidden is None:
            return self.from_rows(logits, length)
        draw = self.from_pairs if scores_pairs(logits, head.shortlist) else self.from_head
        embed, output_embeddings = head.target.embed, head.tap.output_embeddings
        return draw(head.head, logits, hidden, previous, length, embed, output_embeddings, head.shortlist)

    def from_rows(self, logits: Tensor, length: Tensor) -> DrawnTree:
        """Of tokens that know nothing of each other, as mask rows give them; the likeliest of each, as of a head's."""
        values, ids = largest(logits, min(MAX_RANK + 1, logits.shape[2]))
        scores = self._bounded(values.log_softmax(dim=2, dtype=torch.float32))
        scores = scores + self.steps.index_select(0, length)[:, :, None]
        return self._nodes(ids, lambda depth, places: scores[:, depth, None])

    def from_head(
        self,
        head: SamplerHead,
        logits: Tensor,
        hidden: Tensor,
        bonus: Tensor,
        length: Tensor,
        embed: Callable[[Tensor], Tensor],
        output_embeddings: Tensor,
        shortlist: int,
    ) -> DrawnTree:
        """Of tokens that a sampler head scores behind those before them; depth after depth, all paths of one at once.

        Arguments as in `draw` and `pardec.decoding.drafting.draft_in_turn`.
        """
        values, ids = largest(logits, min(shortlist, logits.shape[2]))
        vectors, read = F.embedding(ids, output_embeddings), head.read(hidden)
        steps = self.steps.index_select(0, length)[:, :, None, None]

        def behind(depth: int, places: Tensor | None) -> Tensor:
            before = bonus[:, None] if places is None else ids[:, depth - 1].gather(1, places)
            corrections = head.correct(read[:, depth, None], embed(before)) @ vectors[:, depth].transpose(1, 2)
            scores = (values[:, depth, None] + corrections).log_softmax(dim=2, dtype=torch.float32)
            return self._bounded(scores) + steps[:, depth]

        return self._nodes(ids, behind)

    def from_pairs(
        self,
        head: SamplerHead,
        logits: Tensor,
        hidden: Tensor,
        bonus: Tensor,
        length: Tensor,
        embed: Callable[[Tensor], Tensor],
        output_embeddings: Tensor,
        shortlist: int,
    ) -> DrawnTree:
        """`from_head` by other means: every shortlist is scored behind each token that may come before it, at once."""
        pairs, ids = pair_scores(head, logits, hidden, bonus, embed, output_embeddings, shortlist)
        scores = self._bounded(pairs.log_softmax(dim=3, dtype=torch.float32))
        scores = scores + self.steps.index_select(0, length)[..., None, None]

        def behind(depth: int, places: Tensor | None) -> Tensor:
            return scores[:, 0, :1] if places is None else rows_of_each(scores[:, depth], places)

        return self._nodes(ids, behind)

    def _bounded(self, log_probs: Tensor) -> Tensor:
        # what mask rows compute may be no number, and parents must come first all the same
        return log_probs.fmax(self.least)

    def _nodes(self, ids: Tensor, behind: Callable[[int, Tensor | None], Tensor]) -> DrawnTree:
        """The N likeliest paths of tokens of the shortlists, shape [B, K, S].

        Of each depth the N likeliest are followed: no node of the tree is left out by that, as before a path of the N
        likeliest there are none but such.

        Args:
            ids: likeliest first.
            behind: log-probabilities of the tokens of depth d + 1 behind those of depth d at some places of its
                shortlist, [B, n] to [B, n or 1, S]; of the first behind the bonus token, None to [B, 1, S].
        """
        (B, K, S), N, widths = ids.shape, self.num_nodes, _widths(ids, self.num_nodes)
        totals, numbers, places = [], [], None
        for depth, width in enumerate(widths):
            scores = behind(depth, places)
            if depth:
                scores = scores + totals[-1][:, :, None]
            total, number = scores.flatten(1).topk(width, dim=1)
            places = number % S if depth else number
            totals.append(total)
            numbers.append(number)
        if S not in self.codes:  # kept for graphs
            # codes: number of the path before it, behind the root that of one more than there are, times S, and place
            count = torch.tensor(widths)
            starts = count.cumsum(0) - count
            codes = [S * int(count.sum()), *(S * starts[:-1]).tolist()]
            self.codes[S] = torch.tensor(codes).repeat_interleave(count).to(ids.device)
            self.bases[S] = (S * torch.arange(K)).repeat_interleave(count).to(ids.device)
        order = torch.cat(totals, dim=1).topk(N, dim=1).indices
        code = (torch.cat(numbers, dim=1) + self.codes[S]).gather(1, order)
        tokens = ids.flatten(1).gather(1, code % S + self.bases[S][order])
        row_of = order.new_zeros(B, sum(widths) + 1).scatter_(1, order, self.rows.expand(B, -1))
        return DrawnTree(tokens, row_of.gather(1, code // S))


def _widths(ids: Tensor, num_nodes: int) -> list[int]:
    """Paths that are followed at each depth."""
    widths, offered = [], 1
    for _ in range(ids.shape[1]):
        offered = min(num_nodes, offered * ids.shape[2])
        widths.append(offered)
    return widths


def most_nodes(num_ranked: int, depth: int, num_nodes: int) -> int:
    """Nodes, up to so many, that there are to be drawn of shortlists of so many tokens."""
    found, offered = 0, 1
    for _ in range(depth):
        offered = min(num_nodes, offered * num_ranked)
        found += offered
    return min(found, num_nodes)
