"""Rows of data that stay where they are, on the disk, and are read by number: files, and datasets on the hub.

Knows no tokenizer. What is held of a corpus is twenty bytes a row.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pardec.all_cores import on_all_cores
from pardec.data.python_sources import python_files, source_folder, split_of
from pardec.data.reading import (
    check_is_file,
    format_of,
    held_out_numbers,
    hold_out,
    hub_dataset,
    json_line,
    read_utf8,
    text_files,
)
from pardec.data.row_checks import DataError, check_row
from pardec.data.shards import made_folder, pieces_of
from pardec.run import check_unchanged, stamp_of, written_aside

_BLOCK_BYTES = 1 << 24
# what a line of JSON begins with only where it is empty, or somebody has indented it or written a byte order mark
_PERHAPS_EMPTY = np.frombuffer(b" \t\n\r\x0b\x0c\xef", dtype=np.uint8)
# rows are looked at in pieces of this size, which keep every core busy for a second
_CHECKED_BYTES = 1 << 24


class Rows(Protocol):
    """Validated rows by number.

    Attributes:
        sizes: bytes of each, about.
        digest: SHA-256 of what is in them.
    """

    @property
    def sizes(self) -> np.ndarray: ...

    @property
    def digest(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class LinesOfJson:
    """The lines of a JSONL file that are not empty.

    Attributes:
        file: which.
        starts: first byte of each.
        sizes: bytes of each.
        lines: number of each in the file, from 1.
        digest: of the file.
        stamp: of the file when it was looked at.
    """

    file: Path
    starts: np.ndarray
    sizes: np.ndarray
    lines: np.ndarray
    digest: str
    stamp: tuple[int, int]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> dict[str, Any]:
        with self.file.open("rb") as file:
            check_unchanged(self.file, self.stamp)
            file.seek(int(self.starts[number]))
            line = file.read(int(self.sizes[number]))
        where = f"{self.file}:{self.lines[number]}"
        return check_row(json_line(line, where), where)


@dataclass(frozen=True)
class TextFiles:
    """Files of text, each a row."""

    files: Sequence[Path]
    stamps: Sequence[tuple[int, int]]
    sizes: np.ndarray
    digest: str

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> dict[str, Any]:
        check_unchanged(self.files[number], self.stamps[number])
        return {"text": read_utf8(self.files[number])}


@dataclass(frozen=True)
class Table:
    """Rows of a dataset that `datasets` has on the disk."""

    rows: Any
    name: str
    sizes: np.ndarray
    digest: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return check_row(self.rows[number], f"{self.name}:{number + 1}")


@dataclass(frozen=True)
class Texts:
    """Texts in memory."""

    texts: Sequence[str]

    @property
    def sizes(self) -> np.ndarray:
        """Characters of each."""
        return np.array([len(text) for text in self.texts], dtype=np.int64)

    @property
    def digest(self) -> str:
        """SHA-256 of the texts and where they end."""
        return hashlib.sha256(repr(list(self.texts)).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"text": self.texts[number]}


@dataclass(frozen=True)
class Part:
    """Some of other rows, by their numbers."""

    rows: Rows
    numbers: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of each, about."""
        return self.rows.sizes[self.numbers]

    @property
    def digest(self) -> str:
        """Of all the rows and of which they are."""
        return hashlib.sha256(self.rows.digest.encode() + self.numbers.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.rows[int(self.numbers[number])]


def open_rows(
    path: str, format: str, split: str, subset: str | None, checked: Path, *, show_progress: bool = False
) -> Rows:
    """Rows as `read_rows` gives them, or those of a split of the Python sources, none of them held in memory.

    Every row is looked at once, by all cores; data that were found good are not looked at again.

    Args:
        path: see `read_rows`, `python-stdlib` or `python-packages`.
        format: see `read_rows`.
        split: see `read_rows`; of the Python sources `train`, `validation` or `test`.
        subset: see `read_rows`.
        checked: folder that remembers which data were found good.
        show_progress: a progress bar while rows are looked at.

    Raises:
        DataError: if there is nothing there, or a row is malformed (names file and line).
    """
    folder = source_folder(path)
    if folder is not None:
        below = (file for file in python_files(folder) if split_of(file.relative_to(folder).as_posix()) == split)
        return _text_files(below, skips_unreadable=True)
    where = Path(path)
    format = format_of(where) if format == "auto" else format
    if format != "hub" and not where.exists():
        raise DataError(f"data: expected a file or folder, found nothing at {path}")
    if format == "text":
        rows: Rows = _text_files(text_files(where))
    elif format == "jsonl":
        rows = _lines_of_json(where)
    else:
        rows = table_of(hub_dataset(path, split, subset), f"{path}:{split}")
    if not len(rows):
        raise DataError(f"{path}: expected at least one row of data, found none")
    if format == "jsonl":
        _check_all(rows, checked / f"checked-{rows.digest[:32]}", show_progress)
    return rows


def hold_out_rows(rows: Rows) -> tuple[Rows, Rows]:
    """(training rows, validation rows), the same as of `hold_out`.

    Raises:
        DataError: if there is only one row, and that is no text.
    """
    if len(rows) == 1:
        train, validation = ([row["text"] for row in part] for part in hold_out([rows[0]]))
        return Texts(train), Texts(validation)
    chosen = held_out_numbers(len(rows))
    held_out = np.zeros(len(rows), dtype=bool)
    held_out[chosen] = True
    return Part(rows, np.flatnonzero(~held_out)), Part(rows, np.flatnonzero(held_out))


def table_of(rows: Any, name: str) -> Table:
    """The rows of a table, each looked at.

    Raises:
        DataError: for a malformed one.
    """
    digest, sizes = hashlib.sha256(), []
    for number, row in enumerate(rows, start=1):
        content = repr(sorted(check_row(row, f"{name}:{number}").items())).encode("utf-8", "surrogatepass")
        digest.update(content)
        sizes.append(len(content))
    return Table(rows, name, np.array(sizes, dtype=np.int64), digest.hexdigest())


def _text_files(files: Iterable[Path], *, skips_unreadable: bool = False) -> TextFiles:
    kept, stamps, sizes, digest = [], [], [], hashlib.sha256()
    for file in files:
        stamp = stamp_of(file)
        try:
            text = read_utf8(file)
        except DataError:
            if not skips_unreadable:
                raise
            continue
        if text.strip():
            content = text.encode()
            digest.update(f"{len(content)} ".encode() + content)
            kept.append(file)
            stamps.append(stamp)
            sizes.append(len(content))
    return TextFiles(kept, stamps, np.array(sizes, dtype=np.int64), digest.hexdigest())


def _lines_of_json(file: Path) -> LinesOfJson:
    check_is_file(file)
    stamp = stamp_of(file)
    digest, cuts, firsts, done, is_cut = hashlib.sha256(), [], [], 0, True
    with file.open("rb") as blocks:
        while block := blocks.read(_BLOCK_BYTES):
            digest.update(block)
            found = np.frombuffer(block, dtype=np.uint8)
            begin = np.flatnonzero(found == ord("\n")) + 1
            begin = np.concatenate([[0], begin] if is_cut else [begin])
            is_cut = block.endswith(b"\n")  # then a line begins with the next block, if there is one
            begin = begin[begin < len(block)]
            cuts.append(begin + done)
            firsts.append(found[begin])
            done += len(block)
    starts = np.concatenate(cuts or [np.empty(0, dtype=np.int64)])
    sizes = np.diff(starts, append=done)
    lines = np.arange(1, len(starts) + 1)
    full = ~np.isin(np.concatenate(firsts or [np.empty(0, dtype=np.uint8)]), _PERHAPS_EMPTY)
    with file.open("rb") as content:
        for number in np.flatnonzero(~full):
            content.seek(int(starts[number]))
            full[number] = bool(content.read(int(sizes[number])).removeprefix(b"\xef\xbb\xbf").strip())
    return LinesOfJson(
        file, starts[full], sizes[full].astype(np.int32), lines[full].astype(np.int32), digest.hexdigest(), stamp
    )


def _check_all(rows: Rows, found_good: Path, show_progress: bool) -> None:
    if found_good.exists():
        return
    pieces = pieces_of(rows.sizes, _CHECKED_BYTES)
    on_all_cores(
        partial(_check_piece, rows, pieces), range(len(pieces)), title="checking rows", show_progress=show_progress
    )
    made_folder(found_good.parent)
    with written_aside(found_good) as aside:
        aside.touch()


def _check_piece(rows: Rows, pieces: Sequence[np.ndarray], piece: int) -> None:
    for number in pieces[piece]:
        rows[int(number)]
