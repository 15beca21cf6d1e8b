"""Conversations as the text that decoding has in front of it, and where in it the assistant speaks.

Knows chat templates by what they render alone, no tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from pardec.data.reading import DataError
from pardec.errors import first_line

Turns = Sequence[dict[str, Any]]
# two answers that templates leave as they are
_ANSWERS = ("yes", "no")
# so many characters in front of an answer must be those of the generation prompt
_SAME_END = 8


@dataclass(frozen=True)
class Rendered:
    """Text with the places that are to be learned.

    Attributes:
        text: of a conversation, or of its beginning.
        spans: (first, behind the last) character of what the assistant says.
    """

    text: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class Conversation:
    """Turns as a chat template takes them.

    Attributes:
        turns: role, content and what else they have.
        tools: that the assistant may call; None without.
        tokenizer: whose template it is.
        where: names the row in errors.
    """

    turns: Turns
    tools: list[dict[str, Any]] | None
    tokenizer: PreTrainedTokenizerBase
    where: str

    def render(self, turns: Turns, *, add_generation_prompt: bool = False) -> str:
        """These turns as the text that the model sees; empty without turns.

        Raises:
            DataError: if the template refuses them.
        """
        if not turns:
            return ""
        try:
            return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
                list(turns),
                tools=self.tools,  # type: ignore[arg-type]
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is a program of its own, which may raise anything
            roles = ", ".join(turn["role"] for turn in turns)
            raise DataError(
                f"{self.where}: expected turns that the chat template renders, found {roles}: {first_line(error)}"
            ) from None


def conversation_of(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> Conversation:
    """The conversation of a row: its turns unchanged, but for contents that the template cannot take.

    Null becomes empty, and parts become their text, where the template refuses them, shows them as Python does, or
    leaves out what they say.

    Raises:
        DataError: without a chat template, or for parts that it does not take and that are no text.
    """
    if not tokenizer.chat_template:
        raise DataError(f"{where}: expected a tokenizer with a chat template for conversations, found none")
    given = Conversation(row["conversations"], row.get("tools"), tokenizer, where)
    odd = [turn.get("content") for turn in given.turns if not isinstance(turn.get("content"), str)]
    if not odd:
        return given
    parts = [part for content in odd for part in content or []]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    try:
        as_given = given.render(given.turns)
    except DataError:
        as_given = None
    if len(texts) < len(parts):
        if as_given is None or not _shows(as_given, odd, texts, "".join(texts)):
            raise DataError(f"{where}: expected parts of text, as the chat template takes no others, found {parts[0]}")
        return given
    plain = replace(given, turns=[{**turn, "content": _text_of(turn.get("content"))} for turn in given.turns])
    if as_given is None:
        return plain
    try:
        as_plain = plain.render(plain.turns)
    except DataError:
        return given
    return given if _shows(as_given, odd, texts, as_plain) else plain


def _text_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content or [])


def _shows(text: str, contents: Sequence[Any], texts: Sequence[str], plain: str) -> bool:
    """Whether a rendering has the texts of the contents as often as one of plain text, and not these as Python does."""
    is_code = any(text.count(str(content)) > plain.count(str(content)) for content in contents)
    return not is_code and all(text.count(one) >= plain.count(one) for one in map(str.strip, texts))


# ---------------------------------------------------------------------- what is learned


def rendered_answers(conversation: Conversation) -> list[Rendered]:
    """What is to be learned of a conversation, always behind the text that decoding will have in front of it.

    One text for all answers where the template renders each beginning of the conversation as the beginning of the
    whole. Where it does not, as those that leave out thoughts of earlier turns, one text for each answer.

    Raises:
        DataError: if an answer is empty as rendered, or the template's generation prompt does not lead to answers.
    """
    whole = conversation.render(conversation.turns)
    indices = [index for index, turn in enumerate(conversation.turns) if turn["role"] == "assistant"]
    answers = [_answer(conversation, index) for index in indices]
    if all(whole.startswith(one.text) for one in answers):
        return [Rendered(whole, [span for one in answers for span in one.spans])]
    # a greeting without anything in front is never drafted
    return [one for one in answers if one.spans[0][0] > 0] or answers


def _answer(conversation: Conversation, index: int) -> Rendered:
    """The answer that is turn `index`, behind the generation prompt of what stands before."""
    earlier, turn = conversation.turns[:index], conversation.turns[index]
    before = conversation.render(earlier, add_generation_prompt=True)
    through = conversation.render([*earlier, turn])
    follows = through.startswith(before)
    _check_is_said(conversation, earlier, turn, through, through[len(before) :] if follows else through)
    if follows:
        return Rendered(through, [(len(before), len(through))])
    answer = _behind(conversation, index, before, through)
    return Rendered(before + answer, [(len(before), len(before + answer))])


def _behind(conversation: Conversation, index: int, before: str, through: str) -> str:
    """Turn `index` as text behind `before`, its generation prompt, which is not what `through` renders in front."""
    turn, start, end = conversation.turns[index], before.rstrip(), before[len(before.rstrip()) :]
    header, tail = _around(conversation, index)
    leads = header.rstrip()
    if through.startswith(header) and before.startswith(header):
        # the generation prompt goes further: it opens thoughts, or skips them
        opened, said = before[len(header) :], turn.get("content")
        if isinstance(said, str) and opened.strip() and said.lstrip().startswith(opened.strip()):
            # thoughts that are left out of the past are not left out while decoding, which has begun them
            thoughts = said.lstrip()[len(opened.strip()) :]
            return (thoughts.lstrip() if end else thoughts) + tail
        return through[len(header) :]
    if through.startswith(header) and leads.endswith(start[-_SAME_END:]):
        # what stands before is rendered otherwise once it is answered, as a system prompt that goes to the last turn
        return through[len(leads) :].removeprefix(end)
    raise DataError(
        f"{conversation.where}: expected a chat template that renders answers behind its generation prompt, "
        f"found {before[-200:]!r} before and {through[-200:]!r} with an answer"
    )


def _check_is_said(
    conversation: Conversation, earlier: Turns, turn: dict[str, Any], through: str, rendered: str
) -> None:
    """Refuses an answer of which nothing is in `rendered`, the end of `through`; only its end would be learned."""
    said = turn.get("content")
    if isinstance(said, str) and said.strip() and said.strip() in rendered:
        return
    try:
        silent = conversation.render([*earlier, {"role": "assistant", "content": ""}])
    except DataError:
        return
    if through == silent:
        raise DataError(
            f"{conversation.where}: expected an assistant turn with something to learn, found none of it rendered: "
            f"{through[-400:]!r}"
        )


def _around(conversation: Conversation, index: int) -> tuple[str, str]:
    """What is rendered in front of a turn's content, and behind it."""
    earlier, turn = conversation.turns[:index], conversation.turns[index]
    texts = [conversation.render([*earlier, {**turn, "content": answer}]) for answer in _ANSWERS]
    return _common_beginning(texts), _common_beginning([text[::-1] for text in texts])[::-1]


def _common_beginning(texts: Sequence[str]) -> str:
    length = next((n for n, some in enumerate(zip(*texts, strict=False)) if len(set(some)) > 1), min(map(len, texts)))
    return texts[0][:length]
