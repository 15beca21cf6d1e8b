"""Conversations as the text that decoding has in front of it, and where in it the assistant speaks.

Knows chat templates by what they render alone, no tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from pardec.data.reading import DataError
from pardec.errors import first_line

# keys of a turn for what a model thinks before it answers
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
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
        options: further names that the template knows, as `enable_thinking`.
        tokenizer: whose template it is.
        where: names the row in errors.
    """

    turns: Turns
    tools: list[dict[str, Any]] | None
    options: dict[str, Any]
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
                **self.options,
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
    options = row.get("chat_template_kwargs") or {}
    given = Conversation(row["conversations"], row.get("tools"), options, tokenizer, where)
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
    indices = [index for index, turn in enumerate(conversation.turns) if _is_learned(turn)]
    if not indices:
        raise DataError(
            f"{conversation.where}: expected an assistant turn to learn, found only those of weight 0 or train false"
        )
    answers = [_answer(conversation, index) for index in indices]
    if all(whole.startswith(one.text) for one in answers):
        return [Rendered(whole, [span for one in answers for span in one.spans])]
    # a greeting without anything in front is never drafted
    return [one for one in answers if one.spans[0][0] > 0] or answers


def _is_learned(turn: dict[str, Any]) -> bool:
    """Answers are, but for those that data of fine-tuning services exclude."""
    return turn["role"] == "assistant" and turn.get("weight", 1) != 0 and turn.get("train", True) is not False


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
    earlier = conversation.turns[:index]
    header, _ = _around(conversation, earlier, {"role": "assistant"})
    end = before[len(before.rstrip()) :]
    if through.startswith(before.rstrip()):
        return through[len(_common_beginning([before, through])) :]
    if before.startswith(header) and through.startswith(header):
        # decoding begins further on: with opened thoughts, or behind empty ones
        thoughts = _left_out(conversation, index, opened=before[len(header) :], answer=through[len(header) :])
        return thoughts or through[len(header) :]
    same = len(_common_beginning([before, through]))
    if before.startswith(header) and before[same:].strip() in through[same:]:
        # decoding begins behind empty thoughts, and this turn has some
        return through[same:].partition(before[same:].strip())[2].removeprefix(end)
    # what stands before is rendered otherwise once it is answered, as a system prompt that goes to the last turn
    leads, asked = _common_beginning([header, through]), conversation.render(earlier)
    prompt = before.removeprefix(asked).strip() if before.startswith(asked) else ""
    place = leads.rfind(prompt, len(asked) if through.startswith(asked) else 0)
    if prompt and place >= 0:
        return through[place + len(prompt) :].removeprefix(end)
    if leads.rstrip().endswith(before.rstrip()[-_SAME_END:]):
        return through[len(leads.rstrip()) :].removeprefix(end)
    raise DataError(
        f"{conversation.where}: expected a chat template that renders answers behind its generation prompt, "
        f"found {before[-200:]!r} before and {through[-200:]!r} with an answer"
    )


def _left_out(conversation: Conversation, index: int, opened: str, answer: str) -> str | None:
    """The answer with the thoughts that the template leaves out of the past, but that decoding has `opened`.

    None if the turn has none, in its content or under a key of their own, or more is rendered than the end of it.
    """
    turn = conversation.turns[index]
    said, begins = turn.get("content"), opened.strip()
    if not isinstance(said, str):
        return None
    tag, own = re.fullmatch(r"<(\w+)>", begins), next((turn[key] for key in _THOUGHTS if turn.get(key)), None)
    if tag and isinstance(own, str):
        said = f"{begins}\n{own}\n</{tag[1]}>\n\n{said}"
    if not begins or not said.lstrip().startswith(begins):
        return None
    _, tail = _around(conversation, conversation.turns[:index], turn)
    if not answer.endswith(tail) or not said.rstrip().endswith(answer.removesuffix(tail).strip()):
        return None
    thoughts = said.lstrip()[len(begins) :]
    return (thoughts.lstrip() if opened[-1].isspace() else thoughts) + tail


def _check_is_said(
    conversation: Conversation, earlier: Turns, turn: dict[str, Any], through: str, rendered: str
) -> None:
    """Refuses an answer of which nothing is in `rendered`, the end of `through`; only its end would be learned."""
    said = turn.get("content")
    if isinstance(said, str) and said.strip() and said.strip() in rendered:
        return
    for nothing in ("", *_ANSWERS[:1]):  # some templates refuse an empty answer
        try:
            silent = conversation.render([*earlier, {"role": "assistant", "content": nothing}])
        except DataError:
            continue
        if through == silent:
            raise DataError(
                f"{conversation.where}: expected an assistant turn with something to learn, found none of it rendered: "
                f"{through[-400:]!r}"
            )
        return


def _around(conversation: Conversation, earlier: Turns, turn: dict[str, Any]) -> tuple[str, str]:
    """What is rendered in front of a turn's content, and behind it."""
    texts = [conversation.render([*earlier, {**turn, "content": answer}]) for answer in _ANSWERS]
    return _common_beginning(texts), _common_beginning([text[::-1] for text in texts])[::-1]


def _common_beginning(texts: Sequence[str]) -> str:
    length = next((n for n, some in enumerate(zip(*texts, strict=False)) if len(set(some)) > 1), min(map(len, texts)))
    return texts[0][:length]
