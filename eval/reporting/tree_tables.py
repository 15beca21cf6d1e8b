"""Shows what trees accept to people; knows the keys of the rows, nothing of how they come about."""

import re
from pathlib import Path
from typing import Any

from reporting.plots import plot_trees
from reporting.result_files import write_files
from reporting.text_tables import TextTable, markdown_page, number, print_tables

HEADER = (
    "shape", "rows", "nodes", "depth", "expected length", "measured", "95 % interval", "differ", "outside repetition",
    "gain over full chain", "95 % interval of it", "over the tree", "95 % interval of that", "ms a step", "x plain",
)  # fmt: skip
PAPER_HEADER = ("batch", "shape", "rows", "nodes", "launches", "predicted ms", "step, x plain's", "tokens/s, x plain's")
TEXT_COLUMNS = ("shape",)


def tables_of(result: dict[str, Any]) -> list[TextTable]:
    """A table for each way to choose tokens, and what is on paper."""
    tables = []
    for law in dict.fromkeys(row["law"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["law"] == law]
        tables.append(TextTable(f"{law}, {result['num_prompts']} prompts", HEADER, [_cells(row) for row in rows]))
    best = {
        batch: max((row for row in result["paper"] if row["batch_size"] == batch), key=lambda row: row["times_plain"])
        for batch in dict.fromkeys(row["batch_size"] for row in result["paper"])
    }
    cells = [
        [
            str(row["batch_size"]),
            row["kind"],
            str(row["rows"]),
            str(row["nodes"]),
            str(row["launches"]),
            number(row["predicted_ms"], 3),
            number(row["ratio_to_plain_step"], 3),
            number(row["times_plain"], 2) + (" *" if row is best[row["batch_size"]] else ""),
        ]
        for row in result["paper"]
    ]
    if cells:
        title = f"PREDICTED, not measured: {result['paper_device']}, {result['paper_shape']}, bfloat16"
        tables.append(TextTable(title, PAPER_HEADER, cells, has_sections=True))
    return tables


def _cells(row: dict[str, Any]) -> list[str]:
    low, high = row["interval"]
    gain_low, gain_high = row["gain_interval"]
    blocks = "" if row["block_lengths"] is None else f" {' '.join(map(str, row['block_lengths']))}"
    return [
        f"{row['kind']}{blocks}",
        str(row["rows"]),
        str(row["nodes"]),
        str(row["depth"]),
        number(row["expected"], 3),
        number(row["measured"], 3),
        f"{low:.3f} to {high:.3f}",
        "-" if row["measured"] is None else f"{100 * (row['measured'] / row['expected'] - 1):+.1f} %",
        number(row["outside_repetition"], 3),
        f"{100 * row['gain']:+.1f} %",
        f"{100 * gain_low:+.1f} to {100 * gain_high:+.1f} %",
        *_over_tree(row["over_tree"]),
        number(row["ms_per_step"], 2),
        number(row["times_plain"], 2),
    ]


def _over_tree(found: dict[str, Any] | None) -> tuple[str, str]:
    if found is None:
        return "", ""
    low, high = found["gain_interval"]
    return f"{100 * found['gain']:+.1f} %", f"{100 * low:+.1f} to {100 * high:+.1f} %"


def notes_of(result: dict[str, Any]) -> list[str]:
    """What the columns mean."""
    drafts = "drafts by the sampler head" if result["has_head"] else "drafts by mask rows alone"
    return [
        f"{result['adapter']}, K = {result['num_speculative_tokens']}, {drafts}; {result['max_new_tokens']} new "
        f"tokens, sampled at temperature {result['temperature']}, top-k {result['top_k']}; {result['dtype']}",
        "shapes are chosen on the validation split and reported on the test split; tree of N: the whole run behind "
        "each node; chain and tree: the best of up to so many rows; a dynamic tree is drawn anew in every step, one of "
        "N as deep as the tree of N",
        "lengths: accepted tokens a step and the bonus token, steps that verify nothing among them; expected: the "
        "ranks of the model's own tokens in its drafts, played again; of a sampled chain, whose drafts are drawn, that "
        "of the likeliest drafts",
        "measured -: of so many rows no texts were decoded; interval, gain and x plain are of what is expected",
        "gain: of accepted length outside repetition over the full chain's on the same prompts, which are resampled in "
        "pairs; over the tree: of a dynamic tree over that of ranks, of as many nodes, or of up to as many rows",
        "ms a step: batch 1, as trees of so many rows take here, between those that were timed on a line; x plain: "
        "measured length over the cost, plain steps 1",
        f"on paper: max(bytes / ({result['share_of_bandwidth']:g} x bandwidth), FLOP / ({result['share_of_flops']:g} x "
        f"peak)) + launches x {result['seconds_per_launch'] * 1e6:g} us; tokens/s by the lengths above; * the best",
    ]


def print_results(result: dict[str, Any]) -> None:
    """Tables and notes on the console."""
    print_tables(tables_of(result), notes_of(result), TEXT_COLUMNS)


def write_results(result: dict[str, Any], stem: Path) -> None:
    """JSON, Markdown and the picture."""
    parts = [f"## {table.title}\n\n{table.markdown()}" for table in tables_of(result)]
    facts = f"{result['device']}, {result['dtype']}"
    page = markdown_page(result, "Chains and trees by rows of a step", facts, parts, notes_of(result))
    title = f"{result['adapter']}, K = {result['num_speculative_tokens']}, {result['num_prompts']} prompts"
    write_files(result, stem, page, lambda path: plot_trees(panels_of(result), title, path))


def panels_of(result: dict[str, Any]) -> dict[str, dict[str, list[tuple[int, float, float]]]]:
    """Lines of the picture."""
    panels: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
    for row in sorted(result["rows"], key=lambda row: row["rows"]):
        kind = re.sub(r" of \d+$", ", whole runs", row["kind"])
        line = {"full chain": "chain"}.get(kind, kind)
        lines = panels.setdefault(row["law"], {})
        lines.setdefault(line, []).append((row["rows"], row["measured"] or row["expected"], row["expected"]))
    return panels
