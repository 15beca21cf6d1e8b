"""Prompts for a model to continue, drawn from training data.

Knows rows of data and tokenizers, no model.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from pardec.data.conversations import Conversation, conversation_of
from pardec.data.row_checks import DataError
from pardec.data.tokenising import tokenise

# tokenising stops when there are this many times as many places for prompts as prompts are wanted
_PLACES_PER_PROMPT = 8


def draw_prompts(
    rows: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_prompts: int,
    prompt_tokens: int,
    max_prompt_tokens: int | None = None,
    seed: int = 0,
    where: str = "data",
    show_progress: bool = False,
) -> list[list[int]]:
    """Token ids of prompts, in an order drawn with `seed`.

    A text of n tokens has n // prompt_tokens places that do not overlap, at an offset that is drawn; conversations
    and rows with a loss mask are one place each. All places come up before one does again, texts then at new offsets.
    Rows are taken in random order, and of many only as many as give eight times as many places as prompts.

    Args:
        rows: see `pardec.data.reading.read_rows`.
        tokenizer: of the base.
        num_prompts: how many.
        prompt_tokens: of a prompt from a text.
        max_prompt_tokens: longer prompts are refused.
        seed: of places and order.
        where: named in errors about rows that do not name their own place.
        show_progress: a progress bar while rows are tokenised.

    Raises:
        DataError: if no text is long enough, or a prompt is too long.
    """
    draw = random.Random(seed)
    sources, num_places, longest = [], 0, 0
    bar = tqdm(draw.sample(rows, len(rows)), "tokenising", unit="document", disable=not show_progress, leave=False)
    for row in bar:
        ids, is_prompt = _source(row, tokenizer, where)
        length = len(ids) if is_prompt else prompt_tokens
        if max_prompt_tokens is not None and length > max_prompt_tokens:
            raise DataError(
                f"{row.get('where', where) if is_prompt else where}: expected a prompt of at most {max_prompt_tokens} "
                f"tokens, the positions of the base less max_new_tokens, found {length}"
            )
        sources.append((ids, is_prompt))
        num_places += 1 if is_prompt else len(ids) // prompt_tokens
        longest = max(longest, len(ids))
        if num_places >= _PLACES_PER_PROMPT * num_prompts:
            break
    bar.close()
    if not num_places:
        raise DataError(f"{where}: expected a text of at least {prompt_tokens} tokens (prompt_tokens), found {longest}")
    prompts: list[np.ndarray] = []
    while len(prompts) < num_prompts:
        places = [ids for source, whole in sources for ids in _places(source, whole, prompt_tokens, draw)]
        draw.shuffle(places)
        prompts += places
    return [ids.tolist() for ids in prompts[:num_prompts]]


def _places(ids: np.ndarray, is_prompt: bool, prompt_tokens: int, draw: random.Random) -> Iterable[np.ndarray]:
    if is_prompt:
        return [ids]
    count, rest = divmod(len(ids), prompt_tokens)
    offset = draw.randint(0, rest)
    return ids[offset : offset + count * prompt_tokens].reshape(count, prompt_tokens)


def _source(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[np.ndarray, bool]:
    """Token ids, and whether they are a prompt as they stand."""
    if row.get("input_ids") is None and row.get("conversations") is not None:
        return _conversation_prompt(row, tokenizer, row.get("where", where)), True
    (document,) = tokenise(row, tokenizer, where)
    if document.loss_mask is None:
        return document.input_ids, False
    return document.input_ids[: max(1, int(document.loss_mask.argmax()))], True


def _conversation_prompt(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> np.ndarray:
    """The conversation up to the first turn of the user's that is answered, and the beginning of the answer."""
    conversation = conversation_of(row, tokenizer, where)
    roles = [turn["role"] for turn in conversation.turns]
    if "user" not in roles:
        raise DataError(f"{where}: expected a user turn to answer, found {', '.join(roles)}")
    asked = roles.index("user")
    end = roles.index("assistant", asked) if "assistant" in roles[asked:] else len(roles)
    return np.array(asked_ids(replace(conversation, turns=conversation.turns[:end])), dtype=np.int32)


def asked_ids(conversation: Conversation) -> list[int]:
    """Token ids of a conversation and of the beginning of its next answer.

    Raises:
        DataError: if the template refuses the turns or renders nothing.
    """
    text = conversation.render(conversation.turns, add_generation_prompt=True)
    ids = conversation.template.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if not ids:
        raise DataError(f"{conversation.where}: expected a chat template that renders a prompt, found {text!r}")
    return ids
