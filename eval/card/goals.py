"""What was asked of the first run on a card, beside what the report's result files say. Measures nothing.

Knows the names of the report's files and the keys of their rows.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reporting.text_tables import TextTable

CONTEXT = 1024
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Goal:
    """One line of the table.

    Attributes:
        asked: in words.
        file: result that says what was measured.
        measured: from its content the value by what it is of; empty where it has none.
        is_met: by a value.
        is_of_any: one value that meets it is enough; else all must.
        shown: a value as text.
    """

    asked: str
    file: str
    measured: Callable[[dict[str, Any]], dict[str, float]]
    is_met: Callable[[float], bool]
    is_of_any: bool = False
    shown: Callable[[float], str] = "{:.2f} x".format

    def cells(self, folder: Path) -> list[str]:
        """asked, measured, met."""
        path = folder / self.file
        values = self.measured(json.loads(path.read_text())) if path.exists() else {}
        if not values:
            return [self.asked, NOT_MEASURED, "-"]
        met = (any if self.is_of_any else all)(map(self.is_met, values.values()))
        told = ", ".join(f"{self.shown(value)} ({of})" for of, value in values.items())
        return [self.asked, told, "yes" if met else "no"]


def goals_table(folder: Path) -> TextTable:
    """The table of all goals, from the files in the report's folder."""
    return TextTable("asked of a card", ("asked", "measured", "met"), [goal.cells(folder) for goal in GOALS])


def step_value(num_rows: int, key: str, *, lora: bool) -> Callable[[dict[str, Any]], dict[str, float]]:
    """A figure of captured steps of so many rows behind the context."""

    def measured(result: dict[str, Any]) -> dict[str, float]:
        wanted = {"rows": num_rows, "lora": lora, "context": CONTEXT, "compile": False, "head": False}
        rows = [row for row in result["rows"] if all(row[name] == value for name, value in wanted.items())]
        of = f"{result['model']}, {result['dtype']}, context {CONTEXT}"
        return {of: rows[0][key]} if rows and result["captured"] else {}

    return measured


def profiled(key: str) -> Callable[[dict[str, Any]], dict[str, float]]:
    """A count per step of every profile."""

    def measured(result: dict[str, Any]) -> dict[str, float]:
        return {f"{row['rows']} rows{', LoRA' * row['lora']}": row[key] for row in result["profiles"]}

    return measured


def tuned_speed(result: dict[str, Any]) -> dict[str, float]:
    """x plain at batch 1 of what tuning on other prompts chose for each adapter."""
    rows: Sequence[dict] = [row for row in result["rows"] if row["way"].endswith(" tuned") and row["batch_size"] == 1]
    return {f"{row['adapter']}, {row['way']}": row["ratio_to_plain"] for row in rows}


GOALS = (
    Goal(
        "captured plain step >= 80 % of the bandwidth bound",
        "latency.json",
        step_value(1, "share_of_bound", lora=False),
        lambda share: share >= 0.8,
        shown="{:.1%}".format,
    ),
    Goal(
        "25 rows <= 1.10 x plain",
        "latency.json",
        step_value(25, "ratio_to_plain", lora=False),
        lambda ratio: ratio <= 1.1,
        shown="{:.3f} x".format,
    ),
    Goal(
        "25 rows with LoRA <= 1.20 x plain",
        "latency.json",
        step_value(25, "ratio_to_plain", lora=True),
        lambda ratio: ratio <= 1.2,
        shown="{:.3f} x".format,
    ),
    Goal(
        "81 rows <= 1.35 x plain",
        "latency.json",
        step_value(81, "ratio_to_plain", lora=False),
        lambda ratio: ratio <= 1.35,
        shown="{:.3f} x".format,
    ),
    Goal(
        "one graph launch a step",
        "latency.json",
        profiled("graph_launches_per_step"),
        lambda count: count == 1,
        shown="{:g}".format,
    ),
    Goal(
        "one copy to the host a step",
        "latency.json",
        profiled("copies_to_host_per_step"),
        lambda count: count == 1,
        shown="{:g}".format,
    ),
    Goal(
        "SmolLM2, greedy, batch 1: an adapter >= 1.8 x captured plain",
        "smollm2-speed-greedy.json",
        tuned_speed,
        lambda ratio: ratio >= 1.8,
        is_of_any=True,
    ),
    Goal(
        "SmolLM2, sampled, batch 1: an adapter >= 1.5 x captured plain",
        "smollm2-speed-sampled.json",
        tuned_speed,
        lambda ratio: ratio >= 1.5,
        is_of_any=True,
    ),
)
