"""Prompts of the command line: an argument, a file or standard input."""

import io
import json
import sys
from pathlib import Path
from typing import Any, TextIO

from pardec.data.reading import BYTE_ORDER_MARK, read_utf8
from pardec.errors import encodable, first_line, short


def read_prompts(
    source: str | None, prompt: str | None, prompt_file: str | None, *, as_chat: bool = False
) -> list[str]:
    """The prompts that exactly one of these gives; `-` is standard input.

    Args:
        source: the argument, which is nothing but `-`.
        prompt: a text.
        prompt_file: a text file, or JSON lines with a `prompt`.
        as_chat: prompts are what users say, so lines may have `turns` instead, of which the first is taken.

    Raises:
        ValueError: for none or several, an unreadable file or an empty prompt.
    """
    if source not in (None, "-"):
        raise ValueError(f"prompt: expected --prompt, --prompt-file or -, found argument {source!r}")
    given = [value for value in (source, prompt, prompt_file) if value is not None]
    if len(given) != 1:
        raise ValueError(f"prompt: expected exactly one of --prompt, --prompt-file and -, found {len(given)}")
    if given[0] == "-":
        texts = [_read_standard_input().removeprefix(BYTE_ORDER_MARK)]
    elif prompt is not None:
        texts = [prompt]
    else:
        texts = _prompts_of_file(Path(given[0]), as_chat)
    for text in texts:
        if not text:
            raise ValueError("prompt: expected some text, found an empty prompt")
    return texts


def standard_input() -> TextIO:
    """Standard input, where it is open; of bytes that are no UTF-8 `checked_input` says where they stand."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    return sys.stdin


def checked_input(where: str, text: str) -> str:
    """The text, which came from `standard_input`.

    Raises:
        ValueError: beginning with `where`, if some of it was no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:  # such bytes are kept as halves of surrogate pairs
        raise ValueError(f"{where}: expected UTF-8 text, found another byte at character {error.start}") from None
    return text


def _read_standard_input() -> str:
    if sys.stdin is None:
        raise ValueError("prompt: expected text on standard input, found it closed")
    return checked_input("standard input", standard_input().read())


def _prompts_of_file(path: Path, as_chat: bool) -> list[str]:
    if path.is_dir() or not path.exists():  # a pipe is read once, which is enough
        raise ValueError(f"{path}: expected a prompt file, found {'a directory' if path.is_dir() else 'nothing'}")
    text = read_utf8(path, keeps_line_ends=True)  # prompts are taken as they stand
    if path.suffix != ".jsonl":
        return [text]
    prompts = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: expected a JSON object, found {first_line(error)}") from None
        where = f"{path}:{number}"
        prompts.append(encodable(where, _prompt_of(value, as_chat, where)))
    if not prompts:
        raise ValueError(f"{path}: expected at least one prompt, found none")
    return prompts


def _prompt_of(row: Any, as_chat: bool, where: str) -> str:
    prompt = row.get("prompt") if isinstance(row, dict) else None
    turns = row.get("turns") if isinstance(row, dict) and "prompt" not in row else None
    if isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns):
        prompt = turns[0] if as_chat else None
    if isinstance(prompt, str) and prompt:
        return prompt
    expected = "an object with a non-empty text 'prompt'" + (" or with 'turns'" if as_chat else "")
    hint = " (turns are read with --chat)" if turns and not as_chat else ""
    raise ValueError(f"{where}: expected {expected}, found {short(json.dumps(row, ensure_ascii=False))}{hint}")
