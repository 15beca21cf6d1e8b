"""Files and hub datasets as validated rows; what is wrong with one is said with file and line.

A row has `text`, `conversations`, or `input_ids` with a `loss_mask`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pardec.data.python_sources import PACKAGES, STDLIB, TRAIN, python_sources, source_folder
from pardec.errors import encodable, first_line, short, shown

_TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")
_JSONL_SUFFIXES = (".jsonl", ".json")
# some editors write it in front of UTF-8; it is no text
BYTE_ORDER_MARK = "\ufeff"
# without a validation file, one document in this many is held out
_HELD_OUT_ONE_IN = 20
# parts of a turn that a model of text alone cannot be shown
_UNSEEN_PARTS = ("image", "image_url", "audio", "input_audio", "video", "video_url")


class DataError(ValueError):
    """Data that cannot be used; the message names where, what was expected and what was found."""


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
    tells = where.is_dir() or where.suffix in (*_TEXT_SUFFIXES, *_JSONL_SUFFIXES)
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
        DataError: for a file with another suffix.
    """
    if where.is_dir() and any(where.rglob("*.parquet")):
        return "hub"
    if where.is_dir() or where.suffix in _TEXT_SUFFIXES:
        return "text"
    if where.suffix in _JSONL_SUFFIXES:
        return "jsonl"
    if where.exists():
        known = ", ".join((*_TEXT_SUFFIXES, *_JSONL_SUFFIXES))
        raise DataError(f"{where}: expected a file ending in {known} or data.format, found {where.suffix!r}")
    return "hub"


def _text_rows(where: Path) -> list[dict[str, Any]]:
    return [{"text": text} for text in map(read_utf8, text_files(where)) if text.strip()]


def text_files(where: Path) -> list[Path]:
    """A text file, or all below a folder, sorted."""
    below = (path for path in where.rglob("*") if path.suffix in _TEXT_SUFFIXES and path.is_file())
    return [where] if where.is_file() else sorted(below)


def read_utf8(file: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        DataError: if it is not UTF-8, naming the place.
    """
    try:
        return file.read_text(encoding="utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: expected UTF-8 text, found {error.reason} at byte {error.start}") from None


def _jsonl_rows(file: Path) -> list[dict[str, Any]]:
    return [check_row(row, where) for where, row in json_lines(file)]


def json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, value) of every line of a file that is not empty.

    Raises:
        DataError: if it is no file, or a line is no JSON, naming the line.
    """
    if not file.is_file():
        raise DataError(f"{file}: expected a JSONL file, found {'a folder' if file.exists() else 'nothing'}")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.removeprefix(BYTE_ORDER_MARK.encode()).strip():
                yield f"{file}:{number}", json_line(line, f"{file}:{number}")


def json_line(line: bytes, where: str) -> Any:
    """The value of a line.

    Raises:
        DataError: if it is no JSON, beginning with `where`.
    """
    try:
        return json.loads(line.removeprefix(BYTE_ORDER_MARK.encode()), object_pairs_hook=_without_repetition)
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


def check_row(row: Any, where: str) -> dict[str, Any]:
    """The row, if it is one that can be trained on; it remembers `where` if tokenising can still find fault with it.

    Raises:
        DataError: otherwise, beginning with `where`.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
    if row.get("conversations") is None and row.get("messages") is not None:
        row = {**row, "conversations": row["messages"]}
    if row.get("input_ids") is not None:
        _check_ids(row, where)
        row = {**row, "where": where}
    elif row.get("conversations") is not None:
        turns = checked_turns(row["conversations"], where)
        if not any(turn["role"] == "assistant" for turn in turns):
            raise DataError(f"{where}: expected at least one assistant turn, found none")
        row = {**row, "conversations": turns, "where": where}
        if row.get("tools") is not None:
            row["tools"] = _checked_tools(row["tools"], where)
        if row.get("system") is not None:
            row["conversations"] = _with_system(row["system"], row["conversations"], where)
        if not isinstance(row.get("chat_template_kwargs") or {}, dict):
            raise DataError(
                f"{where}: expected chat_template_kwargs as an object, found {shown(row['chat_template_kwargs'])}"
            )
    elif not isinstance(row.get("text"), str) or not row["text"].strip():
        keys = short(", ".join(map(str, row))) or "no keys"
        raise DataError(
            f"{where}: expected non-empty 'text', 'conversations' or 'input_ids' with 'loss_mask', found {keys}"
        )
    else:
        check_unicode(row["text"], where)
    return row


def check_unicode(text: str, where: str) -> None:
    """Refuses text that cannot be written as UTF-8.

    Raises:
        DataError: beginning with `where`.
    """
    try:
        encodable(where, text)
    except ValueError as error:
        raise DataError(str(error)) from None


def _check_ids(row: dict[str, Any], where: str) -> None:
    ids, mask = row["input_ids"], row.get("loss_mask")
    if not isinstance(ids, list) or not ids or not all(type(t) is int and 0 <= t < 2**31 for t in ids):
        raise DataError(f"{where}: expected input_ids as a list of token ids, found {shown(ids)}")
    if not isinstance(mask, list) or len(mask) != len(ids):
        found = len(mask) if isinstance(mask, list) else shown(mask)
        raise DataError(f"{where}: expected a loss_mask of {len(ids)} entries, found {found}")
    if not all(type(entry) in (int, bool) and entry in (0, 1) for entry in mask):
        raise DataError(f"{where}: expected a loss_mask of 0 and 1, found {shown(mask)}")
    if not any(mask):
        raise DataError(f"{where}: expected a loss_mask with at least one token to learn, found all 0")


def checked_turns(turns: Any, where: str) -> list[dict[str, Any]]:
    """Turns with role and content and whatever else they have; {from, value} of older datasets is understood.

    Keys without a value go, as tables have every key in every turn; a content that is null stays.

    Raises:
        DataError: for turns of another form, beginning with `where`.
    """
    roles = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
    checked = []
    for turn in turns if isinstance(turns, list) else [turns]:
        if not isinstance(turn, dict):
            raise DataError(f"{where}: expected turns with role and content, found {shown(turn)}")
        own = {key: value for key, value in turn.items() if value is not None or key == "content"}
        if "role" not in own and "from" in own:
            said = own.pop("value", own.pop("content", None))
            own = {"role": own.pop("from"), "content": said, **own}
        role = own.get("role")
        if not isinstance(role, str) or not _has_content(own):
            raise DataError(f"{where}: expected turns with role and content, found {shown(turn)}")
        unseen = [part["type"] for part in _parts(own) if part["type"] in _UNSEEN_PARTS]
        if unseen:
            raise DataError(f"{where}: expected turns of text, found a part of type {shown(unseen[0])}")
        check_unicode(json.dumps(own, ensure_ascii=False, default=str), where)
        checked.append({**own, "role": roles.get(role, role)})
    return checked


def _with_system(system: Any, turns: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Turns behind the system prompt that older datasets have beside them."""
    if not isinstance(system, str):
        raise DataError(f"{where}: expected system as text, found {shown(system)}")
    check_unicode(system, where)
    if not system.strip():
        return turns
    if turns[0]["role"] == "system":
        raise DataError(f"{where}: expected one system prompt, found one beside the conversation and one in it")
    return [{"role": "system", "content": system}, *turns]


def _has_content(turn: dict[str, Any]) -> bool:
    """Text, parts, or where there is neither something else, such as tool_calls."""
    if turn.get("content") is None:
        return any(bool(value) for key, value in turn.items() if key not in ("role", "name", "id"))
    return isinstance(turn["content"], str) or bool(_parts(turn))


def _parts(turn: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a content that is a list of them; empty for any other."""
    parts = turn.get("content")
    if not isinstance(parts, list):
        return []
    return parts if all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in parts) else []


def _checked_tools(tools: Any, where: str) -> list[dict[str, Any]]:
    """Tools that the assistant may call, as a list or, as tables have it, the JSON of one."""
    try:
        found = json.loads(tools) if isinstance(tools, str) else tools
    except (ValueError, RecursionError):
        found = tools
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise DataError(f"{where}: expected tools as a list of JSON objects, found {shown(tools)}")
    check_unicode(json.dumps(found, ensure_ascii=False, default=str), where)
    return found
