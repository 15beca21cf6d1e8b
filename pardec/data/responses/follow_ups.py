"""What a user says behind a model's answer, and the tokens that lead from that answer to the next.

Knows no model; what it gives is appended to the answer's own tokens, as a chat that keeps its cache does.
"""

import random
from collections.abc import Collection
from typing import cast

from transformers import PreTrainedTokenizerBase

from pardec.data.conversations import Conversation
from pardec.data.responses.response_file import Prompt
from pardec.decoding.asking.chat_template import ChatTemplate

_FOLLOW_UPS = (
    "Now shorter.",
    "Give an example.",
    "Explain that in simpler words.",
    "Are you sure? Check it again.",
    "Why?",
    "Tell me more about it.",
    "Please continue.",
    "Summarise your answer in one sentence.",
    "Write that as a list.",
    "What should I watch out for?",
    "Thanks! What would you do next?",
    "Can you say the same more formally?",
)


def drawn_follow_up(draw: random.Random) -> str:
    """Something that can be said behind any answer."""
    return draw.choice(_FOLLOW_UPS)


def between_answers(
    prompt: Prompt, response: list[int], tokenizer: PreTrainedTokenizerBase, eos_token_ids: Collection[int]
) -> list[int] | None:
    """Token ids behind the first answer and in front of the second: the answer's end, the follow-up and what it opens.

    Args:
        prompt: with a follow-up.
        response: to it; an EOS token at its end counts as the end that the template writes.
        tokenizer: with the chat template that the prompt was rendered by.
        eos_token_ids: of the base.

    Returns:
        None where the template renders an answer that is past otherwise than it was written, as those that leave out
        thoughts or space.
    """
    end = [token for token in response[-1:] if token in eos_token_ids]
    own = response[: len(response) - len(end)]
    said = cast(str, tokenizer.decode(own, clean_up_tokenization_spaces=False))
    chat = Conversation(prompt.turns, ChatTemplate(tokenizer), "follow-up")
    behind = [{"role": "assistant", "content": said}, {"role": "user", "content": prompt.follow_up}]
    answered = chat.render(chat.turns, add_generation_prompt=True) + said
    asked = chat.render([*chat.turns, *behind], add_generation_prompt=True)
    if not asked.startswith(answered):
        return None
    ids = tokenizer(asked.removeprefix(answered), add_special_tokens=False, verbose=False).input_ids
    return ids[len(end) :] if ids[: len(end)] == end else None
