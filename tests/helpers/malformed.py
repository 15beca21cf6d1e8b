"""Values and files that are not what was asked for, made by rule, and what must be said of them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# in JSON, as some are no values that Python would write
UNFIT = {
    "null": "null",
    "true": "true",
    "negative": "-1",
    "zero": "0",
    "half": "2.5",
    "huge": "1" + "0" * 400,
    "endless": "1" * 5000,
    "infinite": "Infinity",
    "nan": "NaN",
    "no text": '""',
    "text": '"x"',
    "lines": '"a\\nb\\u2028c"',
    "long text": json.dumps("x" * 5000),
    "list": "[]",
    "object": "{}",
    "other object": '{"a\\nb": [1, {"c": null}]}',
    "deep": "[" * 600 + "]" * 600,
    "bottomless": "[" * 100_000 + "]" * 100_000,
}


def outcome_of(act: Callable[[], object], kind: type[ValueError], *begins: str) -> tuple[bool, str]:
    """Whether `act` is refused by an error of this kind, and what is wrong with how: nothing, if in one line so begun.

    Args:
        act: what may be refused.
        kind: of error.
        begins: what its line may begin with.
    """
    try:
        act()
    except kind as error:
        is_told = is_one_line(error) and str(error).startswith(begins)
        return True, "" if is_told else str(error)[:300]
    except Exception as error:  # all of them are to be seen
        return False, f"{type(error).__name__}: {error}"
    return False, ""


def keys_of(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all keys of nested objects, the outer ones before the inner."""
    for key in value if isinstance(value, dict) else ():
        yield (*path, key)
        yield from keys_of(value[key], (*path, key))


def with_text(value: Any, path: tuple[str, ...], text: str) -> str:
    """The JSON of `value` with `text` in place of what is at `path`."""
    return json.dumps(_changed(value, path, "\0here\0")).replace(json.dumps("\0here\0"), text)


def without(value: Any, path: tuple[str, ...]) -> str:
    """The JSON of `value` without the key at `path`."""
    return json.dumps(_changed(value, path, None))


def _changed(value: Any, path: tuple[str, ...], new: Any) -> Any:
    key, *rest = path
    inner = _changed(value[key], tuple(rest), new) if rest else new
    return {name: old for name, old in value.items() if name != key} | ({} if inner is None else {key: inner})


def damaged_files(content: bytes) -> dict[str, Callable[[Path], object]]:
    """Ways in which a file may be damaged, by name."""

    def write(data: bytes) -> Callable[[Path], object]:
        return lambda path: path.write_bytes(data)

    def make_folder(path: Path) -> None:
        path.unlink()
        path.mkdir()

    cuts = {f"cut after {n}": write(content[:n]) for n in (1, 8, len(content) // 2, len(content) - 1)}
    noise = bytes(range(256)) * 4
    rest = {"absent": Path.unlink, "empty": write(b""), "folder": make_folder, "noise": write(noise)}
    return cuts | rest | {"noise behind": write(content + noise), "zeros": write(bytes(len(content)))}


def is_one_line(error: ValueError) -> bool:
    """Whether an error is what the house asks of it: one short line that says what was expected and found."""
    message = str(error)
    return len(message.splitlines()) == 1 and len(message) <= 400 and "expected" in message and "found" in message
