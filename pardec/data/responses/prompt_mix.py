"""Chat prompts of several sources, mixed by weights: questions of a file, requests about code, requests about texts.

Knows tokenizers and their chat templates, no model. Never draws from what is held out: one question or text in twenty,
and the validation and test splits of Python sources.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from pardec.data.conversations import conversation_of
from pardec.data.python_sources import PACKAGES, STDLIB, source_folder
from pardec.data.reading import training_rows
from pardec.data.responses.code_requests import code_requests
from pardec.data.responses.follow_ups import drawn_follow_up
from pardec.data.responses.passage_requests import MIN_CHARACTERS, PassageRequest, passage_requests
from pardec.data.responses.questions import training_questions
from pardec.data.responses.response_file import Prompt
from pardec.data.responses.response_prompts import asked_ids
from pardec.data.row_checks import DataError

Kind = Literal["questions", "code", "passages"]
# of text; a passage with more than fits into a prompt is cut
_CHARACTERS_PER_TOKEN = 4
# a round of requests is given up when this many behind one another do not fit
_MAX_IN_VAIN = 10_000


@dataclass(frozen=True)
class PromptSource:
    """Where a part of the prompts comes from.

    Attributes:
        kind: `questions` of a JSONL file, requests about the `code` of Python sources, or about `passages` of text.
        path: the file; `python-packages` or `python-stdlib`, of which passages are the documentation; or, for
            passages, a text file or a folder of them.
        weight: its share of the prompts is this of the sum of all weights; of 0 nothing is read.
        key: of questions, see `training_questions`.
    """

    kind: Kind
    path: str
    weight: float = 1.0
    key: str | None = None


def draw_mix(
    sources: Sequence[PromptSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_prompts: int,
    prompt_tokens: int,
    max_prompt_tokens: int | None = None,
    follow_ups: float = 0.0,
    seed: int = 0,
    show_progress: bool = False,
) -> tuple[list[Prompt], list[dict[str, Any]]]:
    """Prompts of all sources in an order drawn with `seed`; what one source gives does not depend on the others.

    All of a source's material comes up before any does again, code and passages then in other wordings.

    Args:
        sources: at least one.
        tokenizer: of the base, with a chat template.
        num_prompts: how many.
        prompt_tokens: of a rendered prompt at most: passages are cut to it, what else is longer is left out.
        max_prompt_tokens: a larger limit than this is refused.
        follow_ups: share of the prompts that get a follow-up.
        seed: of everything that is drawn.
        show_progress: a progress bar.

    Returns:
        the prompts in the order of their responses, and of each source its `kind` and `path`, how many `prompts` are
        its, and how many of its requests were `left_out` as they are too long.

    Raises:
        DataError: for sources that cannot be used or give no prompt, a limit beyond the model's, or without a chat
            template.
    """
    if max_prompt_tokens is not None and prompt_tokens > max_prompt_tokens:
        raise DataError(
            f"prompt_tokens: expected at most {max_prompt_tokens}, the positions of the base less max_new_tokens, "
            f"found {prompt_tokens}"
        )
    prompts: list[Prompt] = []
    given = []
    counts = apportioned([source.weight for source in sources], num_prompts)
    with tqdm(total=num_prompts, desc="drawing prompts", unit="prompt", disable=not show_progress, leave=False) as bar:
        for number, (source, count) in enumerate(zip(sources, counts, strict=True)):
            draw = random.Random(f"{seed} {number}")
            found, left_out = _prompts_of(source, tokenizer, count, prompt_tokens, draw, bar)
            prompts += found
            given.append({"kind": source.kind, "path": source.path, "prompts": count, "left_out": left_out})
    draw = random.Random(seed)
    draw.shuffle(prompts)
    for index in draw.sample(range(num_prompts), round(num_prompts * follow_ups)):
        prompts[index] = replace(prompts[index], follow_up=drawn_follow_up(draw))
    return prompts, given


def apportioned(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to `total`, as near to the weights' shares as they can be."""
    shares = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in shares]
    largest_rests = sorted(range(len(shares)), key=lambda n: counts[n] - shares[n])
    for n in largest_rests[: total - sum(counts)]:
        counts[n] += 1
    return counts


def _prompts_of(
    source: PromptSource,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    prompt_tokens: int,
    draw: random.Random,
    bar: tqdm,
) -> tuple[list[Prompt], int]:
    """So many prompts of a source, in rounds over its material, and how many of its first round were too long."""
    material = _material(source) if count else []
    prompts: list[Prompt] = []
    left_out, is_first = 0, True
    while len(prompts) < count:
        before, in_vain = len(prompts), 0
        for request in _requests(source, material, prompt_tokens, draw):
            prompt = _fitted(request, source, tokenizer, prompt_tokens)
            if prompt is None:
                left_out, in_vain = left_out + is_first, in_vain + 1
                if in_vain == _MAX_IN_VAIN:
                    break
                continue
            prompts.append(prompt)
            in_vain = 0
            bar.update()
            if len(prompts) == count:
                break
        if len(prompts) == before:
            found = f"{left_out:,} that are longer" if left_out else "none at all"
            raise DataError(
                f"{source.path}: expected {source.kind} for prompts of at most {prompt_tokens} tokens "
                f"(prompt_tokens), found {found}"
            )
        is_first = False
    return prompts, left_out


def _material(source: PromptSource) -> list[Any]:
    """Questions as turns, or texts, of the training split."""
    if source.kind == "questions":
        return training_questions(source.path, source.key)
    if source.kind == "code" and source_folder(source.path) is None:
        raise DataError(f"code: expected {PACKAGES} or {STDLIB} as its path, found {source.path}")
    rows = training_rows(source.path)
    if not all("text" in row for row in rows):
        raise DataError(f"{source.path}: expected texts for passages, found rows without a text")
    return [row["text"] for row in rows]


def _requests(
    source: PromptSource, material: list[Any], prompt_tokens: int, draw: random.Random
) -> Iterator[list[dict[str, Any]] | PassageRequest]:
    """One round: turns, or passages that can be shortened."""
    if source.kind == "questions":
        yield from draw.sample(material, len(material))
    elif source.kind == "code":
        yield from (_one_turn(text) for text in code_requests(material, draw))
    else:
        characters = _CHARACTERS_PER_TOKEN * prompt_tokens
        python = source_folder(source.path) is not None
        yield from passage_requests(material, characters, draw, python=python)


def _one_turn(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _fitted(
    request: list[dict[str, Any]] | PassageRequest,
    source: PromptSource,
    tokenizer: PreTrainedTokenizerBase,
    prompt_tokens: int,
) -> Prompt | None:
    """The rendered request, a passage cut as far as need be; None if it is too long."""
    while True:
        turns = _one_turn(request.text()) if isinstance(request, PassageRequest) else request
        conversation = conversation_of({"conversations": turns}, tokenizer, source.path)
        ids = asked_ids(conversation)
        if len(ids) <= prompt_tokens:
            return Prompt(ids, source.kind, conversation.turns)
        if not isinstance(request, PassageRequest):
            return None
        own = len(tokenizer(request.passage, add_special_tokens=False, verbose=False).input_ids)
        request = request.shortened(max(0.0, 1 - (len(ids) - prompt_tokens) / max(1, own)))
        if len(request.passage) < MIN_CHARACTERS:
            return None
