"""Shows rows of speed figures to people: tables on the console and in Markdown, JSON and a picture.

Knows the keys of the rows, nothing of how they were measured. Every file is replaced as a whole.
"""

from pathlib import Path

from reporting.plots import plot_speed_ratios
from reporting.result_files import write_files
from reporting.text_tables import CONSOLE_WIDTH, TextTable, markdown_page, number, print_tables
from rich.console import Console
from rich.markup import escape

from pardec.draft_tree import DraftTree, DynamicTree

HEADER = (
    "batch", "way", "adapter", "K", "tokens/s", "mean acceptance length", "ms/step", "rows/step", "x plain",
    "x generate", "peak MiB", "identical",
)  # fmt: skip
TEXT_COLUMNS = ("way", "adapter", "identical")
NOTES = (
    "tokens/s: emitted tokens / seconds, sums over all counted calls; seconds are wall clock, prefill included",
    "x plain, x generate: ratio of tokens/s of two calls on the same prompts in the same pass, median (lower-upper "
    "quartile) over prompts and passes",
    "mean acceptance length: 1 + accepted tokens / verified drafts, bonus token and copied tokens included; 1 where "
    "nothing is drafted",
    "ms/step: seconds, prefill included, / rounds of the longest sequence; rows/step: rows of the base per sequence "
    "and round, in two_pass those of both forwards, with an assistant without its own",
    "peak MiB: the base's (and the assistant's) weights and what the way allocates besides; on a CPU it cannot be told",
    "identical: greedy tokens are those of model.generate for each prompt alone; a tie is a first difference where "
    "rounding decides between the two tokens, as in eval/exactness.py",
)


def tables_of(result: dict) -> list[TextTable]:
    """A table per setting, and one of categories where the prompts have several."""
    reasons = reasons_of(result)
    tables = []
    for setting in dict.fromkeys(row["setting"] for row in result["rows"]):
        cells = []
        for size in result["batch_sizes"]:
            here = [row for row in result["rows"] if (row["setting"], row["batch_size"]) == (setting, size)]
            cells += [cells_of(row) for row in here]
            for one in result["left_out"]:
                if (one["setting"], one["batch_size"]) == (setting, size):
                    name = f"{one['way']} [{reasons.index(one['reason']) + 1}]"
                    cells.append([str(size), name, one["adapter"] or "-", *["-"] * (len(HEADER) - 3)])
        tables.append(TextTable(title_of(setting, result), HEADER, cells, has_sections=True))
        by_category = [row for row in result["rows"] if row["setting"] == setting and _CATEGORIES in row]
        if by_category:
            categories = list(by_category[0][_CATEGORIES])
            cells = [[label_of(row), *(f"{row[_CATEGORIES][name]:.2f}" for name in categories)] for row in by_category]
            tables.append(TextTable(f"{setting}, batch 1: x plain by category", ["way", *categories], cells))
    return tables


_CATEGORIES = "ratio_to_plain_by_category"


def title_of(setting: str, result: dict) -> str:
    """What a table's rows have in common."""
    law = setting if setting == "greedy" else f"temperature {result['temperature']}, top-k {result['top_k']}"
    compiled = ", pardec compiled" if result["compile"] else ""
    return f"{law}, {result['max_new_tokens']} new tokens, {result['dtype']}{compiled}, {result['device']}"


def cells_of(row: dict) -> list[str]:
    """A row of figures as text, in the order of `HEADER`."""
    identical = "-"
    if "identical" in row:
        ties = row["num_ties"]
        identical = ("yes" + (f", {ties} tie{'s' * (ties > 1)}" if ties else "")) if row["identical"] else "NO"
    return [
        str(row["batch_size"]),
        row["way"],
        row["adapter"] or "-",
        number(row["num_speculative_tokens"], 0),
        number(row["tokens_per_second"], 1),
        number(row["mean_acceptance_length"], 2),
        number(row["ms_per_step"], 2),
        number(row["rows_per_step"], 1).removesuffix(".0"),
        _with_quartiles(row, "ratio_to_plain"),
        _with_quartiles(row, "ratio_to_generate"),
        number(row["peak_memory_mib"], 0),
        identical,
    ]


def _with_quartiles(row: dict, key: str) -> str:
    low, high = row[f"{key}_quartiles"]
    return f"{row[key]:.2f} ({low:.2f}-{high:.2f})"


def label_of(row: dict) -> str:
    """A way with its K and adapter."""
    drafted = "" if row["num_speculative_tokens"] is None else f" K={row['num_speculative_tokens']}"
    return f"{row['way']}{drafted}" + (f", {row['adapter']}" if row["adapter"] else "")


def reasons_of(result: dict) -> list[str]:
    """Why ways were left out, each once: footnotes 1, 2, ..."""
    return list(dict.fromkeys(one["reason"] for one in result["left_out"]))


def notes_of(result: dict) -> list[str]:
    """Footnotes, what the columns mean, and what was chosen for this run."""
    notes = [f"[{number}] left out: {reason}" for number, reason in enumerate(reasons_of(result), start=1)]
    notes += NOTES
    if result["stop_at_eos"]:
        notes.append("decoding ends at EOS, so sampled texts differ in length between ways")
    else:
        notes.append(f"EOS is ignored: every way decodes {result['max_new_tokens']} tokens behind each prompt")
    for row in {label_of(row): row for row in result["rows"] if row["block_lengths"] is not None}.values():
        blocks = ", ".join(map(str, row["block_lengths"]))
        notes.append(f"{label_of(row)}: mask tokens behind each real row {blocks}")
    for row in {label_of(row): row for row in result["rows"] if row.get("tree")}.values():
        is_drawn = "parents" not in row["tree"]
        tree = DynamicTree(**row["tree"]) if is_drawn else DraftTree(**row["tree"])
        kind = "dynamic tree" if is_drawn else "tree"
        copied = f"; of {row['rows_per_step']:.3g} rows, the others are copied tokens, with drafts behind each"
        beside = copied if "copies" in row["way"] else ""
        notes.append(f"{label_of(row)}: a {kind} of {tree.num_nodes} nodes, {tree.num_rows} rows where fused{beside}")
    for size in result["batch_sizes"]:
        if result["num_prompts"] % size:
            rest = result["num_prompts"] % size
            notes.append(f"batch {size}: {rest} of {result['num_prompts']} prompts fill no batch and are left out")
    return notes


def print_results(result: dict) -> None:
    """Tables and notes on the console; problems in red."""
    print_tables(tables_of(result), notes_of(result), TEXT_COLUMNS)
    console = Console(width=CONSOLE_WIDTH, highlight=False)
    for problem in result["problems"]:
        console.print(escape(f"not identical: {problem}"), style="bold red")


def markdown_of(result: dict) -> str:
    """The page of a result."""
    facts = (
        f"{result['num_prompts']} prompts of {result['prompts']}, base {result['base']}, counted passes: "
        f"{result['repetitions']}, after one that warms up; {result['device']}"
    )
    parts = [] if result.get("is_complete", True) else ["The run was cut off: these are the rows that it had.\n"]
    parts += [f"## {table.title}\n\n{table.markdown()}" for table in tables_of(result)]
    heading = f"Speed of {', '.join(result['adapters'].values())}"
    return markdown_page(result, heading, facts, parts, [*notes_of(result), *result["problems"]])


def panels_of(result: dict) -> dict[str, dict[str, dict[str, tuple[float, float, float]]]]:
    """By setting, way and batch size: lower quartile, median, upper quartile of the ratio to plain."""
    panels: dict[str, dict[str, dict[str, tuple[float, float, float]]]] = {}
    for row in result["rows"]:
        if row["way"] != "plain":
            low, high = row["ratio_to_plain_quartiles"]
            ways = panels.setdefault(row["setting"], {})
            ways.setdefault(label_of(row), {})[str(row["batch_size"])] = (low, row["ratio_to_plain"], high)
    return panels


def write_results(result: dict, stem: Path) -> None:
    """Writes `stem`.json, .md and .png."""
    title = f"speed over plain decoding, {result['device']}"
    write_files(result, stem, markdown_of(result), lambda path: plot_speed_ratios(panels_of(result), title, path))
