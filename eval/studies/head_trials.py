"""Sampler heads on recorded mask rows: training one, and what its drafts would have accepted, by exact sums.

Knows no files and no tables.
Legend: B texts, N anchors of each, K num_speculative_tokens, H width of a hidden state, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from studies.accepted_lengths import accepted_lengths
from studies.look_back_head import LookBackHead
from studies.recorded_drafts import RecordedDrafts
from torch import Tensor, nn
from tqdm.auto import tqdm

from pardec.decoding.sampling import TokenLaw, largest
from pardec.target.hidden import HiddenTap
from pardec.target.own_head import OwnHead
from pardec.training.steps import make_schedule

_TEXTS_PER_STEP = 4
_WARMUP_STEPS = 20


@dataclass(frozen=True)
class Scorer:
    """A frozen model's laws from recorded hidden states, as decoding has them.

    Attributes:
        own_head: makes logits.
        tap: has the output embeddings.
        law: warpers of target and draft.
        shortlist: tokens of each mask row that a head scores.
    """

    own_head: OwnHead
    tap: HiddenTap
    law: TokenLaw
    shortlist: int

    def corrections(self, head: nn.Module, seen: RecordedDrafts) -> Tensor:
        """What a head adds to the mask rows, as vectors to be multiplied with output embeddings, [B, N K, H]."""
        before = seen.behind.flatten(1)
        hidden, previous = seen.drafts.flatten(1, 2), self.own_head.target.embed(seen.ids.gather(1, before))
        if not isinstance(head, LookBackHead):
            return head(hidden, previous)
        K = seen.drafts.shape[2]
        visible = torch.arange(seen.ids.shape[1]) <= seen.anchors.repeat_interleave(K, dim=1)[:, :, None]
        return head(hidden, previous, seen.text, visible)

    @torch.no_grad()
    def target_logits(self, seen: RecordedDrafts) -> Tensor:
        """Of the model itself where each mask row drafts, [B, N K, V]."""
        rows = seen.behind.flatten(1)[:, :, None].expand(-1, -1, seen.text.shape[2])
        return self._logits(seen.text.gather(1, rows))

    @torch.no_grad()
    def draft_logits(self, seen: RecordedDrafts) -> Tensor:
        """Of the mask rows alone, [B, N K, V]."""
        return self._logits(seen.drafts.flatten(1, 2))

    @torch.no_grad()
    def lengths(self, head: nn.Module | None, seen: RecordedDrafts) -> dict[str, Tensor]:
        """Expected accepted drafts by verification, a mean over the anchors of each text, shape [B] each."""
        return {name: one.mean(dim=1) for name, one in accepted_lengths(*self.laws(head, seen)).items()}

    @torch.no_grad()
    def laws(self, head: nn.Module | None, seen: RecordedDrafts) -> tuple[Tensor, Tensor, Tensor]:
        """Target's and draft's where each mask row drafts, [B, N, K, V], and the texts' own tokens, [B, N, K]."""
        rows = self.draft_logits(seen)
        q = self.law.probs(rows)
        if head is not None:
            values, ids = largest(rows, min(self.shortlist, rows.shape[2]))
            vectors = F.embedding(ids, self.tap.output_embeddings)
            scores = values + (vectors @ self.corrections(head, seen)[..., None]).squeeze(3)
            q = torch.zeros_like(q).scatter_(2, ids, self.law.probs(scores))
        shape = seen.drafts.shape[1:3]
        p, q = (one.unflatten(1, shape) for one in (self.law.probs(self.target_logits(seen)), q))
        return p, q, seen.ids.gather(1, seen.behind.flatten(1) + 1).unflatten(1, shape)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.own_head.logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


def trained(
    make: Callable[[], nn.Module],
    name: str,
    scorer: Scorer,
    seen: RecordedDrafts,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
) -> nn.Module:
    """A head, by KL to the model's own law at temperature 1, as recipes train one for an adapter that stays.

    Args:
        make: a new one.
        name: beside the progress bar.
        scorer: of the adapter.
        seen: what it is trained on, four texts with all their anchors a step.
        steps: of AdamW, warmed up and with cosine decay.
        learning_rate: its highest.
        seed: of the first numbers and of the texts.
    """
    torch.manual_seed(seed)
    head, weight = make(), scorer.tap.output_embeddings.detach()
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = make_schedule(optimizer, _WARMUP_STEPS, steps, 0)
    draw = torch.Generator().manual_seed(seed)
    for step in (bar := tqdm(range(steps), unit="step", desc=name)):
        some = seen.part(torch.randint(len(seen.ids), (_TEXTS_PER_STEP,), generator=draw))
        p = scorer.target_logits(some).log_softmax(dim=2)
        q = (scorer.draft_logits(some) + scorer.corrections(head, some) @ weight.T).log_softmax(dim=2)
        loss = F.kl_div(q, p, reduction="none", log_target=True).sum(dim=2).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return head.requires_grad_(False)
