"""Shows milliseconds per step to people: tables on the console and in Markdown, JSON and a picture.

Knows the keys of the rows, nothing of how they were measured.
"""

from pathlib import Path

from reporting.plots import plot_step_latency
from reporting.result_files import write_files
from reporting.text_tables import TextTable, markdown_page, print_tables

HEADER = ("LoRA", "rows", "K", "ms/step", "x plain", "bound ms", "share of bound", "TFLOP/s")
FORCED_HEADER = ("tokens/step", "tokens/s", "tokens/s x plain")
# columns of counts, and their keys
PROFILE_COUNTS = {
    "graph launches": "graph_launches_per_step",
    "copies to host": "copies_to_host_per_step",
    "bytes to host": "bytes_to_host_per_step",
    "copies from host": "copies_to_device_per_step",
    "launches by the host": "kernel_launches_by_host_per_step",
    "kernels": "kernels_per_step",
}
PROFILE_HEADER = ("LoRA", "rows", *PROFILE_COUNTS, "kernel ms", "wall ms", "device busy")
NOTES = (
    "rows 1 is plain decoding, measured in turn with the rows below it; (K + 1)^2 rows are the full fused chain",
    "ms/step: median over blocks of steps of the loop that `generate` runs, host reads included; x plain: median over "
    "repetitions of the ratio to the plain steps of the same repetition (lower to upper quartile)",
    "bound ms: bytes of the weights (an input embedding table counts only where the head is tied to it), of the LoRA, "
    "and of the keys and values of the used context, each read once, over the copy bandwidth; share of bound: "
    "bound / ms. Above 100 % the weights lie in caches, or memory is read faster than it is copied",
    "TFLOP/s: two operations per weight and row, and attention; where this nears what the device can do, arithmetic "
    "and not memory is the bound",
)


def tables_of(result: dict) -> list[TextTable]:
    """A table for every context, compile setting, attention and use of a head; then the profiles."""
    has_forced = result["forced_acceptance"] is not None
    header = (*HEADER, *FORCED_HEADER) if has_forced else HEADER
    measured = [("", header, row, _cells(row, has_forced)) for row in result["rows"]]
    profiled = [("profile, per step: ", PROFILE_HEADER, row, _profile_cells(row)) for row in result["profiles"]]
    tables: dict[str, TextTable] = {}
    for kind, names, row, cells in measured + profiled:
        title = f"{kind}context {row['context']}, {_setting(row)}, {result['dtype']}, {result['device']}"
        table = tables.setdefault(title, TextTable(title, names, []))
        table.rows.append(cells)
    return list(tables.values())


def _setting(row: dict) -> str:
    head = ", drafts drawn by the head" if row["head"] else ""
    return f"{'compiled' if row['compile'] else 'not compiled'}, {row['attention']} attention{head}"


def _cells(row: dict, has_forced: bool) -> list[str]:
    low, high = row["ratio_to_plain_quartiles"]
    cells = [
        _lora(row),
        str(row["rows"]),
        str(row["num_speculative_tokens"]),
        f"{row['ms_per_step']:.3f}",
        f"{row['ratio_to_plain']:.3f} ({low:.3f} to {high:.3f})",
        f"{row['bound_ms']:.3f}",
        f"{row['share_of_bound']:.1%}",
        f"{row['tflops']:.3g}",
    ]
    if has_forced:
        cells += [f"{row['tokens_per_step']:.3f}", f"{row['tokens_per_second']:.1f}"]
        cells += [f"{row['tokens_per_second_to_plain']:.2f}"]
    return cells


def _profile_cells(row: dict) -> list[str]:
    return [
        _lora(row),
        str(row["rows"]),
        *(f"{row[key]:g}" for key in PROFILE_COUNTS.values()),
        f"{row['kernel_ms_per_step']:.3f}",
        f"{row['wall_ms_per_step']:.3f}",
        f"{row['busy_share']:.1%}",
    ]


def _lora(row: dict) -> str:
    if row["num_speculative_tokens"] == 0:
        return "-"  # plain decoding has no mask rows
    return f"r {row['lora_rank']}" if row["lora"] else "no"


def notes_of(result: dict) -> list[str]:
    """What the run was, what the columns mean, and what was left out."""
    notes = [
        f"{result['model']}: {result['num_parameters'] / 1e6:.1f} M parameters, "
        f"{'tied' if result['tied_embeddings'] else 'untied'} embeddings; read per step: weights "
        f"{result['weight_bytes_per_step'] / 2**20:.1f} MiB, LoRA {result['lora_bytes_per_step'] / 2**20:.1f} MiB, "
        f"{result['bytes_per_slot'] / 1024:.1f} KiB for each token of context",
        f"copy bandwidth, read + written: {result['bytes_per_second'] / 1e9:.1f} GB/s",
        *NOTES,
        f"batch 1, greedy, {result['repetitions']} blocks of {result['steps_per_block']} steps; a context is the "
        "prompt, and the bound counts the tokens that were committed on average while steps were timed",
    ]
    forced = result["forced_acceptance"]
    if forced is not None:
        notes.append(
            f"an oracle makes every step accept {forced} of its drafts, for which its rows must hold so many; its few "
            "small kernels are part of the steps"
        )
        off = [row for row in result["rows"] if row["num_speculative_tokens"] and row["tokens_per_step"] != forced + 1]
        if off:
            notes.append(
                f"in {len(off)} rows some steps accepted fewer: rounding chose another token than the oracle's"
            )
    if result["profiles"]:
        notes.append(
            "profiles: steps under torch.profiler, which makes them slower; device busy: share of the time from the "
            "first kernel to the end of the last in which any kernel or copy ran"
        )
    notes += [f"left out: {where}: {reason}" for reason, where in _by_text(result["left_out"], "reason").items()]
    warned = [row | {"warning": text} for row in result["rows"] for text in row["warnings"]]
    notes += [f"warning: {where}: {text}" for text, where in _by_text(warned, "warning").items()]
    return notes


def _by_text(places: list[dict], key: str) -> dict[str, str]:
    """By text, the rows and contexts that it is about."""
    found: dict[str, str] = {}
    for text in dict.fromkeys(one[key] for one in places):
        here = [one for one in places if one[key] == text]
        rows, contexts = (sorted({one[name] for one in here if name in one}) for name in ("rows", "context"))
        words = [f"rows {', '.join(map(str, rows))}" if rows else "all rows"]
        words.append(f"at context {', '.join(map(str, contexts))}")
        flags = (("with LoRA", "lora"), ("with head", "head"), ("compiled", "compile"))
        words += [name for name, flag in flags if all(p[flag] for p in here)]
        found[text] = " ".join(words)
    return found


def print_results(result: dict) -> None:
    """Tables and notes on the console."""
    print_tables(tables_of(result), notes_of(result), text_columns=("LoRA",))


def markdown_of(result: dict) -> str:
    """The page of a result."""
    parts = [] if result["is_complete"] else ["The run was cut off: these are the rows that it had.\n"]
    parts += [f"## {table.title}\n\n{table.markdown()}" for table in tables_of(result)]
    parts += [_top_kernels(row) for row in result["profiles"]]
    heading = f"Milliseconds per step of {result['model']}"
    return markdown_page(result, heading, result["device"], parts, notes_of(result))


def _top_kernels(row: dict) -> str:
    lora = " with LoRA" if row["lora"] and row["num_speculative_tokens"] else ""
    lines = [f"Kernels of a step of {row['rows']} rows{lora}, {_setting(row)}:\n"]
    lines += [
        f"- {one['ms_per_step']:.3f} ms in {one['calls_per_step']:g} calls: `{one['name'].replace('`', '')}`"
        for one in row["top_kernels"]
    ]
    return "\n".join(lines) + "\n"


def panels_of(result: dict) -> dict[str, dict[str, list[tuple[int, float, float]]]]:
    """By setting, context and LoRA: rows, milliseconds per step, and the bound."""
    panels: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
    for row in result["rows"]:
        label = f"context {row['context']}, {'LoRA' if row['lora'] else 'embeddings only'}"
        point = (row["rows"], row["ms_per_step"], row["bound_ms"])
        panels.setdefault(_setting(row), {}).setdefault(label, []).append(point)
    return panels


def write_results(result: dict, stem: Path) -> None:
    """Writes `stem`.json, .md and .png."""
    title = f"a step of {result['model']}, {result['device']}"
    write_files(result, stem, markdown_of(result), lambda path: plot_step_latency(panels_of(result), title, path))
