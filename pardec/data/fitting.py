"""What of documents a run can use: how much fits into its sequences, which prompts leave room for an answer.

Knows documents, no files. Legend: T tokens of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

from pardec.data.reading import DataError
from pardec.data.tokenising import Document

ArrayOrTensor = TypeVar("ArrayOrTensor", np.ndarray, Tensor)


def useful_anchors(mask: ArrayOrTensor) -> ArrayOrTensor:
    """Whether a block is to stand behind each token but the last two; shape [T - 2] for a loss mask of shape [T].

    As in decoding, where the token behind an anchor is the bonus token, the model's own: behind an anchor s both s + 1
    and the first target, s + 2, must be learned. So the last token of a prompt is the first anchor of its response.
    """
    return mask[1:-1] & mask[2:]


def fitted(document: Document, max_length: int) -> Document | None:
    """A masked document cut at T tokens; None if nothing is left that a mask token could learn."""
    assert document.loss_mask is not None
    mask = document.loss_mask[:max_length]
    if not useful_anchors(mask).any():
        return None
    return Document(document.input_ids[:max_length], mask, document.where)


@dataclass
class RowCounts:
    """What became of the rows that were read for training.

    Attributes:
        available: rows that could be read; reading ends where a run has all that it can use.
        read: rows.
        kept: those of which something is learned.
        cut: examples that lose tokens behind T; a row is one example, or one for each of its answers.
        without_room: examples that are dropped because their answer begins too near to T or behind it.
        too_short: examples that are dropped because their answers have no two tokens in a row.
    """

    available: int = 0
    read: int = 0
    kept: int = 0
    cut: int = 0
    without_room: int = 0
    too_short: int = 0

    def add(self, documents: Sequence[Document], max_length: int) -> list[Document]:
        """Counts a row, and returns its documents as they are used: masked ones cut, without those to be dropped."""
        used = []
        for document in documents:
            if document.loss_mask is None:
                used.append(document)
                continue
            one = fitted(document, max_length)
            if one is not None:
                used.append(one)
                self.cut += len(document.input_ids) > max_length
            elif useful_anchors(document.loss_mask).any():
                self.without_room += 1
            else:
                self.too_short += 1
        self.read += 1
        self.kept += bool(used)
        return used

    def told(self, max_length: int) -> str:
        """One line for people."""
        some = f" of {self.available:,}" if self.read < self.available else ""
        enough = ", as many as this run can use" if some else ""
        parts = [f"{self.read:,}{some} rows read{enough}, {self.kept:,} of them used"]
        if self.cut:
            parts.append(f"{self.cut:,} examples cut at {max_length} tokens (data.max_length)")
        if self.without_room:
            parts.append(f"{self.without_room:,} dropped, as their prompts leave no room for an answer at that length")
        if self.too_short:
            parts.append(f"{self.too_short:,} dropped, as their answers are shorter than two tokens")
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
