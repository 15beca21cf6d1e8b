"""Asks the target's law at a step's real rows, and says what of its drafts and copies stands.

Knows neither the forward that made the rows nor where drafts come from.
Legend: B batch, K num_speculative_tokens, L copied tokens, W = K + L candidates in a line, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pardec.decoding.copying import Candidates
from pardec.decoding.plans import Verifying
from pardec.decoding.sampling import TokenLaw
from pardec.decoding.state import DecodeState
from pardec.decoding.verify import Verification, verify_copies, verify_greedy, verify_sample
from pardec.trees.standing import StandingTree
from pardec.trees.tree_steps import TreeSteps
from pardec.trees.walk import Walk


@dataclass(frozen=True)
class Verifier:
    """Judges what one decoder drafts.

    Attributes:
        law: how tokens are chosen.
        num_speculative_tokens: K.
        verification: of drafts that were drawn.
    """

    law: TokenLaw
    num_speculative_tokens: int
    verification: Verification

    def choose(self, state: DecodeState, logits: Tensor, since: Tensor) -> Tensor:
        """A token from the target's own law at one real row, shape [B, 1]; `since` = ids not yet committed."""
        prefix_of = state.prefixes(since, lambda b, r: range(since.shape[1])) if self.law.needs_prefix else None
        if self.law.greedy:
            return self.law.argmax(logits, prefix_of)
        return verify_sample(
            self.law.probs(logits, prefix_of),
            logits.new_zeros(logits.shape[0], 0, logits.shape[2], dtype=torch.float32),
            state.drafts[:, :0],
            state.draft_length,
            generator=self.law.generator,
        ).tokens

    def verify(
        self, state: DecodeState, real: Tensor, candidates: Candidates, rows: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Emitted tokens of a chain, shape [B, W + 1], and accepted candidates, shape [B].

        `real` = logits of the real rows, or their argmax already; `rows` = ids not yet committed before them.
        """
        K, ids, length = self.num_speculative_tokens, candidates.ids, candidates.length
        prefix_of = None
        if self.law.needs_prefix:
            prefix_of = state.prefixes(torch.cat([*rows, ids], dim=1), lambda b, r: range(len(rows) + r))
        if not real.is_floating_point():
            verdict = verify_greedy(real, ids, length)
        elif self.law.greedy or not K:
            choose = self.law.argmax if self.law.greedy else self.law.sample
            verdict = verify_greedy(choose(real, prefix_of), ids, length)
        else:
            q, generator = state.draft_probs, self.law.generator
            assert q is not None
            p = self.law.probs(real[:, : K + 1], prefix_of)
            verdict = verify_sample(
                p, q, state.drafts, state.draft_length, verification=self.verification, generator=generator
            )
            if ids.shape[1] > K:
                behind = None if prefix_of is None else lambda b, r: prefix_of(b, r + 1)
                drawn = self.law.sample(real[:, 1:], behind)
                # copies stand behind all drafts
                length = length.masked_fill(verdict.num_accepted < state.draft_length, 0)
                verdict = verify_copies(verdict, drawn, ids, length)
        return verdict.tokens, verdict.num_accepted

    def walk(
        self,
        forward: Verifying,
        tree: TreeSteps | StandingTree,
        state: DecodeState,
        real: Tensor,
        candidates: Candidates,
        rows: Sequence[Tensor],
    ) -> Walk:
        """Walks a tree, and the copies beside it, by the target's choices at their rows.

        `real` = logits of these rows; `rows` = ids not yet committed before the nodes.
        """
        prefix_of, before = None, len(rows) - 1
        if self.law.needs_prefix:
            since = torch.cat([*rows, state.drafts, candidates.ids], dim=1)
            prefix_of = state.prefixes(
                since, lambda b, r: [*range(before), *(before + row for row in forward.path_of(tree, b, r))]
            )
        chosen = self.law.argmax(real, prefix_of) if self.law.greedy else self.law.sample(real, prefix_of)
        return forward.walk(tree, chosen, state.drafts, state.draft_length, candidates)
