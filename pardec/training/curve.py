"""Draws a run's curves from its metrics.jsonl while it trains: loss, teacher-forced agreement, real acceptance.

Knows the file's keys and no model. matplotlib is optional; it is imported without pyplot, which keeps state.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pardec.run import written_aside

Points = list[tuple[int, Any]]


def redraw_curve(metrics_jsonl: Path, png: Path) -> bool:
    """`draw_curve` for a run that goes on without matplotlib, which is said once; whether a picture was drawn."""
    if not _can_draw():
        return False
    draw_curve(metrics_jsonl, png)
    return True


@cache
def _can_draw() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        tqdm.write(f"no picture of the curves: {error}; pip install 'pardec[plots]' brings it")
        return False
    return True


def draw_curve(metrics_jsonl: Path, png: Path) -> None:
    """Draws what has been logged so far; the picture is replaced as a whole.

    Args:
        metrics_jsonl: one object per line with `step`, whichever of the known keys it has; unreadable lines, as a
            killed run may leave one, are passed over.
        png: written aside, then renamed.

    Raises:
        ImportError: without matplotlib.
        OSError: if the file cannot be read or the picture not written.
    """
    from matplotlib.figure import Figure

    rows = read_metrics(metrics_jsonl)
    figure = Figure(figsize=(11, 7), dpi=110, layout="constrained")
    (loss, forced), (length, positions) = figure.subplots(2, 2)
    _draw_loss(loss, _points(rows, "loss"))
    _draw_forced(forced, rows)
    _draw_length(length, rows)
    _draw_by_position(positions, _points(rows, "acceptance/sampled_per_position"), "-")
    positions.set_title("real decoder, sampled: share of drafts accepted up to each position", fontsize=9)
    for axes, bottom in ((loss, None), (forced, 0), (length, 1), (positions, 0)):
        if axes.get_lines():
            axes.set_ylim(bottom=bottom)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=7)
    with written_aside(png) as aside:
        figure.savefig(aside, format="png")


def read_metrics(metrics_jsonl: Path) -> list[dict[str, Any]]:
    """The file's objects that have a step, in its order."""
    rows = []
    for line in metrics_jsonl.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _points(rows: Sequence[dict[str, Any]], key: str) -> Points:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _plot(axes, points: Points, style: str = "-", **options: Any) -> None:
    # a run that has been measured once still has something to show
    steps, values = [step for step, _ in points], [value for _, value in points]
    axes.plot(steps, values, style, marker="o" if len(points) < 25 else None, markersize=3, linewidth=1.2, **options)


def _draw_loss(axes, points: Points) -> None:
    if points:
        _plot(axes, points, color="#3b6fb6")
    # that of the expected accepted length falls below 0 where more than one draft is accepted
    if any(value > 0 for _, value in points) and all(value >= 0 for _, value in points):
        axes.set_yscale("log")
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter("{x:g}")
    axes.set_title("training loss per mask token", fontsize=9)


def _draw_forced(axes, rows: Sequence[dict[str, Any]]) -> None:
    _draw_by_position(axes, _points(rows, "overlap"), "-")
    _draw_by_position(axes, _points(rows, "argmax_agreement"), ":", labelled=False)
    _draw_by_position(axes, _points(rows, "head_overlap"), "--", labelled=False)
    shown = {
        "overlap": "overlap (line)",
        "argmax_agreement": "same argmax (dots)",
        "head_overlap": "overlap with head (dashes)",
    }
    there = ", ".join(label for key, label in shown.items() if _points(rows, key))
    axes.set_title(f"on training text: {there or 'nothing logged yet'}", fontsize=9)


def _draw_by_position(axes, points: Points, style: str, labelled: bool = True) -> None:
    """One line for each position, from blue to orange."""
    K = max((len(values) for _, values in points), default=0)
    for j in range(K):
        own = [(step, values[j]) for step, values in points if j < len(values)]
        share = j / max(K - 1, 1)
        colour = (0.1 + 0.85 * share, 0.3 + 0.3 * share, 0.7 - 0.5 * share)
        _plot(axes, own, style, color=colour, label=f"position {j + 1}" if labelled else None)


def _draw_length(axes, rows: Sequence[dict[str, Any]]) -> None:
    shown = {
        "acceptance/sampled": ("sampled", "-", "#d9742b"),
        "acceptance/sampled_without_head": ("sampled, without head", ":", "#d9742b"),
        "acceptance/greedy": ("greedy", "--", "#3b6fb6"),
        "acceptance/greedy_outside_repetition": ("greedy, outside repetition", ":", "#3b6fb6"),
    }
    for key, (label, style, colour) in shown.items():
        points = _points(rows, key)
        if points:
            _plot(axes, points, style, color=colour, label=label)
    floors = {"floor/length": "possible without a head", "floor/length_with_head": "possible with a head"}
    for shade, (key, label) in zip(("#777777", "#bbbbbb"), floors.items(), strict=True):
        for _, length in _points(rows, key)[-1:]:
            axes.axhline(length, color=shade, linestyle=":", linewidth=1, label=f"{label}, sampled")
    axes.set_title("real decoder: mean acceptance length, bonus token included", fontsize=9)
