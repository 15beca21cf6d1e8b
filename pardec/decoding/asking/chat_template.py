"""A tokenizer's chat template: conversations as the text that a model was trained to see.

Knows no tokens, and nothing of what is learned. Training and decoding both render here, so that they see the same text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from pardec.errors import first_line

Turns = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class ChatTemplate:
    """The template of a tokenizer, and what it is given beside the turns.

    Attributes:
        tokenizer: whose template it is.
        options: such as tools, or enable_thinking; what the template knows.
    """

    tokenizer: PreTrainedTokenizerBase
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Looks for the template.

        Raises:
            ValueError: if there is none.
        """
        if not self.tokenizer.chat_template:
            raise ValueError("expected a tokenizer with a chat template for conversations, found none")

    def render(self, turns: Turns, *, add_generation_prompt: bool = False) -> str:
        """These turns as the text that the model sees; empty without turns.

        Raises:
            ValueError: if the template refuses them.
        """
        if not turns:
            return ""
        try:
            return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
                list(turns), tokenize=False, add_generation_prompt=add_generation_prompt, **self.options
            )
        except Exception as error:  # a template is a program of its own, which may raise anything
            roles = ", ".join(turn["role"] for turn in turns)
            raise ValueError(
                f"expected turns that the chat template renders, found {roles}: {first_line(error)}"
            ) from None

    def fitted(self, turns: Turns) -> Turns:
        """The turns unchanged, but for contents that the template cannot take.

        Null becomes empty, and parts become their text, where the template refuses them, shows them as Python does, or
        leaves out what they say.

        Raises:
            ValueError: for parts that it does not take and that are no text.
        """
        odd = [turn.get("content") for turn in turns if not isinstance(turn.get("content"), str)]
        if not odd:
            return turns
        parts = [part for content in odd for part in content or []]
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        try:
            as_given = self.render(turns)
        except ValueError:
            as_given = None
        if len(texts) < len(parts):
            if as_given is None or not _shows(as_given, odd, texts, "".join(texts)):
                raise ValueError(f"expected parts of text, as the chat template takes no others, found {parts[0]}")
            return turns
        plain = [{**turn, "content": _text_of(turn.get("content"))} for turn in turns]
        if as_given is None:
            return plain
        try:
            as_plain = self.render(plain)
        except ValueError:
            return turns
        return turns if _shows(as_given, odd, texts, as_plain) else plain


def _text_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content or [])


def _shows(text: str, contents: Sequence[Any], texts: Sequence[str], plain: str) -> bool:
    """Whether a rendering has the texts of the contents as often as one of plain text, and not these as Python does."""
    is_code = any(text.count(str(content)) > plain.count(str(content)) for content in contents)
    return not is_code and all(text.count(one) >= plain.count(one) for one in map(str.strip, texts))
