"""Conversations as the text that decoding has in front of it, and where in it the assistant speaks.

Knows chat templates by what they render alone, no tokens.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from pardec.data.row_checks import DataError
from pardec.decoding.asking.chat_template import ChatTemplate, Turns

# keys of a turn for what a model thinks before it answers
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# what stands in front of a greeting at most, and what says that a turn is not learned
_UNASKED, _NO = ("assistant", "system", "developer"), ("0", "0.0", "false")
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
        template: that renders them.
        where: names the row in errors.
    """

    turns: Turns
    template: ChatTemplate
    where: str

    def render(self, turns: Turns, *, add_generation_prompt: bool = False) -> str:
        """These turns as the text that the model sees; empty without turns.

        Raises:
            DataError: if the template refuses them.
        """
        with _told_of(self.where):
            return self.template.render(turns, add_generation_prompt=add_generation_prompt)


def conversation_of(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> Conversation:
    """The conversation of a row, its turns as `ChatTemplate.fitted` leaves them.

    Raises:
        DataError: without a chat template, or for parts that it does not take and that are no text.
    """
    with _told_of(where):
        template = ChatTemplate(tokenizer, {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})})
        return Conversation(template.fitted(row["conversations"]), template, where)


@contextmanager
def _told_of(where: str) -> Iterator[None]:
    """Says of what is wrong with a conversation which row it is."""
    try:
        yield
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None


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
    # a greeting, before anybody has asked, is never drafted
    asked = next((n for n, turn in enumerate(conversation.turns) if turn["role"] not in _UNASKED), None)
    drafted = [index for index in indices if asked is not None and index > asked] or indices
    answers = [_answer(conversation, index) for index in drafted]
    if all(whole.startswith(one.text) for one in answers):
        return [Rendered(whole, [span for one in answers for span in one.spans])]
    return answers


def _is_learned(turn: dict[str, Any]) -> bool:
    """Answers are, but for those that data of fine-tuning services exclude."""
    return turn["role"] == "assistant" and not any(str(turn.get(key)).lower() in _NO for key in ("weight", "train"))


def _answer(conversation: Conversation, index: int) -> Rendered:
    """The answer that is turn `index`, behind the generation prompt of what stands before."""
    earlier, turn = conversation.turns[:index], conversation.turns[index]
    before = conversation.render(earlier, add_generation_prompt=True)
    through = conversation.render([*earlier, turn])
    follows = through.startswith(before)
    _check_is_said(conversation, earlier, turn, through, through[len(before) :] if follows else through)
    if not earlier:  # a greeting; what the template puts in front of it, such as its own system prompt, nobody says
        header, _ = _around(conversation, earlier, {"role": "assistant"})
        return Rendered(through, [(len(_common_beginning([header, through])), len(through))])
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
