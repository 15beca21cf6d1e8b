"""How things that are wrong are told in one line: errors of other libraries, values of any kind.

Knows nothing of what the values are for.
"""

import re
import reprlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_WIDTH = 60  # characters of a value


def told(error: BaseException) -> str:
    """All of an error's message in one line; what the system says of a file, in words as of this project."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: expected a file or folder that can be used, found {error.strerror}"
    return " ".join((str(error) or type(error).__name__).split())


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shown(value: object) -> str:
    """A value as code would write it, in one line and shortened to 60 characters; never raises."""
    try:
        return short(_SHORT.repr(value))
    except Exception:  # a `__repr__` of somebody else's, an integer of thousands of digits, nesting without end
        return f"some {type(value).__name__}"


def short(text: str, width: int = _WIDTH + 2) -> str:
    """A text in one line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."


def encodable(name: str, text: str) -> str:
    """A text that can be written as UTF-8.

    Raises:
        ValueError: beginning with `name`.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: expected Unicode text, found half of a surrogate pair") from None
    return text


def problem(details: "ErrorDetails", key: str | None = None) -> str:
    """What pydantic found wrong with one value: its key, what was expected and what was found.

    Args:
        details: one of `ValidationError.errors()`.
        key: of the value; default the dotted path that pydantic gives.
    """
    key = ".".join(map(str, details["loc"])) if key is None else key
    key, kind, message = shown(key)[1:-1], details["type"], details["msg"]
    if kind == "missing":
        return f"expected key {key!r}, found none"
    if kind == "value_error" and "ctx" in details:
        return str(details["ctx"]["error"])
    found = shown(details["input"])
    if kind == "extra_forbidden":
        return f"{key}: expected no such key, found {found}"
    expected = re.fullmatch(r".*? should (?:be|have|match) (.*)", message)
    if expected is None:
        return f"{key}: expected a value of another kind, found {found}: {message[:80]}"
    bound = "a number " if kind.startswith(("greater_than", "less_than")) else ""
    return f"{key}: expected {bound}{expected[1]}, found {found}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _WIDTH
