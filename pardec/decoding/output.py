"""What decoding gives back: tokens, text and counts.

Legend: B sequences, S tokens of the longest.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pardec.decoding.state import DecodeState
from pardec.decoding.stats import DecodeStats, SequenceCounts


@dataclass(frozen=True)
class GenerationOutput:
    """What `generate` returns; always lists, one entry per sequence.

    Attributes:
        text: continuations without special tokens; empty if the base came without a tokenizer.
        token_ids: continuations, EOS included where it was met.
        sequences: prompts and continuations, right-padded, shape [B, S], int64.
        prompt_lengths: shape [B].
        stats: figures, pooled and per sequence.
        counts: the raw counts behind them.
    """

    text: list[str]
    token_ids: list[list[int]]
    sequences: Tensor
    prompt_lengths: Tensor
    stats: DecodeStats
    counts: list[SequenceCounts]


@dataclass(frozen=True)
class StreamChunk:
    """What one step emitted.

    Attributes:
        text: text that became final with this step.
        token_ids: emitted ids; accepted drafts, then accepted copies, come before the bonus token.
        num_accepted_tokens: how many of them were accepted drafts.
        num_copied_tokens: how many of them were accepted copies.
    """

    text: str
    token_ids: list[int]
    num_accepted_tokens: int
    num_copied_tokens: int = 0


Origin = Literal["target", "drafted", "copied"]


def pieces_of(text: "TextStream", chunk: StreamChunk, mode: str, is_first: bool) -> Iterator[tuple[str, Origin]]:
    """What each token of a chunk makes final, and where the token came from.

    Args:
        text: of the chunks before.
        chunk: of a stream in this mode.
        mode: of decoding.
        is_first: the chunk is that of prefill.
    """
    # two_pass emits its exact token first; accepted drafts stand before the bonus token
    origins: list[Origin] = ["target"] if mode == "two_pass" and not is_first else []
    origins.extend("drafted" for _ in range(chunk.num_accepted_tokens))
    origins.extend("copied" for _ in range(chunk.num_copied_tokens))
    for index, token in enumerate(chunk.token_ids):
        yield text.put([token], last=False), origins[index] if index < len(origins) else "target"


class TextStream:
    """Turns token ids into text as it becomes final.

    Holds back characters whose bytes are not all there and, where the tokenizer takes spaces out again between words
    and signs, the last word and the space before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None):
        self.tokenizer = tokenizer
        self.cleans_up = tokenizer is not None and _cleans_up(tokenizer)
        self.ids: list[int] = []
        self.is_byte: dict[int, bool] = {}
        self.sent = 0

    def put(self, ids: list[int], last: bool) -> str:
        """The text that became final with these ids; `last`: nothing follows."""
        if self.tokenizer is None:
            return ""
        self.ids += ids
        final = len(self.ids)
        while not last and final and self._is_byte(self.ids[final - 1]):
            final -= 1  # bytes next to each other are read together, whatever they are by themselves
        text = cast(str, self.tokenizer.decode(self.ids[:final], skip_special_tokens=True))
        if not last:
            text = text.rstrip("�")
            if self.cleans_up:
                text = _LAST_WORD.sub("", text)
        new = text[self.sent :]
        self.sent = max(self.sent, len(text))
        return new

    def _is_byte(self, token_id: int) -> bool:
        """Whether a token is a byte for want of a better one, as tokenizers with byte fallback write it."""
        if token_id not in self.is_byte:
            assert self.tokenizer is not None
            token = self.tokenizer.convert_ids_to_tokens(token_id)
            self.is_byte[token_id] = isinstance(token, str) and _BYTE.fullmatch(token) is not None
        return self.is_byte[token_id]


_BYTE = re.compile("<0x[0-9A-F]{2}>")
_LAST_WORD = re.compile(r"\s*\S*\Z")


def _cleans_up(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether decoding takes out spaces that the tokens have; many tokenizers ask for it, and few of them do it."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    ids = tokenizer("a . b ! c ? d , e ' f n't g 's", add_special_tokens=False).input_ids
    return tokenizer.decode(ids) != tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def counts_of(state: DecodeState, mode: str, num_sequences: int) -> list[SequenceCounts]:
    """The counts of the first rows of a decoding state."""
    per_step = 2 if mode == "two_pass" else 1
    n = num_sequences
    rows = zip(state.rounds()[:n], state.copies()[:n], state.num_new.tolist()[:n], strict=True)
    return [
        SequenceCounts([a for a, _ in drafts], [d for _, d in drafts], new, per_step, *_apart(copies))
        for drafts, copies, new in rows
    ]


def _apart(copies: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Accepted copies and copies of each round; empty where nothing was copied."""
    if not any(copied for _, copied in copies):
        return [], []
    return [accepted for accepted, _ in copies], [copied for _, copied in copies]


def outputs_of(state: DecodeState, num_sequences: int) -> list[list[int]]:
    """The tokens that count of the first rows of a decoding state."""
    rows = zip(state.output[:num_sequences].tolist(), state.num_new[:num_sequences].tolist(), strict=True)
    return [output[:n] for output, n in rows]
