"""Pictures of results; each function takes plain numbers and writes one PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def plot_acceptance_by_position(rates: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Bars of the share of drafts whose token at each position was accepted, one colour per adapter.

    Args:
        rates: by adapter, the unconditional rate of each position.
        title: what was measured.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=130)
    width = 0.8 / len(rates)
    for index, (name, values) in enumerate(rates.items()):
        places = [position + (index - (len(rates) - 1) / 2) * width for position in range(1, len(values) + 1)]
        bars = axes.bar(places, values, width, label=name)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=7, padding=1)
    axes.set_xticks(range(1, max(map(len, rates.values())) + 1))
    axes.set_xlabel("position of the drafted token")
    axes.set_ylabel("share of drafts accepted up to here")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
