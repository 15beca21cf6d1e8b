"""Passages of texts, or of the documentation inside of Python sources, turned into what people ask about a text.

Knows neither chat templates nor tokenizers.
"""

import ast
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pardec.data.responses.statements import statements_of

# of a passage; shorter ones leave nothing to summarise
MIN_CHARACTERS = 200
# of one text, so that no long one is most of what is asked
_PER_TEXT = 3

_WORDINGS = (
    "Summarise the following text in two sentences.\n\n{passage}",
    "{passage}\n\nWhat is this text about?",
    "Continue this text:\n\n{passage}",
    "Write three questions that this passage answers.\n\n{passage}",
    "Rewrite the following in simple words, for a beginner:\n\n{passage}",
    "List the main points of this text:\n\n{passage}",
    "Give this text a title, and say why it fits.\n\n{passage}",
    "Explain the following to me as you would to a colleague.\n\n{passage}",
    "Rewrite this passage so that it is half as long:\n\n{passage}",
    "Which terms in this text need an explanation? Explain them.\n\n{passage}",
    "Turn this into a short dialogue between two people:\n\n{passage}",
    "Here is a part of a longer text. What might come next?\n\n{passage}",
    "Write an e-mail that tells a friend about this:\n\n{passage}",
)


@dataclass(frozen=True)
class PassageRequest:
    """A wording and what it is about, kept apart so that the passage can be shortened.

    Attributes:
        wording: with {passage} in it.
        passage: the text.
    """

    wording: str
    passage: str

    def text(self) -> str:
        """The request as it is asked."""
        return self.wording.replace("{passage}", self.passage)

    def shortened(self, share: float) -> "PassageRequest":
        """The same about the beginning of the passage, `share` of it at most, up to the end of a word."""
        cut = self.passage[: int(len(self.passage) * share)]
        return PassageRequest(self.wording, cut[: max(cut.rfind(" "), cut.rfind("\n"), 0)].rstrip())


def passage_requests(
    texts: Sequence[str], characters: int, draw: random.Random, *, python: bool = False
) -> Iterator[PassageRequest]:
    """Requests about passages of texts, texts in an order that is drawn, each passage in a drawn wording.

    Args:
        texts: from which at most three passages each are drawn.
        characters: that paragraphs are joined up to; drawn anew for each text, between a quarter and all of them.
        draw: what order, passages and wordings are drawn by.
        python: the texts are Python sources, of which the documentation is meant.
    """
    for text in draw.sample(texts, len(texts)):
        limit = round(characters * draw.uniform(0.25, 1))
        if python:  # documentation is lists of arguments further down
            passages = [passage for part in documentation_of(text) for passage in passages_of(part, limit)[:1]]
        else:
            passages = passages_of(text, limit)
        for passage in draw.sample(passages, min(_PER_TEXT, len(passages))):
            yield PassageRequest(draw.choice(_WORDINGS), passage)


def passages_of(text: str, characters: int) -> list[str]:
    """Runs of whole paragraphs of 200 to `characters` characters; longer paragraphs are passages as they are."""
    passages, passage = [], ""
    for paragraph in re.split(r"\n\s*\n", text):
        longer = f"{passage}\n\n{paragraph}" if passage else paragraph
        if passage and len(longer) > characters:
            passages.append(passage)
            longer = paragraph
        passage = longer.rstrip()
    return [one.strip("\n") for one in (*passages, passage) if len(one) >= MIN_CHARACTERS]


def documentation_of(source: str) -> Iterator[str]:
    """Docstrings of a Python source's module and classes, of 200 characters and more; none if it is broken."""
    for node in statements_of(source):
        doc = ast.get_docstring(node) if isinstance(node, ast.Module | ast.ClassDef) else None
        if doc is not None and len(doc) >= MIN_CHARACTERS:
            yield doc
