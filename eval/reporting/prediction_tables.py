"""Shows predicted milliseconds per step to people, beside measured ones where there are any.

Knows the keys of the rows, and of the result files of `latency.py`; nothing of how a prediction comes about.
"""

import json
from pathlib import Path
from typing import Any

from reporting.text_tables import TextTable, number, print_tables

HEADER = ("LoRA", "rows", "K", "launches", "GB", "GFLOP", "busy with", "bound ms", "predicted ms", "x plain")
MEASURED_HEADER = ("measured ms", "x plain, measured", "measured / predicted")


def matching_result(model: str, dtype: str, device: str, folder: Path) -> dict[str, Any] | None:
    """The result of `latency.py` that was measured on this device with this shape and dtype; None without one.

    One that compares ways to attend does not count: its names are those of the time when the way was chosen. Nor does
    one of compiled steps alone, as predicted steps are not compiled.

    Args:
        model: name of the shape.
        dtype: of its weights.
        device: as torch calls it.
        folder: where results are kept.
    """
    for path in sorted(folder.glob("latency_*.json")):
        result = read_result(path)
        compares = len({row.get("attention") for row in result["rows"]}) > 1
        is_compiled = all(row.get("compile") for row in result["rows"])
        is_same = (result["model"], result["dtype"], result["device"]) == (model, dtype, device)
        if is_same and not compares and not is_compiled:
            return result
    return None


def read_result(path: Path) -> dict[str, Any]:
    """A result file of `latency.py`.

    Raises:
        ValueError: if it is another file.
    """
    try:
        result = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError):
        result = None
    keys = {"model", "dtype", "device", "rows", "weight_bytes_per_step"}
    if not isinstance(result, dict) or not keys <= set(result):
        raise ValueError(f"measured: expected a JSON file written by latency.py, found another in {path}")
    return result


def beside_measured(rows: list[dict[str, Any]], measured: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The rows with `measured_ms` and `measured_ratio_to_plain`, None where nothing of the kind was measured.

    Of a step that was measured in several ways the engine's own counts: not compiled, grouped attention, no head. A
    measured context is that of the prompt: its steps saw what was decoded meanwhile as well.
    """
    own = {"compile": False, "attention": "grouped", "head": False}
    found = {}
    for row in [] if measured is None else measured["rows"]:
        if all(row.get(key, value) == value for key, value in own.items()):
            # plain steps stand in the turns with a LoRA as well
            rank = row["lora_rank"] if row["lora"] and row["num_speculative_tokens"] else None
            found.setdefault((row["context"], row["rows"], rank), row)
    beside = [found.get((row["context"], row["rows"], row["lora_rank"]), {}) for row in rows]
    return [
        row | {"measured_ms": one.get("ms_per_step"), "measured_ratio_to_plain": one.get("ratio_to_plain")}
        for row, one in zip(rows, beside, strict=True)
    ]


def tables_of(result: dict[str, Any]) -> list[TextTable]:
    """A table for every device and context."""
    tables = []
    for device in result["devices"]:
        measured_on = device["measured_on"]
        header = HEADER if measured_on is None else (*HEADER, *MEASURED_HEADER)
        for context in dict.fromkeys(row["context"] for row in device["rows"]):
            beside = "" if measured_on is None else f"; measured on {measured_on}"
            title = f"PREDICTED, not measured: {device['name']}, context {context}, {result['dtype']}{beside}"
            rows = [row for row in device["rows"] if row["context"] == context]
            tables.append(TextTable(title, header, [_cells(row, len(header)) for row in rows]))
    return tables


def _cells(row: dict[str, Any], num_columns: int) -> list[str]:
    K, measured = row["num_speculative_tokens"], row["measured_ms"]
    lora = f"r {row['lora_rank']}" if row["lora"] else "no"
    cells = [
        lora if K else "-",
        str(row["rows"]),
        str(K),
        str(row["launches"]),
        f"{row['bytes'] / 1e9:.2f}",
        f"{row['flops'] / 1e9:,.0f}",
        row["busy_with"],
        number(row["bound_ms"], 2),
        number(row["predicted_ms"], 2),
        number(row["ratio_to_plain"], 3),
        number(measured, 2),
        number(row["measured_ratio_to_plain"], 3),
        number(None if measured is None else measured / row["predicted_ms"], 2),
    ]
    return cells[:num_columns]


def notes_of(result: dict[str, Any]) -> list[str]:
    """What the figures are, and what they leave out."""
    return [
        f"{result['model']}, batch 1, greedy: nothing was run on a device. The step was run on tensors without numbers "
        "and its operations counted; peaks are those that makers publish",
        f"predicted ms = max(bytes / ({result['share_of_bandwidth']:g} x bandwidth), FLOP / "
        f"({result['share_of_flops']:g} x peak)) + launches x {result['seconds_per_launch'] * 1e6:g} us, of a step in "
        "a captured graph; busy with: which of the two is larger",
        "GB: all that the operations read and write: weights, keys and values of the slots attended to (a bucket of "
        "more than the context), the LoRA, logits, masks, and what every layer hands on for each row, as if no cache "
        "held it",
        "bound ms: weights, LoRA, keys and values of the context, each read once, over the published bandwidth; "
        "x plain: over the predicted plain step",
        "left out: caches, which make steps faster; kernels of too few blocks to fill the device, as attention of one "
        "sequence is, which make them slower",
    ]


def print_prediction(result: dict[str, Any]) -> None:
    """Tables and notes on the console."""
    print_tables(tables_of(result), notes_of(result), text_columns=("LoRA", "busy with"))
