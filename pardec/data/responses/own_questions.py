"""Questions that a chat model asks itself: what it writes where its chat template lets the user speak.

Such questions are of the kinds that the model was made for, and need no data. Source: Magpie, arXiv:2406.08464.
Knows tokenizers and their chat templates, no model.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedTokenizerBase

from pardec.data.row_checks import DataError
from pardec.decoding.asking.chat_template import ChatTemplate
from pardec.errors import shown

# stands for what the user says while the template is asked what surrounds it
_SAID = "aquestionoftheuser"
# what is shorter is a greeting or a slip
_MIN_CHARACTERS = 12


@dataclass(frozen=True)
class UserTurn:
    """Where a template lets the user speak first.

    Attributes:
        input_ids: of everything in front of the user's words.
        end: the text that the template writes right behind them.
    """

    input_ids: list[int]
    end: str


def user_turn(tokenizer: PreTrainedTokenizerBase) -> UserTurn:
    """The user's first turn by the tokenizer's chat template.

    Raises:
        DataError: without a template, or for one that does not show what the user says once, between other text.
    """
    try:
        text = ChatTemplate(tokenizer).render([{"role": "user", "content": _SAID}], add_generation_prompt=True)
    except ValueError as error:
        raise DataError(f"base: {error}") from None
    front, *behind = text.split(_SAID)
    if not front.strip() or len(behind) != 1 or not behind[0].strip():
        raise DataError(f"base: expected a chat template with the user's words between others, found {shown(text)}")
    return UserTurn(tokenizer(front, add_special_tokens=False, verbose=False).input_ids, behind[0].strip())


def questions_of(
    written: Sequence[list[int]], turn: UserTurn, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Collection[int]
) -> list[str]:
    """The questions among what was written behind `turn.input_ids`: those that came to their end, in order.

    Args:
        written: token ids of each.
        turn: see `user_turn`.
        tokenizer: of the base.
        eos_token_ids: of the base; one of these ends a question as well as the template's own text does.
    """
    found = []
    for ids in written:
        ended = ids[-1] in eos_token_ids
        text = cast(str, tokenizer.decode(ids[:-1] if ended else ids, clean_up_tokenization_spaces=False))
        question, end, _ = text.partition(turn.end)
        question = question.strip()
        if (ended or end) and len(question) >= _MIN_CHARACTERS:
            found.append(question)
    return found
