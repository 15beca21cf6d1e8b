"""JSON of an adapter's folder, of which nothing is taken on trust.

Knows JSON, not what it says.
"""

import json
from pathlib import Path
from typing import Any

from pardec.errors import first_line, shown


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: naming the file, if it is there and holds anything else.
        OSError: if it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path}: expected JSON, found some that is nested too deep") from None
    except ValueError as error:  # integers of thousands of digits too
        raise ValueError(f"{path}: expected JSON, found {first_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {shown(content)}")
    return content
