"""What every door says of itself: an engine, its form of an adapter, and how the engine is asked for it.

Knows no engine.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pardec.adapters.adapter import Adapter
from pardec.exports.base_folder import LoadedBase
from pardec.exports.record import DoorName, ExportRecord
from pardec.target.base import BUILT_IN_BASES
from pardec.target.converted import lone_gguf


@dataclass(frozen=True)
class Door:
    """A form of an adapter.

    Attributes:
        name: of the door.
        engine: distribution that serves the form.
        tested: version of it whose own code the rules are from.
        refusal: what of an adapter the form cannot hold, as `expected .., found ..`; None if it holds it.
        write: the engine's files into a folder; the base is None unless asked for or needed.
        problems: what is wrong with written files, each in one line.
        commands: that serve a folder, by its path; the base by its name.
        language: of the commands.
        notes: a paragraph for the folder's page.
        counted: what the engine counts as acceptance length; None where nothing is drafted.
        exact_tokens: of a round, that it counts beside accepted drafts and the bonus token.
        needs_base: whether the base is read to make the form.
        holds_base: whether the base's weights are in the form.
        words_not_in_path: by which the engine takes the folder for something else.
    """

    name: DoorName
    engine: str
    tested: str
    refusal: Callable[[Adapter], str | None]
    write: Callable[[Adapter, LoadedBase | None, Path], None]
    problems: Callable[[Path, ExportRecord], list[str]]
    commands: Callable[[ExportRecord, str], str]
    language: Literal["bash", "python"]
    notes: Callable[[ExportRecord, Path], str]
    counted: str | None
    exact_tokens: int = 0
    needs_base: bool = False
    holds_base: bool = False
    words_not_in_path: tuple[str, ...] = ()

    def path_problem(self, folder: Path) -> str | None:
        """Why the engine would misread a folder of this path; None if it would not."""
        path = str(folder.absolute())
        found = [word for word in self.words_not_in_path if word in path.lower()]
        if not found:
            return None
        words = ", ".join(self.words_not_in_path)
        return f"output: expected a path without {words}, which {self.engine} takes for other methods, found {path}"


def base_in_shell(name: str) -> tuple[str, str]:
    """A base as a word of a shell command, and what stands before that command; nothing is served if that fails."""
    if not _is_converted(name):
        return shlex.quote(name), ""
    program = f"from pardec.target.base import resolve_base; print(resolve_base({python_text(name)}))"
    return '"$BASE"', f"BASE=$(python -c {shlex.quote(program)}) && \\\n"


def base_in_python(name: str) -> tuple[str, str]:
    """A base as a Python expression, and the line that it needs before it."""
    if not _is_converted(name):
        return python_text(name), ""
    return f"resolve_base({python_text(name)})", "from pardec.target.base import resolve_base\n"


def python_text(text: str) -> str:
    """A text as Python writes it, in double quotes."""
    return json.dumps(text, ensure_ascii=False)  # JSON's escapes of what is beyond 16 bits are not Python's


def _is_converted(name: str) -> bool:
    """Whether engines take not what is so named but the folder that pardec has for it."""
    return name in BUILT_IN_BASES or name.endswith(".gguf") or lone_gguf(Path(name)) is not None
