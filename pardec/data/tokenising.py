"""Rows to token ids, with the mask of those to be learned."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pardec.data.conversations import Rendered, conversation_of, rendered_answers
from pardec.data.row_checks import DataError
from pardec.decoding.asking.prompts import text_ids


@dataclass(frozen=True)
class Document:
    """Token ids with, where not all of them are to be learned, the mask of those that are.

    Attributes:
        input_ids: shape [n], int32.
        loss_mask: shape [n], bool; None if every token counts and the document may be packed with others.
        where: names the row of a document with a mask.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray | None = None
    where: str = ""


def tokenise(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str = "data") -> list[Document]:
    """A row as token ids; text gets the document separator in front, conversations the assistant's loss mask.

    It is one document, but for conversations whose template renders earlier turns otherwise than the last: these are
    one for each answer, see `rendered_answers`.

    Raises:
        DataError: for a row that cannot be used, beginning with its own `where` or else the one given.
    """
    where = row.get("where", where)
    if row.get("input_ids") is not None:
        check_token_ids(max(row["input_ids"]), len(tokenizer), "the tokenizer", where)
        mask = np.array(row["loss_mask"], dtype=bool)
        return [Document(np.array(row["input_ids"], dtype=np.int32), mask, where)]
    if row.get("conversations") is not None:
        return _tokenise_conversation(row, tokenizer, where)
    ids = text_ids(row["text"], tokenizer)
    separator = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if separator is not None and ids[:1] != [separator]:
        ids = [separator, *ids]
    return [Document(np.array(ids, dtype=np.int32))]


def check_token_ids(largest: int, limit: int, owner: str, where: str) -> None:
    """Refuses token ids of data that tokenizer or base, which `owner` says, know only below `limit`.

    Raises:
        DataError: beginning with `where`.
    """
    if largest >= limit:
        raise DataError(f"{where}: expected token ids below {limit}, those of {owner}, found {largest}")


def _tokenise_conversation(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> list[Document]:
    if not tokenizer.is_fast:
        raise DataError(
            f"{where}: expected a fast tokenizer for conversations, which knows each token's characters, "
            f"found {type(tokenizer).__name__}"
        )
    answers = rendered_answers(conversation_of(row, tokenizer, where))
    return [_tokenise_rendered(one, tokenizer, where) for one in answers]


def _tokenise_rendered(rendered: Rendered, tokenizer: PreTrainedTokenizerBase, where: str) -> Document:
    """A token is to be learned if some of its characters are."""
    text = rendered.text
    ids, places = _encoded(text, tokenizer)
    starts = [start for start, _ in rendered.spans]
    if any(((places[:, 0] < start) & (start < places[:, 1])).any() for start in starts):
        # decoding tokenises what stands in front of an answer alone
        parts = [(start, *_encoded(text[start:end], tokenizer)) for start, end in pairwise([0, *starts, len(text)])]
        ids = np.concatenate([of_part for _, of_part, _ in parts])
        places = np.concatenate([start + inside for start, _, inside in parts])
    mask = np.zeros(len(ids), dtype=bool)
    for start, end in rendered.spans:
        mask |= (start < places[:, 1]) & (places[:, 0] < end)
    if not mask.any() or mask.all():
        share = "0 %" if not mask.any() else "100 %"
        raise DataError(
            f"{where}: expected some of the rendered tokens to be the assistant's, found {share} of {text[:400]!r}"
        )
    return Document(ids, mask, where)


def _encoded(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, shape [n], and the first and behind the last character of each, shape [n, 2]."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return np.array(encoded["input_ids"], dtype=np.int32), places
