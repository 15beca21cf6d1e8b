"""Copied tokens: what followed the last few tokens where they stood before, to be verified behind the drafts.

Knows token ids alone, on the device, in shapes that depend on no value. Legend: B batch, N texts, one of each sequence
that a batch began with, R of them that a row looks in, S positions of a text, K num_speculative_tokens, L copy_tokens,
W = K + L candidates that a forward verifies.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# tokens that are looked for: the longest earlier match of so many, down to so many
LONGEST, SHORTEST = 4, 2
# columns before the first token of a context, so that a match may be looked for at the very beginning
MARGIN = LONGEST - 1
# texts that a row looks in, its own among them: looking takes time for each, and more of one prompt add little
MAX_SOURCES = 8
_NO_TOKEN = -1


@dataclass(frozen=True)
class Candidates:
    """What a forward verifies in a line behind a token of the target's own: drafts, copies, then what does not exist.

    Attributes:
        ids: shape [B, W].
        num_copies: copies that exist, behind the drafts that exist, shape [B]; None where none are looked for.
        length: candidates that exist, shape [B].
    """

    ids: Tensor
    num_copies: Tensor | None
    length: Tensor


@dataclass(frozen=True)
class Texts:
    """Where copies are looked for.

    Attributes:
        ids: of prompt and output by position, see `begin_context`, shape [N, MARGIN + S]; what stands behind the tokens
            that count is drafts, or anything.
        lengths: tokens that count, shape [N].
        sources: texts that each row looks in, its own first, shape [B, R].
    """

    ids: Tensor
    lengths: Tensor
    sources: Tensor


def begin_context(prompts: Tensor, num_positions: int) -> Tensor:
    """Place for the text of each row, position s in column `MARGIN` + s, shape [B, MARGIN + num_positions].

    Args:
        prompts: ids, padded on the right, shape [B, P].
        num_positions: at least P.
    """
    context = prompts.new_full((prompts.shape[0], MARGIN + num_positions), _NO_TOKEN)
    context[:, MARGIN : MARGIN + prompts.shape[1]] = prompts
    return context


def num_sources(prompts: Sequence[list[int]], repeats: int) -> int:
    """R of a batch in which `repeats` sequences continue each prompt."""
    alike = max(Counter(map(tuple, prompts)).values())
    return min(alike * repeats, MAX_SOURCES)


def sources_of(prompts: Sequence[list[int]], num_unused: int = 0) -> list[list[int]]:
    """The texts that each row looks in, R for each: its own first, then the next ones that continue the same prompt.

    What another row has emitted is known before this row draws, and rows draw independently: a copy of it is verified
    like any other, so that rows stay independent.

    Args:
        prompts: of each row.
        num_unused: rows behind them, which look in their own text alone.

    Source: samples of a prompt that draft for each other, arXiv:2503.05330; there what several say is weighed.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        alike.setdefault(tuple(prompt), []).append(row)
    R = min(max(map(len, alike.values())), MAX_SOURCES)
    sources = [[row] * R for row in range(len(prompts) + num_unused)]
    for rows in alike.values():
        for place, row in enumerate(rows):
            sources[row] = [rows[(place + i) % len(rows)] for i in range(R)]
    return sources


class Copier:
    """Finds what is copied; its tensors are made once, so that a captured step may read them."""

    def __init__(self, num_candidates: int, device: torch.device):
        """Args: num_candidates: W, what drafts leave of it is copies; device: of the ids."""
        self.num_candidates = num_candidates
        self._index = torch.arange(num_candidates, device=device)
        self._last = torch.arange(MARGIN - LONGEST, MARGIN, device=device)
        self._weights = torch.arange(1, LONGEST + 1, device=device, dtype=torch.int8)
        self._places: dict[tuple[int, int], Tensor] = {}  # 1..R S by (R, S)

    def candidates(self, texts: Texts, first: Tensor, draft_length: Tensor) -> Candidates:
        """Drafts that stand in a row's own text, and behind them what followed their longest match.

        Of matches of one length those in the row's own text come first, and of these the last. There a row looks before
        its drafts' end, in others among the tokens that count. A match that ends d tokens before the end of a text is
        followed by d tokens; behind these they come again, as a loop of that length would go on.

        Args:
            texts: with the drafts.
            first: position of the first draft, at least 2, shape [B].
            draft_length: drafts that exist, shape [B].

        Source: prompt lookup decoding, github.com/apoorvumang/prompt-lookup-decoding; there of prompt and output alone.
        """
        R, S = texts.sources.shape[1], texts.ids.shape[1] - MARGIN
        if (R, S) not in self._places:
            self._places[R, S] = _places(R, S, texts.ids.device)
        places, end = self._places[R, S], (first + draft_length)[:, None]
        ids = texts.ids.index_select(0, texts.sources.flatten()).unflatten(0, texts.sources.shape)
        limits = end if R == 1 else torch.cat([end, texts.lengths[texts.sources[:, 1:]]], dim=1)
        last = ids[:, 0].gather(1, end + self._last)
        windows = ids.unfold(2, LONGEST, 1)  # those of window s end with position s
        # the tokens of a window up to the last that differs from the row's own last ones
        differing = ((windows != last[:, None, None]) * self._weights).amax(dim=3)
        score = torch.sub(places, differing, alpha=R * S)
        # a window that ends a text is followed by nothing; in the last text places are ends
        score = score.masked_fill(places[-1] >= limits[:, :, None], -(LONGEST + 1) * R * S)
        best, where = score.flatten(1).max(dim=1, keepdim=True)
        position = first[:, None] + self._index
        behind = position - end
        if R == 1:
            after = where + 1
            copied = after + behind % (end - after)
        else:
            text, after = where // S, where % S + 1
            # the row's texts stand one behind the other
            copied = text * (MARGIN + S) + after + behind % (limits.gather(1, text) - after)
        source = torch.where(behind < 0, position, copied)
        # of places from 1 to R S the score of a match of n tokens is above (n - LONGEST) R S
        found = best[:, 0] > (SHORTEST - LONGEST) * R * S
        num_copies = found * (self.num_candidates - draft_length)
        return Candidates(ids.flatten(1)[:, MARGIN:].gather(1, source), num_copies, draft_length + num_copies)


def _places(num_sources: int, num_positions: int, device: torch.device) -> Tensor:
    """The order in which equal matches count, from 1 on, shape [R, S]: by text, one's own last, and by position."""
    places = torch.arange(1, num_sources * num_positions + 1, device=device)
    return places.view(num_sources, num_positions).flip(0)
