"""Prompts of any accepted form as lists of token ids."""

import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pardec.errors import encodable, shown

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor
# what a tokenizer puts in front of a text is one token, in some families two
_MAX_TOKENS_IN_FRONT = 4


def token_ids(prompts: Prompts, tokenizer: PreTrainedTokenizerBase | None, num_embeddings: int) -> list[list[int]]:
    """Prompts of any accepted form as lists of token ids.

    Args:
        prompts: text, texts, token ids of one prompt, lists of token ids, or a LongTensor without padding.
        tokenizer: None takes token ids only.
        num_embeddings: of the base; ids must be below it.

    Raises:
        ValueError: for what cannot be used, naming the prompt.
    """
    if isinstance(prompts, Mapping):
        raise ValueError(f"prompts: expected texts or token ids, found {type(prompts).__name__}; pass its input_ids")
    is_scalar = isinstance(prompts, Tensor) and not prompts.dim()
    if is_scalar or isinstance(prompts, bytes | bytearray) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts: expected texts or token ids, found {shown(prompts)}")
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, Tensor):
        prompts = prompts.tolist() if prompts.dim() != 1 else [prompts.tolist()]
    rows = list(prompts)  # type: ignore[arg-type]
    if rows and isinstance(rows[0], int):
        rows = [rows]
    if not rows:
        raise ValueError("prompts: expected at least one prompt, found none")
    return [_checked_ids(row, index, tokenizer, num_embeddings) for index, row in enumerate(rows)]


def _checked_ids(row: object, index: int, tokenizer: PreTrainedTokenizerBase | None, num_embeddings: int) -> list[int]:
    if isinstance(row, str):
        if tokenizer is None:
            raise ValueError("prompts: expected token ids, as the base has no tokenizer, found text")
        row = text_ids(encodable(f"prompt {index}", row), tokenizer) if row else []
    try:
        if isinstance(row, bytes | bytearray | Mapping):
            raise TypeError
        tokens = list(row)  # type: ignore[call-overload]
        ids = [operator.index(token) for token in tokens if not isinstance(token, bool)]
    except TypeError:
        tokens, ids = [], [0]
    if len(ids) != len(tokens):
        hint = " (conversations go to messages=)" if isinstance(row, Mapping) else ""
        raise ValueError(f"prompt {index}: expected text or a list of token ids, found {shown(row)}{hint}")
    if not ids:
        raise ValueError(f"prompt {index}: expected at least one token, found an empty prompt")
    found = f"{shown(min(ids))}..{shown(max(ids))}"
    if min(ids) < 0 or max(ids) >= num_embeddings:
        raise ValueError(f"prompt {index}: expected token ids in 0..{num_embeddings - 1}, found {found}")
    return ids


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text; a BOS that the text begins with, as a chat template writes it, is not put in front again.

    Said once, as a warning. What a text repeats itself stays.
    """
    ids = tokenizer(text, verbose=False).input_ids
    if not any(ids[:n] == ids[n : 2 * n] for n in range(1, _MAX_TOKENS_IN_FRONT + 1)):
        return ids
    own = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    for added in range(len(ids) - len(own), 0, -1):
        if ids[added : added + len(own)] == own and ids[:added] == own[:added]:
            front = tokenizer.decode(ids[:added])
            warnings.warn(f"text that begins with {front!r} already: none is put in front of it", stacklevel=2)
            return ids[added:]
    return ids
