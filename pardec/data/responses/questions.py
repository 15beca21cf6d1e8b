"""Questions of a JSONL file as the turns of a chat.

Knows neither chat templates nor tokenizers.
"""

from pathlib import Path
from typing import Any

from pardec.data.reading import hold_out, json_lines
from pardec.data.row_checks import DataError, check_unicode, checked_turns
from pardec.errors import short, shown

# where a question may stand, in this order; the last two hold turns
_KEYS = ("prompt", "question", "instruction", "text", "messages", "conversations")


def training_questions(path: str, key: str | None = None) -> list[list[dict[str, Any]]]:
    """Turns up to the last of the user's, of every row but the one in twenty that `hold_out` keeps.

    Args:
        path: JSONL file of objects.
        key: of the question, a text or turns with role and content; default the first of `prompt`, `question`,
            `instruction`, `text`, `messages` and `conversations` that the row has.

    Raises:
        DataError: if there is no file, or a row has no question, naming the line.
    """
    rows = [{"turns": _turns(row, key, where)} for where, row in json_lines(Path(path))]
    if not rows:
        raise DataError(f"{path}: expected at least one question, found none")
    return [row["turns"] for row in (hold_out(rows)[0] if len(rows) > 1 else rows)]


def _turns(row: Any, key: str | None, where: str) -> list[dict[str, Any]]:
    """Of one row."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
    found = next((name for name in ((key,) if key else _KEYS) if row.get(name) is not None), None)
    if found is None:
        keys = short(", ".join(map(str, row))) or "no keys"
        raise DataError(f"{where}: expected a question under {' or '.join((key,) if key else _KEYS)}, found {keys}")
    question = row[found]
    if isinstance(question, str):
        check_unicode(question, where)
        question = [{"role": "user", "content": question.strip()}]
    turns = checked_turns(question, where) if isinstance(question, list) else []
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    if not turns or not turns[-1].get("content"):
        raise DataError(f"{where}: expected {found} as text or turns with one of the user's, found {shown(row[found])}")
    return turns
