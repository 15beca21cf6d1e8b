"""Files and hub datasets as validated rows; what is wrong with one is said with file and line.

Knows where rows stand and which of them are held out; what a row must be, `row_checks` knows.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pardec.data.python_sources import PACKAGES, STDLIB, TRAIN, python_sources, source_folder
from pardec.data.row_checks import DataError, check_row
from pardec.errors import first_line, shown

_TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")
_JSONL_SUFFIXES = (".jsonl", ".json")
# what data sets come in
_ROWS_SUFFIXES = (*_JSONL_SUFFIXES, ".csv", ".tsv", ".arrow", ".gz", ".zst", ".xz", ".bz2", ".zip")
# some editors write it in front of UTF-8; it is no text
BYTE_ORDER_MARK = "\ufeff"
# without a validation file, one document in this many is held out
_HELD_OUT_ONE_IN = 20


def read_rows(path: str, format: str, split: str = TRAIN, subset: str | None = None) -> list[dict[str, Any]]:
    """Validated rows with `text`, `conversations` or `input_ids` and `loss_mask`; of the last two, `where` they stand.

    Args:
        path: file, folder of text files, or dataset that `datasets` loads.
        format: `auto`, `text`, `jsonl` or `hub`.
        split: of a dataset that `datasets` loads.
        subset: its configuration.

    Raises:
        DataError: if there is nothing there, or a row is malformed (names file and line).
    """
    where = Path(path)
    if format == "auto":
        format = format_of(where)
    if format == "hub":
        rows = _hub_rows(path, split, subset)
    elif not where.exists():
        raise DataError(f"data: expected a file or folder, found nothing at {path}")
    elif format == "jsonl":
        rows = _jsonl_rows(where)
    else:
        rows = _text_rows(where)
    if not rows:
        raise DataError(f"{path}: expected at least one row of data, found none")
    return rows


def training_rows(
    path: str, format: str = "auto", split: str = TRAIN, subset: str | None = None
) -> list[dict[str, Any]]:
    """Rows as from `read_rows`, or of the Python sources' training split, without what `load_corpus` holds out.

    Raises:
        DataError: for data that cannot be used.
    """
    folder = source_folder(path)
    if folder is not None:
        return [{"text": text} for text in python_sources(folder, TRAIN)]
    rows = read_rows(path, format, split, subset)
    return hold_out(rows)[0] if len(rows) > 1 or rows[0].get("text") else rows


def held_out_rows(path: str, split: str, format: str = "auto") -> list[dict[str, Any]]:
    """Rows of held-out data on this disk, or those of a split of `python-stdlib` or `python-packages`.

    Args:
        path: file or folder, or one of these names.
        split: of these two.
        format: `text` or `jsonl` for a file whose suffix does not tell.

    Raises:
        DataError: for data that cannot be used, a hub dataset among them: which of its splits is held out is not known.
    """
    folder = source_folder(path)
    if folder is not None:
        return [{"text": text} for text in python_sources(folder, split)]
    return read_rows(path, held_out_format(path, format))


def held_out_format(path: str, format: str) -> str:
    """What held-out data on this disk are read as: `format` where their suffix does not tell.

    Raises:
        DataError: if there is nothing, as for a hub dataset: which of its splits is held out is not known.
    """
    where = Path(path)
    if source_folder(path) is not None:
        return "auto"
    if not where.exists():
        raise DataError(
            f"held-out data: expected a file, a folder, {STDLIB} or {PACKAGES}, found nothing at {path}; "
            "download a split of a hub dataset first"
        )
    tells = where.suffix in (*_TEXT_SUFFIXES, *_JSONL_SUFFIXES) or (where.is_dir() and format != "text")
    return "auto" if tells or format == "hub" else format


def hold_out(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training rows, validation rows); a single text is cut near its end."""
    if len(rows) == 1 and rows[0].get("text"):
        text = rows[0]["text"]
        cut = len(text) - len(text) // _HELD_OUT_ONE_IN
        return [{"text": text[:cut]}], [{"text": text[cut:]}]
    chosen = held_out_numbers(len(rows))
    validation = [rows[i] for i in chosen]
    return [row for i, row in enumerate(rows) if i not in chosen], validation


def held_out_numbers(num_rows: int) -> range:
    """Which of several rows are held out.

    Raises:
        DataError: if there are fewer than two.
    """
    if num_rows < 2:
        raise DataError(f"data: expected at least 2 rows or data.validation_path, found {num_rows} row")
    return range(0, num_rows, min(_HELD_OUT_ONE_IN, num_rows))


def format_of(where: Path) -> str:
    """`text`, `jsonl` or `hub`, by what is there and its suffix.

    Raises:
        DataError: for a file with another suffix, or a folder with more in files of rows than in texts.
    """
    if where.is_dir():
        if any(where.rglob("*.parquet")):
            return "hub"
        _check_is_of_texts(where)
        return "text"
    if where.suffix in _TEXT_SUFFIXES:
        return "text"
    if where.suffix in _JSONL_SUFFIXES:
        return "jsonl"
    if where.exists():
        known = ", ".join((*_TEXT_SUFFIXES, *_JSONL_SUFFIXES))
        raise DataError(f"{where}: expected a file ending in {known} or data.format, found {where.suffix!r}")
    return "hub"


def _check_is_of_texts(folder: Path) -> None:
    """Refuses a data set's folder, of which nothing but its README would be read."""
    sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    rows = {file: size for file, size in sizes.items() if file.suffix.lower() in _ROWS_SUFFIXES}
    if sum(rows.values()) > sum(size for file, size in sizes.items() if file.suffix in _TEXT_SUFFIXES):
        largest = max(rows, key=lambda file: rows[file])
        raise DataError(
            f"{folder}: expected a folder of texts, found less in texts than in files of rows, such as "
            f"{largest.relative_to(folder)}; name that file, or take the texts alone by data.format=text"
        )


def _text_rows(where: Path) -> list[dict[str, Any]]:
    return [{"text": text} for text in map(read_utf8, text_files(where)) if text.strip()]


def text_files(where: Path) -> list[Path]:
    """A text file, or all below a folder, sorted."""
    below = (path for path in where.rglob("*") if path.suffix in _TEXT_SUFFIXES and path.is_file())
    return [where] if where.is_file() else sorted(below)


def read_utf8(file: Path, *, keeps_line_ends: bool = False) -> str:
    """The text of a file, without a byte order mark.

    Args:
        file: where it stands.
        keeps_line_ends: of other systems; else they become `\\n`, as Python reads its own sources.

    Raises:
        DataError: if it is not UTF-8, naming the place.
    """
    try:
        with file.open(encoding="utf-8", newline="" if keeps_line_ends else None) as text:
            return text.read().removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: expected UTF-8 text, found {error.reason} at byte {error.start}") from None


def _jsonl_rows(file: Path) -> list[dict[str, Any]]:
    return [check_row(row, where) for where, row in json_lines(file)]


def json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, value) of every line of a file that is not empty.

    Raises:
        DataError: if it is no file, or a line is no JSON, naming the line.
    """
    check_is_file(file)
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.removeprefix(BYTE_ORDER_MARK.encode()).strip():
                yield f"{file}:{number}", json_line(line, f"{file}:{number}")


def check_is_file(file: Path) -> None:
    """Refuses what cannot be read twice, such as a folder or a pipe.

    Raises:
        DataError: naming it.
    """
    if not file.is_file():
        found = "a folder" if file.is_dir() else "no regular file" if file.exists() else "nothing"
        raise DataError(f"{file}: expected a JSONL file, found {found}")


def json_line(line: bytes, where: str) -> Any:
    """The value of a line.

    Raises:
        DataError: if it is no JSON, beginning with `where`.
    """
    try:
        # json would guess at encodings
        return json.loads(line.decode().removeprefix(BYTE_ORDER_MARK), object_pairs_hook=_without_repetition)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: expected UTF-8 text, found {error.reason} at byte {error.start} of it") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected one JSON object, found {first_line(error)}") from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {shown(twice)} twice")
    return found


def hub_dataset(path: str, split: str, subset: str | None, *, streaming: bool = False) -> Any:
    """What `datasets` loads; with `streaming` read as it is needed, and nothing downloaded before.

    Raises:
        DataError: if `datasets` is missing or loads nothing.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(f"data {path!r}: expected the package datasets for hub data, found it missing") from None
    try:
        return datasets.load_dataset(path, subset, split=split, streaming=streaming)
    except Exception as error:  # datasets raises many kinds, all of them about the data's place or form
        raise DataError(f"data {path!r}: expected a file, folder or hub dataset, found {first_line(error)}") from None


def _hub_rows(path: str, split: str, subset: str | None) -> list[dict[str, Any]]:
    rows = hub_dataset(path, split, subset)
    return [check_row(row, f"{path}:{split}:{number}") for number, row in enumerate(rows, start=1)]
