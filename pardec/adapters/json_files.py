"""JSON of an adapter's folder, of which nothing is taken on trust, nor the names of files in it.

Knows JSON, not what it says.
"""

import json
from pathlib import Path
from typing import Any

from pardec.errors import first_line, shown

_MOST_BYTES = 2**26  # of which no file here has a hundredth; what is read is in memory several times over


def is_inside(name: str) -> bool:
    """Whether a name, which is shown when something is wrong with its file, is one of a file in the folder."""
    path = Path(name)
    return len(name) < 256 and name.isprintable() and not path.is_absolute() and ".." not in path.parts


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: naming the file, if it is there and holds anything else.
        OSError: if it cannot be read.
    """
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(f"{path}: expected JSON of at most {_MOST_BYTES:,} bytes, found {size:,}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path}: expected JSON, found some that is nested too deep") from None
    except ValueError as error:  # integers of thousands of digits too
        raise ValueError(f"{path}: expected JSON, found {first_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {shown(content)}")
    return content
