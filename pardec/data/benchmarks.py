"""Prompts to measure on, as token ids with a category and a name: a benchmark's file, a text, or held-out source code.

Knows files and tokenizers, no model. Every error about a file names it, and the line where there is one.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pardec.data.corpus import held_out_prompts
from pardec.data.python_sources import STDLIB, source_folder
from pardec.data.reading import BYTE_ORDER_MARK
from pardec.data.row_checks import check_unicode
from pardec.decoding.asking.messages import message_ids
from pardec.decoding.asking.prompts import text_ids

ACCEPTED = "'prompt', 'task_id' with 'prompt', or 'question_id' with 'category' and 'turns'"


@dataclass(frozen=True)
class Prompt:
    """One prompt, as the model gets it.

    Attributes:
        token_ids: at least one.
        category: what figures are grouped by: `code`, `text`, or what the benchmark says.
        name: what reports call it; no two prompts of a source have the same.
    """

    token_ids: list[int]
    category: str
    name: str


def read_prompts(
    source: str,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    split: str,
    num_prompts: int | None,
    max_prompt_tokens: int | None,
    as_chat: bool = False,
) -> list[Prompt]:
    """The prompts of a source, in its order.

    A `.jsonl` file has one object per line, told apart by its keys; keys that are not named here are ignored:
    `prompt` alone, or with `task_id` as in HumanEval, is taken as it stands; of `turns` with `question_id` and
    `category`, as in MT-Bench and Spec-Bench, the first goes through the tokenizer's chat template where it has one.

    Args:
        source: `python-stdlib`, `python-packages`, a `.jsonl` file, or any other file, which is one prompt as a whole.
        tokenizer: of the base; None is refused.
        split: of the first two, `validation` or `test`; files have none.
        num_prompts: so many are taken, of each category its share; None for all.
        max_prompt_tokens: longer prompts lose tokens from their left, a BOS too: the end is what is continued;
            None keeps everything.
        as_chat: what would be taken as it stands is a user's message instead, rendered by the chat template.

    Raises:
        ValueError: for input that cannot be used: `path:line: expected ..., found ...`.
    """
    if tokenizer is None:
        raise ValueError("base: expected a tokenizer beside the model, found none")
    for option, value in (("num_prompts", num_prompts), ("max_prompt_tokens", max_prompt_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{option}: expected an integer >= 1, found {value}")
    if source_folder(source) is not None:
        if as_chat:
            raise ValueError(f"chat: expected a file of prompts, found {source}, which is code to continue")
        rows = held_out_prompts(tokenizer, split, source, num_prompts)
        prompts = [Prompt(ids, "code", f"{source}/{split}/{index}") for index, ids in enumerate(rows)]
    else:
        prompts = _prompts_of_file(Path(source), tokenizer, as_chat)
    if num_prompts is not None and len(prompts) > num_prompts:
        prompts = _shares(prompts, num_prompts)
    if max_prompt_tokens is None:
        return prompts
    return [replace(one, token_ids=one.token_ids[-max_prompt_tokens:]) for one in prompts]


def _shares(prompts: list[Prompt], num_prompts: int) -> list[Prompt]:
    """So many of the prompts, in their order: of each category its share, evenly over what there is of it.

    Taken evenly over all, those of categories that take turns could leave one out.
    """
    members: dict[str, list[int]] = {}
    for index, one in enumerate(prompts):
        members.setdefault(one.category, []).append(index)
    taken, seen = [], 0
    for indices in members.values():
        before, seen = num_prompts * seen // len(prompts), seen + len(indices)
        share = num_prompts * seen // len(prompts) - before
        taken += [indices[n * len(indices) // share] for n in range(share)]
    return [prompts[index] for index in sorted(taken)]


def _prompts_of_file(path: Path, tokenizer: PreTrainedTokenizerBase, as_chat: bool) -> list[Prompt]:
    if path.is_dir() or not path.exists():
        found = "a directory" if path.is_dir() else "nothing there"
        raise ValueError(f"{path}: expected {STDLIB} or a file of prompts, found {found}")
    content = path.read_bytes()
    if path.suffix.lower() != ".jsonl":
        text = _decoded(content, str(path))
        return [Prompt(_token_ids(text, tokenizer, str(path), as_chat), "text", path.name)]
    prompts, names = [], set()
    # only \n ends a line of JSON: str.splitlines would also cut at separators inside of its texts
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            row = _json_object(_decoded(line, where), where)
            one = _prompt_of_row(row, tokenizer, where, f"{path.name}:{number}", as_chat)
            if one.name in names:  # benchmarks that were joined may count from the same number
                one = replace(one, name=f"{one.name} ({path.name}:{number})")
            names.add(one.name)
            prompts.append(one)
    if not prompts:
        raise ValueError(f"{path}: expected at least one prompt, found an empty file")
    return prompts


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: expected UTF-8 text, found {error.reason} at byte {error.start}") from None


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected one JSON object, found {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected one JSON object, found {type(row).__name__}")
    check_unicode(json.dumps(row, ensure_ascii=False), where)
    return row


def _prompt_of_row(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, where: str, name: str, as_chat: bool
) -> Prompt:
    """A line of a JSONL file as a prompt; `name` is for rows that bring none."""
    has_turns = {"question_id", "category", "turns"} <= row.keys()
    if has_turns == ("prompt" in row):
        keys = ", ".join(map(repr, row)) or "no keys"
        raise ValueError(f"{where}: expected one of {ACCEPTED}, found {keys[:120]}")
    if has_turns:
        category, turns = row["category"], row["turns"]
        if not isinstance(category, str) or not category:
            raise ValueError(f"{where}: expected a category as text, found {str(category)[:60]!r}")
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"{where}: expected turns as a list of texts, found {str(turns)[:60]!r}")
        ids = _token_ids(turns[0], tokenizer, where, as_chat or bool(tokenizer.chat_template))
        return Prompt(ids, category, _identifier(row["question_id"], "question_id", where))
    ids = _token_ids(row["prompt"], tokenizer, where, as_chat)
    if "task_id" in row:
        return Prompt(ids, "code", _identifier(row["task_id"], "task_id", where))
    return Prompt(ids, "text", name)


def _identifier(value: object, key: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{where}: expected {key} as a text or an integer, found {str(value)[:60]!r}")
    return str(value)


def _token_ids(text: object, tokenizer: PreTrainedTokenizerBase, where: str, as_chat: bool) -> list[int]:
    """Token ids of a text, or of the conversation that it opens."""
    if not isinstance(text, str):
        raise ValueError(f"{where}: expected the prompt as text, found {type(text).__name__}")
    if not text.strip():
        raise ValueError(f"{where}: expected some text to continue, found an empty prompt")
    if as_chat:
        (ids,) = message_ids([{"role": "user", "content": text}], tokenizer)
    else:
        ids = text_ids(text, tokenizer)
    if not ids:
        raise ValueError(f"{where}: expected at least one token, found a text that the tokenizer makes none of")
    return ids
