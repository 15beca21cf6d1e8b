"""Shows the rows of a study to people: a table on the console and in Markdown, JSON and a picture.

Knows the keys of the rows, nothing of how they were measured.
"""

from pathlib import Path
from typing import Any

from reporting.plots import plot_study
from reporting.result_files import write_files
from reporting.text_tables import TextTable, markdown_page, number, print_tables
from studies.study_rows import BEST, DONE, LEVEL

HEADER = (
    "", "variant", "what differs", "K", "minutes (CPU)", "steps", "mask rows/step", "sampled", "difference", "greedy",
    "greedy outside repetition", "difference", "sampled by position", "final loss",
)  # fmt: skip
TEXT_COLUMNS, FOLDED = ("", "variant", "what differs"), ("what differs", "sampled by position")
MARKS = {BEST: "best", LEVEL: "≈", None: ""}
NOTES = (
    "sampled, greedy: mean acceptance length 1 + accepted tokens / verified drafts, bonus token included, with its "
    "bootstrap 95 % interval over prompts; greedy figures of small models are flattered by loops, so the second of "
    "them counts only what lies outside exact repetition",
    "difference: to the first row on the same prompts, resampled together; this is the figure to decide by, and it is "
    "bold where its 95 % interval leaves out 0",
    "best: the largest sampled figure; ≈: not below the lower end of its interval",
    "minutes (CPU): wall clock of training with its start and its own measurements, attempts that were cut off "
    "included, and CPU time of all its threads; a variant whose steps are cheap may be given more of them in the file",
    "mask rows/step: drafted positions that an optimiser step trains on; sampled by position: share of drafts whose "
    "token 1, 2, .. was accepted; final loss: the last one logged, comparable within one objective only",
)


def cells_of(row: dict[str, Any], bold: str = "") -> list[str]:
    """A row as text, in the order of `HEADER`; `bold` stands around what is told apart from the first row."""
    name = ", ".join(part for part in (row["variant"], row["view"]) if part)
    over = "" if row["within_budget"] in (None, True) else ", over"
    spent = "-" if row["minutes"] is None else f"{row['minutes']:.1f} ({row['cpu_minutes']:.1f}{over})"
    steps = number(row["steps"], 0)
    if row["best_step"] != row["steps"]:
        steps += f" (best: {row['best_step']})"
    cells = [MARKS[row["mark"]], name, row["differs"] or "-"]
    trained = [spent, steps, number(row["mask_rows_per_step"], 0)]
    if row["status"] != DONE:
        return [*cells, "-", *trained, row["status"], *["-"] * 5, number(row["final_loss"], 3)]
    sampled, greedy = row["sampled"], row["greedy"]
    rates = sampled["acceptance_rate_per_position"]["unconditional"]
    return [
        *cells,
        str(row["num_speculative_tokens"]),
        *trained,
        _with_interval(sampled["mean_acceptance_length"], sampled["interval"]),
        _difference(row["difference"]["sampled"], bold),
        f"{greedy['mean_acceptance_length']:.3f}",
        _with_interval(greedy["outside_repetition"], greedy["outside_interval"]),
        _difference(row["difference"]["outside_repetition"], bold),
        " ".join(f"{rate:.2f}" for rate in rates),
        number(row["final_loss"], 3),
    ]


def _with_interval(value: float | None, interval: list[float] | None) -> str:
    if value is None or interval is None:
        return "-"
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _difference(found: dict[str, Any] | None, bold: str) -> str:
    if found is None:
        return "-"
    low, high = found["interval"]
    text = f"{found['value']:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"{bold}{text}{bold}" if low > 0 or high < 0 else text


def title_of(result: dict[str, Any]) -> str:
    """What the rows have in common."""
    asked = result["evaluation"]
    law = f"temperature {asked['temperature']}" + (f", top-k {asked['top_k']}" if asked["top_k"] else "")
    return (
        f"{result['study']}: {result['num_prompts']} prompts of {asked['data']} ({asked['split']}), "
        f"{asked['max_new_tokens']} new tokens, sampled at {law}, {result['device']}"
    )


def notes_of(result: dict[str, Any]) -> list[str]:
    """What the columns mean, the budget, and what failed."""
    limits = {"cpu_minutes": "CPU minutes", "minutes": "minutes"}
    budget = [f"{result['budget'][name]:g} {unit}" for name, unit in limits.items() if result["budget"][name]]
    notes = [*NOTES, *([f"budget of a variant's training: {' and '.join(budget)}"] if budget else [])]
    notes += [f"{path}: SHA-256 {digest}" for path, digest in result["data_sha256"].items()]
    failed = {row["variant"]: row["reason"] for row in result["rows"] if row["reason"]}
    return notes + [f"{name}: {reason}" for name, reason in failed.items()]


def table_of(result: dict[str, Any], bold: str = "") -> TextTable:
    """All rows; `bold` as in `cells_of`."""
    return TextTable(title_of(result), HEADER, [cells_of(row, bold) for row in result["rows"]])


def print_results(result: dict[str, Any]) -> None:
    """Table and notes on the console."""
    print_tables([table_of(result)], notes_of(result), TEXT_COLUMNS, FOLDED)


def markdown_of(result: dict[str, Any]) -> str:
    """The page of a result."""
    facts = f"{title_of(result)}; base {', '.join(result['base'])}"
    table = table_of(result, bold="**").markdown()
    return markdown_page(result, f"Study {result['study']}", facts, [table], notes_of(result))


def panels_of(result: dict[str, Any]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """By figure and row: lower end of the interval, value, upper end."""
    panels: dict[str, dict[str, tuple[float, float, float]]] = {"sampled": {}, "greedy outside repetition": {}}
    for row in result["rows"]:
        if row["status"] != DONE:
            continue
        name, (sampled, greedy) = cells_of(row)[1], (row["sampled"], row["greedy"])
        low, high = sampled["interval"]
        panels["sampled"][name] = (low, sampled["mean_acceptance_length"], high)
        if greedy["outside_interval"]:
            low, high = greedy["outside_interval"]
            panels["greedy outside repetition"][name] = (low, greedy["outside_repetition"], high)
    return panels


def write_results(result: dict[str, Any], stem: Path) -> None:
    """Writes `stem`.json, .md and .png."""
    baseline, title = cells_of(result["rows"][0])[1], title_of(result)
    write_files(result, stem, markdown_of(result), lambda path: plot_study(panels_of(result), baseline, title, path))
