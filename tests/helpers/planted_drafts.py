"""Drafts of which so many are true, in place of an adapter's own."""

from collections.abc import Sequence

import torch

from pardec.decoding.sampling import TokenLaw
from pardec.decoding.state import DecodeState
from pardec.decoding.step import Decoder


class PlantedDrafts:
    """The first num_true[b] drafts of row b are what will be emitted, the others are not.

    Attributes:
        state: of the decoding; None until its prompts have been run.
    """

    def __init__(self, decoder: Decoder, references: Sequence[list[int]], num_true: Sequence[int]):
        """Takes the place of `decoder`'s law, which must be greedy; `references` = tokens of each row."""
        self.state: DecodeState | None = None
        self._K, self._references, self._num_true = decoder.num_speculative_tokens, references, num_true
        self._exact = 1 if decoder.mode == "two_pass" else 0  # its drafts stand behind a token of the target's own
        plant = self.drafts

        class Planted(TokenLaw):
            def draw(self, logits):
                return plant(), None

        decoder.law = Planted(greedy=True)

    def drafts(self) -> torch.Tensor:
        """Those that stand behind what has been emitted, shape [B, K]."""
        found = []
        for b, (reference, count) in enumerate(zip(self._references, self._num_true, strict=True)):
            start = 0 if self.state is None else int(self.state.num_new[b]) + self._exact
            truth = (reference + [0] * self._K)[start : start + self._K]
            found.append([t if i < count else (t + 1) % 61 for i, t in enumerate(truth)])
        return torch.tensor(found, dtype=torch.long).view(len(found), self._K)
