"""Copied tokens: what followed the last few tokens where they stood before, to be verified behind the drafts.

Knows token ids alone, on the device, in shapes that depend on no value. Legend: B batch, S positions of the text,
K num_speculative_tokens, L copy_tokens, W = K + L candidates that a forward verifies.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# tokens that are looked for: the longest earlier match of so many, down to so many
LONGEST, SHORTEST = 4, 2
# columns before the first token of a context, so that a match may be looked for at the very beginning
MARGIN = LONGEST - 1
_NO_TOKEN = -1


@dataclass(frozen=True)
class Candidates:
    """What a forward verifies behind a token of the target's own: drafts, then copies, then what does not exist.

    Attributes:
        ids: shape [B, W].
        num_copies: copies that exist, behind the drafts that exist, shape [B]; None for none.
        length: candidates that exist, shape [B].
    """

    ids: Tensor
    num_copies: Tensor | None
    length: Tensor


def begin_context(prompts: Tensor, num_positions: int) -> Tensor:
    """Place for the text of each row, position s in column `MARGIN` + s, shape [B, MARGIN + num_positions].

    Args:
        prompts: ids, padded on the right, shape [B, P].
        num_positions: at least P.
    """
    context = prompts.new_full((prompts.shape[0], MARGIN + num_positions), _NO_TOKEN)
    context[:, MARGIN : MARGIN + prompts.shape[1]] = prompts
    return context


class Copier:
    """Finds what is copied; its tensors are made once, so that a captured step may read them."""

    def __init__(self, num_candidates: int, device: torch.device):
        """Args: num_candidates: W, what drafts leave of it is copies; device: of the ids."""
        self.num_candidates = num_candidates
        self._index = torch.arange(num_candidates, device=device)
        self._last = torch.arange(MARGIN - LONGEST, MARGIN, device=device)
        self._weights = torch.arange(1, LONGEST + 1, device=device)
        self._ends: dict[int, Tensor] = {}  # 1..S by S

    def candidates(self, context: Tensor, first: Tensor, draft_length: Tensor) -> Candidates:
        """Drafts that stand in the text, and behind them what followed their longest earlier match, of ties the last.

        A match that ends d tokens before the end of the text is followed by d tokens; behind these they come again,
        as a loop of that length would go on.

        Args:
            context: ids by position, with the drafts, shape [B, MARGIN + S]; what stands behind them is not looked at.
            first: position of the first draft, at least 2, shape [B].
            draft_length: drafts that exist, shape [B].

        Source: prompt lookup decoding, github.com/apoorvumang/prompt-lookup-decoding; there of prompt and output alone.
        """
        S = context.shape[1] - MARGIN
        if S not in self._ends:
            self._ends[S] = torch.arange(1, S + 1, device=context.device)
        ends, end = self._ends[S], (first + draft_length)[:, None]
        windows = context.unfold(1, LONGEST, 1)  # those of window s end with position s
        last = context.gather(1, end + self._last)
        # the tokens of a window up to the last that differs from the text's own last ones
        differing = ((windows != last[:, None]) * self._weights).amax(dim=2)
        score = torch.sub(ends, differing, alpha=S).masked_fill(ends >= end, -(LONGEST + 1) * S)
        best, where = score.max(dim=1, keepdim=True)
        source = where + 1
        position = first[:, None] + self._index
        behind = position - end
        source = torch.where(behind < 0, position, source + behind % (end - source))
        # of ends from 1 to S the score of a match of n tokens is above (n - LONGEST) S
        found = best[:, 0] > (SHORTEST - LONGEST) * S
        num_copies = found * (self.num_candidates - draft_length)
        return Candidates(context[:, MARGIN:].gather(1, source), num_copies, draft_length + num_copies)
