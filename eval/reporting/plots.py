"""Pictures of results: each function takes plain numbers, a title that says what was measured, and the PNG's path."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_acceptance_by_position(rates: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Bars of the share of drafts whose token at each position was accepted, one colour per adapter.

    Args:
        rates: by adapter, the unconditional rate of each position.
    """
    figure, (axes,) = _figure((7, 4), 1, layout="tight")
    width = 0.8 / len(rates)
    for index, (name, values) in enumerate(rates.items()):
        places = [position + (index - (len(rates) - 1) / 2) * width for position in range(1, len(values) + 1)]
        bars = axes.bar(places, values, width, label=name)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=7, padding=1)
    axes.set_xticks(range(1, max(map(len, rates.values())) + 1))
    axes.set_xlabel("position of the drafted token")
    axes.set_ylabel("share of drafts accepted up to here")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_fused_step(num_speculative_tokens: int, path: Path) -> None:
    """Who sees whom in a fused step, drawn from the layout that the decoder uses.

    Args:
        num_speculative_tokens: K.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    from pardec.layout import chain_layout, full_blocks

    K = num_speculative_tokens
    layout = chain_layout(full_blocks(K))
    real = ["bonus", *(f"d{k}" for k in range(1, K + 1))]
    masks = [f"m{j}" for _ in range(K + 1) for j in range(1, K + 1)]
    kinds = np.array([1] * len(real) + [2 + i // K for i in range(len(masks))])
    seen = np.where(layout.visible.numpy(), kinds[None, :], 0)
    context = np.full((layout.num_rows, 1), K + 3)
    colours = ["white", "#3b6fb6", *colormaps["Oranges"](np.linspace(0.45, 0.8, K + 1)), "#c9d7ea"]
    figure, (axes,) = _figure((7.2, 5.6), 1, layout="tight")
    axes.spines[:].set_visible(True)
    picture = np.concatenate([context, seen], axis=1)
    axes.imshow(picture, cmap=ListedColormap(colours), vmin=0, vmax=K + 3, aspect="auto")
    places = zip(real + masks, layout.offsets.tolist(), strict=True)
    rows = [f"{name}   at s+{offset}, predicts s+{offset + 1}" for name, offset in places]
    axes.set_yticks(range(layout.num_rows), rows, fontsize=8, family="monospace")
    axes.set_xticks(range(layout.num_rows + 1), ["context", *real, *masks], fontsize=8, rotation=60)
    axes.xaxis.tick_top()
    for edge in [K + 0.5, *(K + 0.5 + K * i for i in range(1, K + 1))]:
        axes.axhline(edge, color="#888888", linewidth=0.8)
        axes.axvline(edge + 1, color="#888888", linewidth=0.8)
    notes = {K / 2: "real rows:\nverify the drafts"}
    notes |= {K + 0.5 + K * (i + 0.5): f"block {i}:\nnext drafts if\n{i} accepted" for i in range(K + 1)}
    for height, text in notes.items():
        axes.text(layout.num_rows + 0.7, height, text, fontsize=7.5, va="center")
    axes.set_title(f"a fused step, K = {K}: rows (left) and what each sees (top)", fontsize=10, pad=12)
    _save(figure, path)


def plot_speed_ratios(
    panels: Mapping[str, Mapping[str, Mapping[str, tuple[float, float, float]]]], title: str, path: Path
) -> None:
    """Bars of the speed of each way of decoding over plain decoding, one panel per setting, one colour per batch size.

    Args:
        panels: by setting, way and batch size: lower quartile, median and upper quartile of the ratio.
    """
    num_ways = max(map(len, panels.values()))
    size = (6 * len(panels) + 1, 0.5 * num_ways + 2)
    figure, grid = _figure(size, len(panels))
    for axes, (setting, ways) in zip(grid, panels.items(), strict=True):
        batches = list(dict.fromkeys(batch for found in ways.values() for batch in found))
        height = 0.8 / len(batches)
        for place, batch in enumerate(batches):
            heights, found = [], []
            for index, way in enumerate(ways.values()):
                if batch in way:
                    heights.append(index + (place - (len(batches) - 1) / 2) * height)
                    found.append(way[batch])
            medians = [median for _, median, _ in found]
            spread = [[m - low for low, m, _ in found], [high - m for _, m, high in found]]
            axes.barh(heights, medians, height, xerr=spread, label=f"batch {batch}", error_kw={"linewidth": 0.8})
            for y, (_, median, high) in zip(heights, found, strict=True):
                axes.text(high, y, f" {median:.2f}", fontsize=6, va="center")
        axes.axvline(1, color="#888888", linewidth=0.8)
        axes.set_yticks(range(len(ways)), list(ways), fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("speed / plain: median, quartiles as lines")
        axes.set_title(setting, fontsize=10)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def plot_step_latency(
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, float, float]]]], title: str, path: Path
) -> None:
    """Milliseconds per step against rows, one panel per setting, the bound dashed in the colour of its line.

    Args:
        panels: by setting and label of the line: rows, milliseconds, and milliseconds of the bound.
    """
    size = (6 * len(panels) + 1, 4.5)
    figure, grid = _figure(size, len(panels), sharey=True)
    for axes, (setting, lines) in zip(grid, panels.items(), strict=True):
        for label, points in lines.items():
            rows, ms, bound = zip(*points, strict=True)
            (line,) = axes.plot(rows, ms, "o-", markersize=3, linewidth=1.2, label=label)
            axes.plot(rows, bound, "--", linewidth=0.8, color=line.get_color())
        axes.set_ylim(bottom=0)
        axes.set_xlabel("rows of a step; 1 is plain decoding")
        axes.set_title(setting, fontsize=10)
        axes.legend(frameon=False, fontsize=7)
    grid[0].set_ylabel("ms per step; dashed: bytes / bandwidth")
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def plot_trees(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float, float]]]], title: str, path: Path) -> None:
    """Mean acceptance length against rows of a step, one panel per way to choose tokens; dashed what was expected.

    Args:
        panels: by panel and line: rows, the measured length and the expected one.
    """
    figure, grid = _figure((5.5 * len(panels) + 1, 4.2), len(panels))
    for axes, (name, lines) in zip(grid, panels.items(), strict=True):
        for label, points in lines.items():
            rows, measured, expected = zip(*points, strict=True)
            (line,) = axes.plot(rows, measured, "o-", markersize=3, linewidth=1.2, label=label)
            axes.plot(rows, expected, "--", linewidth=0.8, color=line.get_color())
        axes.set_xscale("log", base=2)
        axes.set_xlabel("rows of a step")
        axes.set_title(name, fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    grid[0].set_ylabel("mean acceptance length; dashed: expected")
    figure.suptitle(title, fontsize=9)
    _save(figure, path)


def plot_study(
    panels: Mapping[str, Mapping[str, tuple[float, float, float]]], baseline: str, title: str, path: Path
) -> None:
    """Mean acceptance length of each row of a study as a point with its interval, one panel per figure.

    Args:
        panels: by figure and row: lower end of the interval, value, upper end.
        baseline: the row that a vertical line marks, where it is among them.
    """
    names = list(dict.fromkeys(name for rows in panels.values() for name in rows))
    size = (5 * len(panels) + 2, 0.32 * len(names) + 1.6)
    figure, grid = _figure(size, len(panels), sharey=True)
    for axes, (figure_name, rows) in zip(grid, panels.items(), strict=True):
        for name, (low, value, high) in rows.items():
            place = names.index(name)
            axes.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", markersize=4, color="#3b6fb6")
            axes.text(value, place - 0.15, f"{value:.3f}", fontsize=6, ha="center", va="bottom")
        if baseline in rows:
            axes.axvline(rows[baseline][1], color="#888888", linewidth=0.8)
        axes.set_title(figure_name, fontsize=10)
        axes.set_xlabel("mean acceptance length, 95 % interval over prompts")
    grid[0].set_yticks(range(len(names)), names, fontsize=8)
    grid[0].set_ylim(len(names) - 0.5, -0.7)
    figure.suptitle(title, fontsize=9)
    _save(figure, path)


def plot_floor(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Overlap by depth, one panel per adapter: what is possible, from a band that holds it, and what is reached.

    Args:
        rows: of `eval/floor.py`.
    """
    figure, grid = _figure((4.6 * len(rows) + 1, 4), len(rows), sharey=True)
    for axes, row in zip(grid, rows, strict=True):
        depths = range(1, len(row["blind"]["mean"]) + 1)
        for name, colour, label in (
            ("blind", "#888888", "no token between"),
            ("behind_one", "#d9742b", "the token before"),
        ):
            most, shown = row[name]["mean"], row[f"{name}_shown"]["mean"]
            axes.fill_between(depths, shown, most, color=colour, alpha=0.35, linewidth=0)
            axes.plot(depths, most, ":", color=colour, label=f"possible, seeing {label}")
        for name, style, label in (("drafted", "-", "reached by mask rows"), ("with_head", "--", "with the head")):
            if name in row:
                low, high = zip(*row[name]["interval"], strict=True)
                means = row[name]["mean"]
                bars = [
                    [m - a for m, a in zip(means, low, strict=True)],
                    [b - m for m, b in zip(means, high, strict=True)],
                ]
                axes.errorbar(depths, means, yerr=bars, fmt=f"o{style}", markersize=4, color="#3b6fb6", label=label)
        axes.set_xticks(depths)
        axes.set_xlabel("depth of the drafted token")
        axes.set_title(row["adapter"], fontsize=10)
        axes.set_ylim(0, 1.03)
    grid[0].set_ylabel("overlap of target and draft")
    # of the panel that has most of them
    handles = max((axes.get_legend_handles_labels() for axes in grid), key=lambda found: len(found[0]))
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    _save(figure, path)


def plot_training_cost(panels: Mapping[str, Mapping[str, Mapping[str, float]]], title: str, path: Path) -> None:
    """Bars of what a way costs at each length of sequences, one panel per kind of cost, on a logarithmic scale.

    Args:
        panels: by cost, way and length.
    """
    figure, grid = _figure((6 * len(panels) + 1, 4.5), len(panels))
    for axes, (cost, ways) in zip(grid, panels.items(), strict=True):
        lengths = list(dict.fromkeys(length for found in ways.values() for length in found))
        width = 0.8 / len(ways)
        for place, (way, found) in enumerate(ways.items()):
            xs = [lengths.index(length) + (place - (len(ways) - 1) / 2) * width for length in found]
            bars = axes.bar(xs, list(found.values()), width, label=way)
            axes.bar_label(bars, fmt="%.0f", fontsize=6, padding=1)
        axes.set_xticks(range(len(lengths)), lengths, fontsize=8)
        axes.set_yscale("log")
        axes.set_title(cost, fontsize=10)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    _save(figure, path)


def _figure(
    size: tuple[float, float], num_panels: int, *, sharey: bool = False, layout: str = "constrained"
) -> tuple[Any, Sequence[Any]]:
    """A figure of a size in inches, and the axes of its panels, side by side and open above and on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(1, num_panels, figsize=size, dpi=130, squeeze=False, sharey=sharey, layout=layout)
    for axes in grid[0]:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid[0]


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
