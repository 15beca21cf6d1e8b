"""A conversation with a model, turn by turn: what was said, what still fits, and how fast the last answer came.

Knows messages and the public model; nothing of terminals.
"""

import copy
import time
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from pardec.arguments import integer
from pardec.decoding.kept_cache import KeptCache
from pardec.decoding.output import StreamChunk
from pardec.model import SelfSpeculativeModel
from pardec.target.base import eos_token_ids

Message = dict[str, str]
# plain decoding is measured over so many tokens
PLAIN_TOKENS = 32


@dataclass
class Answer:
    """What one answer took; grows while it is streamed.

    Attributes:
        mode: that it was decoded in.
        text: so far.
        token_ids: so far.
        num_steps: behind the first token, which prefill gives.
        num_accepted_tokens: accepted drafted tokens.
        num_copied_tokens: accepted copied tokens.
        prompt_tokens: of the whole conversation, as the template renders it.
        reused_tokens: of them, those that were in the cache from the turn before.
        first_seconds: until the first token was there.
        seconds: behind it, inside of the decoder only.
        is_complete: whether it ended by itself or by its length.
        is_cut: whether it ended by its length.
    """

    mode: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_steps: int = 0
    num_accepted_tokens: int = 0
    num_copied_tokens: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    first_seconds: float = 0.0
    seconds: float = 0.0
    is_complete: bool = False
    is_cut: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens behind the first; 0 without any."""
        return (len(self.token_ids) - 1) / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Of the tokens behind the first; 0 without a step."""
        return (len(self.token_ids) - 1) / self.num_steps if self.num_steps else 0.0

    def _take(self, chunk: StreamChunk, seconds: float) -> None:
        if self.token_ids:
            self.num_steps, self.seconds = self.num_steps + 1, self.seconds + seconds
        else:
            self.first_seconds = seconds
        self.text += chunk.text
        self.token_ids += chunk.token_ids
        self.num_accepted_tokens += chunk.num_accepted_tokens
        self.num_copied_tokens += chunk.num_copied_tokens


class Chat:
    """Messages and answers; keys and values of the last turn are kept, so that of the next only what is new is run.

    Attributes:
        messages: said so far, the system's among them; an exchange whose answer is empty is not kept.
        answer: the last one.
        num_forgotten: messages that left before the last answer, as the conversation had no positions left.
    """

    def __init__(self, model: SelfSpeculativeModel, system: str | None, options: Mapping[str, Any]):
        """Begins a conversation.

        Args:
            model: that answers.
            system: prompt of the system's, first of all messages; None for none, or the template's own.
            options: of every answer, as of `stream`; max_new_tokens is among them. With a seed, turn n is drawn with
                seed + n, and behind the largest seed with 0, 1, ..

        Raises:
            ValueError: beginning with `messages`, without a chat template, or with one that has no system messages.
        """
        self._model, self._options = model, options
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.reset()
        model.prompt_ids(messages=[*self._system, {"role": "user", "content": "?"}])

    def reset(self) -> None:
        """Begins anew, behind the system's message."""
        self.messages: list[Message] = list(self._system)
        self.answer = Answer("plain")
        self.num_forgotten = 0
        self._asked: list[Message] = []
        self._kept = KeptCache()
        self._num_turns = 0

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's."""
        return self._model.tokenizer

    @property
    def num_positions(self) -> int | None:
        """That conversation and answer may take together; None without a limit."""
        return self._model.target.max_positions

    def say(self, text: str, mode: str = "fused") -> Generator[StreamChunk, None, None]:
        """The answer, as it is decoded; one that is closed early stays in the conversation as far as it was said.

        Where the conversation and a whole answer no longer fit the model's positions, the oldest exchanges leave.

        Raises:
            ValueError: if this message alone does not fit, or for options that cannot be used; nothing is said then.
        """
        asked = self._fitting([*self.messages, {"role": "user", "content": text}])
        chunks = self._stream(asked, mode, self._kept, self._options)
        self.num_forgotten = len(self.messages) + 1 - len(asked)
        self._asked = asked
        self.answer = Answer(mode, prompt_tokens=len(self._ids(asked)))
        return self._answered(chunks)

    def plain_tokens_per_second(self) -> float:
        """Of plain decoding behind the same messages as the last answer, measured now over `PLAIN_TOKENS` tokens."""
        options = {**self._options, "max_new_tokens": min(PLAIN_TOKENS, self._options["max_new_tokens"])}
        measured = Answer("plain")
        # a copy, so that the conversation keeps its own
        with closing(self._stream(self._asked, "plain", copy.copy(self._kept), options)) as chunks:
            for _ in _timed(chunks, measured):
                pass
        return measured.tokens_per_second

    def _answered(self, chunks: Generator[StreamChunk, None, object]) -> Generator[StreamChunk, None, None]:
        answer = self.answer
        self._num_turns += 1
        try:
            with closing(chunks):
                yield from _timed(chunks, answer)
                answer.is_complete = True
                at_limit = len(answer.token_ids) == self._options["max_new_tokens"]
                answer.is_cut = at_limit and answer.token_ids[-1] not in eos_token_ids(self._model.base_model)
        finally:
            answer.reused_tokens = self._kept.num_reused
            # some templates refuse an empty answer, and two questions in a row
            if answer.text.strip():
                self.messages = [*self._asked, {"role": "assistant", "content": answer.text}]

    def _fitting(self, messages: list[Message]) -> list[Message]:
        """The messages without the oldest exchanges that do not fit."""
        limit, first = self.num_positions, len(self._system)
        new = integer("max_new_tokens", self._options["max_new_tokens"], 1)
        while limit is not None and len(messages) > first + 1 and len(self._ids(messages)) + new > limit:
            messages = messages[:first] + messages[first + 2 :]
        return messages

    def _ids(self, messages: list[Message]) -> list[int]:
        return self._model.prompt_ids(messages=messages)[0]

    def _stream(
        self, messages: list[Message], mode: str, kept: KeptCache, options: Mapping[str, Any]
    ) -> Generator[StreamChunk, None, object]:
        seed = options.get("seed")
        if seed is not None:
            options = {**options, "seed": (integer("seed", seed, 0, 2**63 - 1) + self._num_turns) % 2**63}
        return self._model.stream(messages=messages, mode=mode, kept=kept, **options)


def _timed(chunks: Generator[StreamChunk, None, object], answer: Answer) -> Generator[StreamChunk, None, None]:
    """The chunks, counted with the time that each took, what the caller does with them aside."""
    start = time.perf_counter()
    for chunk in chunks:
        answer._take(chunk, time.perf_counter() - start)
        yield chunk
        start = time.perf_counter()
