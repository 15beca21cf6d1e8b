"""A sampler head at work on one model: its weights there, what it reads, and what it scores.

Knows no layout, no cache and no verification. Legend: B batch, K num_speculative_tokens, V vocabulary,
S tokens of a shortlist, H width of the hidden state, D width of an input embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pardec.adapters.adapter import Adapter, AdapterError
from pardec.adapters.head import SamplerHead
from pardec.decoding.sampling import TokenLaw, largest, likeliest
from pardec.decoding.verify import sample_from
from pardec.target.forward import TargetModel
from pardec.target.hidden import HiddenTap, rows_of_each

# that are scored at once; bounds memory, and what is computed for pairs that no draft takes
_MOST_PAIRED_TOKENS = 8192


@dataclass(frozen=True)
class HeadDrafter:
    """Drafts with a sampler head.

    Attributes:
        target: the frozen model.
        head: in the target's dtype and on its device.
        tap: what the target's output head reads; attached while forwards run.
        shortlist: tokens of each mask row that are scored.
    """

    target: TargetModel
    head: SamplerHead
    tap: HiddenTap
    shortlist: int

    @classmethod
    def of(cls, adapter: Adapter, target: TargetModel) -> "HeadDrafter | None":
        """The drafter of an adapter; None if it has no head.

        Raises:
            AdapterError: if the head is for hidden states or embeddings of other widths.
            ValueError: if the target has no output head with a weight matrix.
        """
        if adapter.head is None or adapter.metadata.head is None:
            return None
        tap = HiddenTap(target.base)
        D, H = target.embedding_dim, tap.output_embeddings.shape[1]
        found_h = adapter.head["outer.weight"].shape[0]
        found_d = adapter.head["inner.weight"].shape[1] - found_h
        if (found_h, found_d) != (H, D):
            raise AdapterError(
                f"head: expected hidden states of width {H} and embeddings of width {D}, found {found_h} and {found_d}"
            )
        with torch.device("meta"):  # draws no first numbers, which would be taken from whoever trains meanwhile
            head = SamplerHead(H, D, adapter.metadata.head.width)
        head.load_state_dict(adapter.head, assign=True)
        head = head.to(target.device, target.dtype).eval().requires_grad_(False)
        return cls(target, head, tap, adapter.metadata.head.shortlist)

    def draft(self, law: TokenLaw, logits: Tensor, hidden: Tensor, previous: Tensor) -> tuple[Tensor, Tensor | None]:
        """Drafts from a block's rows and their law q; see `draft_in_turn` and `draft_from_pairs`.

        Args:
            law: how tokens are chosen.
            logits: shape [B, K, V].
            hidden: shape [B, K, H].
            previous: the token before the first draft, shape [B].
        """
        draft = draft_from_pairs if scores_pairs(logits, self.shortlist) else draft_in_turn
        return draft(
            self.head, law, logits, hidden, previous, self.target.embed, self.tap.output_embeddings, self.shortlist
        )


def scores_pairs(logits: Tensor, shortlist: int) -> bool:
    """Whether mask rows of these logits, shape [B, K, V], are best scored for every pair of tokens at once."""
    B, K, _ = logits.shape
    # a CPU would pay for all pairs, where other devices have the arithmetic to spare and pay for launches
    return logits.device.type != "cpu" and K > 1 and B * K * shortlist <= _MOST_PAIRED_TOKENS


def pair_scores(
    head: SamplerHead,
    logits: Tensor,
    hidden: Tensor,
    bonus: Tensor,
    embed: Callable[[Tensor], Tensor],
    output_embeddings: Tensor,
    shortlist: int,
) -> tuple[Tensor, Tensor]:
    """Scores of every shortlist behind each token that may come before it, and the shortlists' tokens.

    Arguments as in `draft_in_turn`.

    Returns:
        shape [B, K, S before, S], behind the bonus token the same S times; and shape [B, K, S], likeliest first.
    """
    values, ids = largest(logits, min(shortlist, logits.shape[2]))
    before = torch.cat([bonus[:, None, None].expand(-1, 1, ids.shape[2]), ids[:, :-1]], dim=1)
    vectors = F.embedding(ids, output_embeddings)
    corrections = head.correct(head.read(hidden)[:, :, None], embed(before))  # [B, K, S before, H]
    return values[:, :, None] + corrections @ vectors.transpose(2, 3), ids


def draft_in_turn(
    head: SamplerHead,
    law: TokenLaw,
    logits: Tensor,
    hidden: Tensor,
    bonus: Tensor,
    embed: Callable[[Tensor], Tensor],
    output_embeddings: Tensor,
    shortlist: int,
) -> tuple[Tensor, Tensor | None]:
    """Drafts one after another, each knowing the one before it: tokens, shape [B, K], and their law q, [B, K, V].

    Only the likeliest tokens of each mask row are scored; all others have probability 0 in q, which is what
    verification is told.

    Args:
        head: in the target's dtype.
        law: how tokens are chosen.
        logits: of the K mask rows, shape [B, K, V].
        hidden: what the output head read to make them, shape [B, K, H].
        bonus: the token before the first draft, shape [B].
        embed: input embeddings of token ids.
        output_embeddings: shape [V, H].
        shortlist: tokens that are scored.

    Returns:
        tokens, and q; None instead of q when greedy.
    """
    values, ids = largest(logits, min(shortlist, logits.shape[2]))
    vectors, read = F.embedding(ids, output_embeddings), head.read(hidden)
    previous, tokens, laws = bonus, [], []
    for j in range(logits.shape[1]):
        correction = (vectors[:, j] @ head.correct(read[:, j], embed(previous))[:, :, None]).squeeze(2)
        # warpers find on the shortlist what they would find on a row that is -inf everywhere else
        chosen, q = law.draw((values[:, j] + correction)[:, None])
        previous = ids[:, j].gather(1, chosen).squeeze(1)
        tokens.append(previous)
        if q is not None:
            laws.append(q)
    return torch.stack(tokens, dim=1), _everywhere(laws, ids, logits)


def draft_from_pairs(
    head: SamplerHead,
    law: TokenLaw,
    logits: Tensor,
    hidden: Tensor,
    bonus: Tensor,
    embed: Callable[[Tensor], Tensor],
    output_embeddings: Tensor,
    shortlist: int,
) -> tuple[Tensor, Tensor | None]:
    """`draft_in_turn` by other means: every shortlist is scored behind each token that may come before it.

    What is computed is S times as much, in a few products for all drafts; in turn they are only looked up and drawn.
    """
    scores, ids = pair_scores(head, logits, hidden, bonus, embed, output_embeddings, shortlist)
    places, laws = [], []  # behind the bonus token all rows are the same
    if law.greedy:
        best = likeliest(scores)  # [B, K, S before]
        places.append(best[:, 0, :1])
        for j in range(1, ids.shape[1]):
            places.append(best[:, j].gather(1, places[-1]))
    else:
        q = law.probs(scores.flatten(1, 2)).view_as(scores)
        for j in range(ids.shape[1]):
            behind = q[:, j, :1] if not j else rows_of_each(q[:, j], places[-1])
            places.append(sample_from(behind, law.generator))
            laws.append(behind)
    drafts = ids.gather(2, torch.cat(places, dim=1)[:, :, None]).squeeze(2)
    return drafts, _everywhere(laws, ids, logits)


def _everywhere(laws: list[Tensor], ids: Tensor, logits: Tensor) -> Tensor | None:
    """The law over the vocabulary, shape of `logits`, of laws over shortlists, each [B, 1, S]; None of none."""
    if not laws:
        return None
    return torch.zeros_like(logits, dtype=torch.float32).scatter_(2, ids, torch.cat(laws, dim=1))
