"""What of documents a run can use: how much fits into its sequences, which prompts leave room for an answer.

Knows documents, no files. Legend: T tokens of a sequence.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

from pardec.data.row_checks import DataError
from pardec.data.tokenising import Document

ArrayOrTensor = TypeVar("ArrayOrTensor", np.ndarray, Tensor)


def useful_anchors(mask: ArrayOrTensor) -> ArrayOrTensor:
    """Whether a block is to stand behind each token but the last two; shape [T - 2] for a loss mask of shape [T].

    As in decoding, where the token behind an anchor is the bonus token, the model's own: behind an anchor s both s + 1
    and the first target, s + 2, must be learned. So the last token of a prompt is the first anchor of its response.
    """
    return mask[1:-1] & mask[2:]


def windows(document: Document, max_length: int) -> list[Document]:
    """A masked document in pieces of at most T tokens, so that every useful anchor of it is one of exactly one piece.

    Pieces begin a quarter of T before what they are for, so that it has something in front of it. Those of which
    nothing would be learned are left out.
    """
    ids, mask = document.input_ids, document.loss_mask
    assert mask is not None
    found, done = [], 0  # anchors before `done` have been learned or are useless
    anchors = np.flatnonzero(useful_anchors(mask))
    while len(left := anchors[np.searchsorted(anchors, done) :]):
        start = 0
        if left[0] + 2 >= max_length:
            start = min(max(done, int(left[0])) - max_length // 4, len(ids) - max_length)
        stop = start + max_length
        own = mask[start:stop].copy()
        if done:
            own[: max(0, done + 1 - start)] = False  # the anchor at `done` has its bonus token behind it
        found.append(Document(ids[start:stop], own, document.where))
        done = stop - 2  # an anchor there has its first target in the next piece
    return found


def pack(documents: Iterable[Document], max_length: int) -> list[Document]:
    """Training sequences: text is concatenated and cut into pieces of T tokens; masked documents stay alone."""
    sequences, stream, held = [], [], 0
    for document in documents:
        if document.loss_mask is not None:
            sequences += windows(document, max_length)
            continue
        stream.append(document.input_ids)
        held += len(document.input_ids)
        if held >= max_length:
            joined = np.concatenate(stream)
            whole = held // max_length * max_length
            sequences += [Document(piece) for piece in joined[:whole].reshape(-1, max_length)]
            stream, held = [joined[whole:]], held - whole
    return sequences


@dataclass
class RowCounts:
    """What became of the rows that were read for training.

    Attributes:
        available: rows that could be read; reading ends where a run has all that it can use.
        read: rows.
        kept: those of which something is learned.
        long: examples of more than T tokens; a row is one example, or one for each of its answers.
        windows: pieces that these are cut into.
        too_short: examples that are dropped because their answers have no two tokens in a row.
        unusable: rows that are left out because they cannot be tokenised.
    """

    available: int = 0
    read: int = 0
    kept: int = 0
    long: int = 0
    windows: int = 0
    too_short: int = 0
    unusable: int = 0

    def add(self, documents: Sequence[Document], max_length: int) -> list[Document]:
        """Counts a row, and returns its documents as they are used: masked ones in windows, useless ones dropped."""
        used = []
        for document in documents:
            if document.loss_mask is None:
                used.append(document)
                continue
            pieces = windows(document, max_length)
            used += pieces
            self.too_short += not pieces
            if len(document.input_ids) > max_length:
                self.long += 1
                self.windows += len(pieces)
        self.read += 1
        self.kept += bool(used)
        return used

    def told(self, max_length: int) -> str:
        """One line for people."""
        some = f" of {self.available:,}" if self.read < self.available else ""
        rows = "row" if self.read == 1 and not some else "rows"
        so_far = " before the first step" if some else ""
        parts = [f"{self.read:,}{some} {rows} read{so_far}, {self.kept:,} of them used"]
        if self.long:
            parts.append(
                f"{self.long:,} examples longer than {max_length} tokens (data.max_length) cut into {self.windows:,} "
                "windows"
            )
        if self.too_short:
            parts.append(f"{self.too_short:,} dropped, as their answers are shorter than two tokens")
        if self.unusable:
            parts.append(f"{self.unusable:,} left out, as they cannot be tokenised")
        return "; ".join(parts)

    def check(self, min_kept_share: float, max_length: int, where: str) -> None:
        """Refuses data of which too few rows are used.

        Raises:
            DataError: beginning with `where`.
        """
        if self.kept < min_kept_share * self.read:
            raise DataError(
                f"{where}: expected something to learn in at least {min_kept_share:.0%} of the rows "
                f"(data.min_kept_share), found {self.told(max_length)}"
            )


def prompt_of(document: Document) -> np.ndarray:
    """What stands before the first token to be learned, at least one token."""
    assert document.loss_mask is not None
    return document.input_ids[: max(1, int(document.loss_mask.argmax()))]


def without_long_prompts(
    documents: Sequence[Document], max_prompt_tokens: int | None, where: str
) -> tuple[list[Document], list[Document]]:
    """(documents, those whose prompts are longer); text, whose prompts have a length of their own, is never long.

    Raises:
        DataError: if more than half of the prompts are longer, beginning with `where`.
    """
    if max_prompt_tokens is None:
        return list(documents), []
    lengths = [0 if one.loss_mask is None else len(prompt_of(one)) for one in documents]
    long = [one for one, length in zip(documents, lengths, strict=True) if length > max_prompt_tokens]
    if 2 * len(long) > len(documents):
        raise DataError(
            f"{where}: expected held-out prompts of at most {max_prompt_tokens} tokens, the positions of the base less "
            f"eval.max_new_tokens, found {len(long)} of {len(documents)} longer, up to {max(lengths)}"
        )
    return [one for one, length in zip(documents, lengths, strict=True) if length <= max_prompt_tokens], long


def told_long(documents: Sequence[Document]) -> str:
    """One line that names the held-out documents which are left out because of their prompts."""
    named = ", ".join(f"{one.where} ({len(prompt_of(one)):,} tokens)" for one in documents[:3])
    more = f" and {len(documents) - 3:,} more" if len(documents) > 3 else ""
    return f"held-out prompts too long for the base are left out: {named}{more}"
