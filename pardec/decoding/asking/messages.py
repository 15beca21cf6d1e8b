"""Messages of a chat as the token ids of a prompt, rendered as training renders conversations.

Knows which messages can be answered; what the template makes of them is its own affair.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from pardec.decoding.asking.chat_template import ChatTemplate, Turns
from pardec.errors import encodable, shown

Messages = Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]]
# a result that a tool has given is answered as well
_ANSWERED = ("user", "tool")
# two system prompts that templates leave as they are
_SYSTEMS = ("yes", "no")


def message_ids(
    messages: Messages, tokenizer: PreTrainedTokenizerBase | None, template_options: Mapping[str, Any] | None = None
) -> list[list[int]]:
    """Token ids of one list of messages, or of several, up to where the assistant's answer begins.

    The template writes its own special tokens; none are put in front.

    Args:
        messages: with `role` and `content`, the last of them the user's or a tool's; or a list of such lists.
        tokenizer: of the base.
        template_options: what the template is given beside them, such as `tools` or `enable_thinking`.

    Raises:
        ValueError: beginning with `messages`, or with `template_options`.
    """
    if tokenizer is None:
        raise ValueError("messages: expected a base with a tokenizer, found none")
    options = _checked_options({} if template_options is None else template_options)
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"messages: expected a list of messages with role and content, found {shown(messages)}")
    if isinstance(messages[0], Mapping):
        return [_ids_of(messages, "messages", tokenizer, options)]
    return [_ids_of(one, f"messages {index}", tokenizer, options) for index, one in enumerate(messages)]


def _ids_of(messages: Any, where: str, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> list[int]:
    turns = _checked(messages, where)
    try:
        template = ChatTemplate(tokenizer, options)
        turns = template.fitted(turns)
        text = _rendered(template, turns)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if not ids:
        raise ValueError(f"{where}: expected a chat template that renders a prompt, found {shown(text)}")
    return ids


def _rendered(template: ChatTemplate, turns: Turns) -> str:
    """The text; refuses system messages that the template refuses, or leaves out without a word."""
    if turns[0]["role"] != "system":
        return template.render(turns, add_generation_prompt=True)
    try:
        text = template.render(turns, add_generation_prompt=True)
    except ValueError as error:
        try:
            template.render(turns[1:], add_generation_prompt=True)
        except ValueError:
            raise error from None
        reason = str(error).partition(", found ")[2].partition(": ")[2]
        raise ValueError(f"expected no system message, as the chat template takes none, found one: {reason}") from None
    others = [[{**turns[0], "content": content}, *turns[1:]] for content in _SYSTEMS]
    if len({template.render(other, add_generation_prompt=True) for other in others}) == 1:
        raise ValueError("expected no system message, as the chat template leaves it out, found one")
    return text


def _checked(messages: Any, where: str) -> Turns:
    """Messages that can be answered; keys without a value go, as in training, but for a content that is null."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"{where}: expected a list of messages with role and content, found {shown(messages)}")
    turns = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where}: expected messages with role and content, found {shown(message)}")
        turn = {key: value for key, value in message.items() if value is not None or key == "content"}
        content = turn.get("content")
        parts = content if isinstance(content, list) else []
        is_content = isinstance(content, str) or (parts and all(isinstance(part, Mapping) for part in parts))
        if not is_content and (content is not None or not turn.get("tool_calls")):
            raise ValueError(f"{where}: expected messages with role and content, found {shown(message)}")
        turns.append(turn)
    encodable(where, json.dumps(turns, ensure_ascii=False, default=str))
    last = turns[-1]["role"]
    if last not in _ANSWERED:
        raise ValueError(f"{where}: expected the last message to be the user's, found one of {shown(last)}")
    return turns


def _checked_options(options: object) -> Mapping[str, Any]:
    """Options for the template alone, none that would change how it is called."""
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise ValueError(f"template_options: expected names and values for the chat template, found {shown(options)}")
    own = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys() - {"tools", "documents"}
    taken = sorted(own & options.keys())
    if taken:
        raise ValueError(f"template_options: expected names that the chat template knows, found {taken[0]!r}")
    return options
