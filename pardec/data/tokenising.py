"""Rows to token ids, with the mask of those to be learned."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pardec.data.reading import DataError
from pardec.errors import first_line


@dataclass(frozen=True)
class Document:
    """Token ids with, where not all of them are to be learned, the mask of those that are.

    Attributes:
        input_ids: shape [n], int32.
        loss_mask: shape [n], bool; None if every token counts and the document may be packed with others.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray | None = None


def tokenise(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str = "data") -> Document:
    """A row as token ids; text gets the document separator in front, conversations the assistant's loss mask.

    Raises:
        DataError: for a row that cannot be used, beginning with its own `where` or else the one given.
    """
    where = row.get("where", where)
    if row.get("input_ids") is not None:
        check_token_ids(max(row["input_ids"]), len(tokenizer), "the tokenizer", where)
        mask = np.array(row["loss_mask"], dtype=bool)
        return Document(np.array(row["input_ids"], dtype=np.int32), mask)
    if row.get("conversations") is not None:
        return _tokenise_conversation(row["conversations"], tokenizer, where)
    ids = tokenizer(row["text"], verbose=False).input_ids
    separator = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if separator is not None and ids[:1] != [separator]:
        ids = [separator, *ids]
    return Document(np.array(ids, dtype=np.int32))


def check_token_ids(largest: int, limit: int, owner: str, where: str) -> None:
    """Refuses token ids of data that tokenizer or base, which `owner` says, know only below `limit`.

    Raises:
        DataError: beginning with `where`.
    """
    if largest >= limit:
        raise DataError(f"{where}: expected token ids below {limit}, those of {owner}, found {largest}")


def _tokenise_conversation(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, where: str) -> Document:
    """Assistant spans are found by rendering the conversation up to and including each assistant turn."""
    if not tokenizer.is_fast:
        raise DataError(
            f"{where}: expected a fast tokenizer for conversations, which knows each token's characters, "
            f"found {type(tokenizer).__name__}"
        )
    text = render_conversation(tokenizer, turns, where)
    spans = []
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = render_conversation(tokenizer, turns[:i], where, add_generation_prompt=True)
        through = render_conversation(tokenizer, turns[: i + 1], where)
        if not text.startswith(before) or not text.startswith(through) or not through.startswith(before):
            raise DataError(
                f"{where}: expected a chat template that renders a conversation's beginning as the beginning of "
                f"its rendering, found {through[-200:]!r} inside {text[:400]!r}"
            )
        spans.append((len(before), len(through)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    mask = [any(start < b and a < end for start, end in spans) for a, b in encoded["offset_mapping"]]  # type: ignore[misc]
    if not any(mask) or all(mask):
        share = "0 %" if not any(mask) else "100 %"
        raise DataError(
            f"{where}: expected some of the rendered tokens to be the assistant's, found {share} of {text[:400]!r}"
        )
    return Document(np.array(encoded["input_ids"], dtype=np.int32), np.array(mask))


def render_conversation(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], where: str, *, add_generation_prompt: bool = False
) -> str:
    """A conversation as the text that the model sees; empty without turns.

    Raises:
        DataError: if there is no chat template or it refuses these turns, beginning with `where`.
    """
    if not tokenizer.chat_template:
        raise DataError(f"{where}: expected a tokenizer with a chat template for conversations, found none")
    if not turns:
        return ""
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)  # type: ignore[return-value]
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(
            f"{where}: expected turns that the chat template renders, found {roles}: {first_line(error)}"
        ) from None
