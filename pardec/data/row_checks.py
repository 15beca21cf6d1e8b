"""What a row of data must be: judged one by one, and what is wrong with one said in a line that begins with its place.

A row has `text`, `conversations`, or `input_ids` with a `loss_mask`. Knows no files.
"""

import json
from typing import Any

from pardec.errors import encodable, short, shown

# parts of a turn that a model of text alone cannot be shown
_UNSEEN_PARTS = ("image", "image_url", "audio", "input_audio", "video", "video_url")


class DataError(ValueError):
    """Data that cannot be used; the message names where, what was expected and what was found."""


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
        found = short(", ".join(map(str, row))) or "no keys"
        if row.get("text") is not None:
            found = f"text {shown(row['text'])}"
        raise DataError(
            f"{where}: expected non-empty 'text', 'conversations' or 'input_ids' with 'loss_mask', found {found}"
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
