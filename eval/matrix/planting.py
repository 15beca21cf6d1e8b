"""Greedy decoding in which most drafts are right, as a trained adapter's would be, so that acceptance is put to work.

Drafts are planted where a step looks for them; everything else is what `generate` runs.
Legend: B sequences, K num_speculative_tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pardec.decoding.engine import Engine
from pardec.decoding.output import counts_of, outputs_of
from pardec.decoding.sampling import TokenLaw
from pardec.decoding.stats import pool
from pardec.model import SelfSpeculativeModel

_SHARE = 0.8  # of drafts that are right, as far as the drafts before them are


class Planted:
    """Drafts for the sequences of an engine: with probability 0.8 what the reference says, else another token.

    Attributes:
        draft: the drafts behind so many emitted tokens of each sequence, shape [B, K].
    """

    def __init__(self, references: Sequence[Sequence[int]], num_speculative_tokens: int, vocab_size: int):
        self._references, self._k, self._vocab = references, num_speculative_tokens, vocab_size
        self._generator = torch.Generator().manual_seed(0)

    def draft(self, emitted: Sequence[int]) -> Tensor:
        """Drafts of each sequence behind so many emitted tokens, shape [B, K]."""
        K = self._k
        truth = torch.tensor([[*r[n : n + K], *[0] * K][:K] for r, n in zip(self._references, emitted, strict=True)])
        wrong = torch.rand(truth.shape, generator=self._generator) >= _SHARE
        return torch.where(wrong, (truth + 1) % self._vocab, truth)


@dataclass(frozen=True)
class _PlantedLaw(TokenLaw):
    """Greedy, and what it draws from mask rows is planted."""

    engine: Engine | None = None
    planted: Planted | None = None

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        assert self.engine is not None
        assert self.planted is not None
        state = self.engine.state
        # in two_pass drafts stand behind a token of the target's own
        emitted = [0] * logits.shape[0] if state is None else [n + 1 for n in state.num_new.tolist()]
        return self.planted.draft(emitted), None


def decode_planted(
    model: SelfSpeculativeModel, prompts: list[list[int]], references: Sequence[Sequence[int]], mode: str
) -> tuple[list[list[int]], float]:
    """Continues the prompts greedily while drafts are planted.

    Args:
        model: with an adapter.
        prompts: lists of token ids.
        references: continuations that the base gives, of one length.
        mode: `two_pass` or `fused`.

    Returns:
        continuations, and the mean acceptance length.
    """
    law, drafting = TokenLaw(greedy=True), model.engines.drafting(mode, None, None, None)
    planted = Planted(references, drafting.num_speculative_tokens, model.target.vocab_size)
    with model.engines.lend(prompts, law, len(references[0]), drafting) as engine:
        engine.decoder.law = _PlantedLaw(True, engine=engine, planted=planted)
        for progress in engine.run(prompts, between="writes"):
            if mode == "fused":
                assert engine.state is not None
                engine.state.drafts = planted.draft(progress.num_new)
        assert engine.state is not None
        tokens = outputs_of(engine.state, len(prompts))
        return tokens, pool(counts_of(engine.state, mode, len(prompts)), 1.0).mean_acceptance_length
