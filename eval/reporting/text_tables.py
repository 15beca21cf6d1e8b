"""Tables of text, on the console and as a page of Markdown; knows nothing of the figures in them."""

import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

CONSOLE_WIDTH = 230  # a table that is folded cannot be read
HEADER_WIDTH = 17


@dataclass(frozen=True)
class TextTable:
    """A table of text.

    Attributes:
        title: what its rows have in common.
        header: names of the columns.
        rows: their cells.
        has_sections: rows whose first cells are equal stand together on the console.
    """

    title: str
    header: Sequence[str]
    rows: list[list[str]]
    has_sections: bool = False

    def markdown(self) -> str:
        """The table without its title."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines) + "\n"


def number(value: float | None, digits: int) -> str:
    """The value with so many decimals, a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"


def print_tables(
    tables: Sequence[TextTable], notes: Sequence[str], text_columns: Collection[str], folded: Collection[str] = ()
) -> None:
    """Tables, then notes, on the console.

    Args:
        tables: in this order.
        notes: a line each.
        text_columns: names of columns that stand on the left, as numbers do not.
        folded: names of columns whose cells may be broken into lines.
    """
    console = Console(width=CONSOLE_WIDTH, highlight=False)
    for table in tables:
        printed = Table(title=escape(table.title), title_justify="left")
        for name in table.header:
            header = escape("\n".join(textwrap.wrap(name, HEADER_WIDTH)))
            printed.add_column(header, justify="left" if name in text_columns else "right", no_wrap=name not in folded)
        for row, following in zip_longest(table.rows, table.rows[1:], fillvalue=("",)):
            printed.add_row(*map(escape, row), end_section=table.has_sections and following[0] != row[0])
        console.print(printed)
    for note in notes:
        console.print(escape(note), style="dim")


def listed(versions: Mapping[str, str]) -> str:
    """Versions by name, as text."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def markdown_page(
    result: Mapping[str, Any], heading: str, facts: str, parts: Sequence[str], notes: Sequence[str]
) -> str:
    """The page of a result: heading, command, facts with versions, its parts, and the notes as a list."""
    top = [f"# {heading}\n\n`python eval/{result['command']}`\n", f"{facts}; {listed(result['versions'])}\n"]
    return "\n".join([*top, *parts, "\n".join(f"- {note}" for note in notes) + "\n"])
