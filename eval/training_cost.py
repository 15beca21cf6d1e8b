"""What does a supervised slot cost in training, in time and memory, beside other ways to train a draft on one base?

    python eval/training_cost.py [--base tiny-python] [--lengths 256,512,2048]
    python eval/training_cost.py --quick

A slot is a row of a step whose next token has a loss. Compared are the step of `train/train_adapter.py`, which runs
real tokens once without gradient and then mask rows alone; the same with gradient checkpointing in some layers; the
dense joint form of the same loss, one forward over all rows under a dense mask, all with gradients; and PARD
(arXiv:2504.18583), which trains all weights from K segments of the sequence in one forward. They take turns on one
base, with random tokens. Loss of all but PARD is the same. Prints a table, writes JSON, Markdown and a picture into
eval/results; the last line is one JSON object.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from reporting.plots import plot_training_cost
from reporting.result_files import output_stem, provenance, write_files
from reporting.text_tables import TextTable, markdown_page, number, print_tables
from timing.clock import quartiles
from timing.options import full_or_quick, integers
from timing.pard_forward import PardForward
from timing.training_ways import CHECKPOINTED, PARD, PARDEC, Cost, Dropping, Way, batch_of, build_ways, measure_in_turn
from transformers.utils import logging

from pardec.config.train_section import default_anchors
from pardec.layout import MAX_SPECULATIVE_TOKENS, nested_block_lengths
from pardec.run import dtype_name, exit_on_unusable_input
from pardec.target.base import load_base
from pardec.training.running.processes import make_accelerator

FULL = {"lengths": "256,512,2048", "tokens": 512, "repetitions": 3}
QUICK = {"lengths": "16,32", "tokens": 32, "repetitions": 2}
DROPPING = Dropping(0.7, 0.2)  # of PARD, section 4
HEADER = (
    "T", "way", "learned", "K", "sequences", "anchors", "mask rows", "slots", "steps", "µs/slot", "CPU µs/slot",
    "x pardec", "KiB/slot", "x pardec's memory",
)  # fmt: skip
NOTES = (
    "slot: a row that has a target; of PARD the rows of the text itself are among them, of which each drafts the first "
    "token",
    "µs/slot: of a step with its update, median (lower to upper quartile) over so many steps; CPU µs of all threads",
    "x pardec: median over repetitions of the ratio of CPU µs/slot to that of pardec with the same K and dropping in "
    "the same repetition, with embeddings alone beside embeddings alone",
    "KiB/slot: the most that is alive at once of what forward and backward make, gradients among it; weights, moments "
    "and what kernels need inside are not",
    "checkpointed: a share of the layers, see --checkpointing, keep no activations of mask rows and run twice",
    "K with a star: at depth j a share of max(.2, .7^(j-1)) of the mask tokens is kept",
)


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", default="tiny-python")
    add("--lengths", help=f"T, tokens of a sequence, default {FULL['lengths']}")
    add("--tokens", type=int, help=f"of all sequences of a step, at least one sequence; default {FULL['tokens']}")
    add("--anchors", type=int, help="in each sequence; default what recipes have by T")
    add("--num-speculative-tokens", type=int, default=4, help="K with all mask tokens")
    add("--checkpointing", type=float, default=0.67, help="share of the layers, as train.gradient_checkpointing")
    add("--dropped", type=int, default=8, help="K with token dropping")
    add("--lora-rank", type=int, default=16)
    add("--most-rows", type=int, default=6144, help="in one forward; what has more is left out")
    add("--precision", default="auto", choices=("auto", "no", "bf16"), help="as train.mixed_precision")
    add("--threads", type=int, default=1)
    add("--repetitions", type=int, help=f"counted steps of each way, default {FULL['repetitions']}; one more warms up")
    add("--seconds", type=float, default=math.inf, help="fewer repetitions of a length, where they would take longer")
    add("--seed", type=int, default=0)
    add("--output", help="path of the results without suffix; default eval/results/training_cost_<device>")
    add("--quick", action="store_true", help="short sequences: runs/training_cost_quick")
    args = full_or_quick(parser, FULL, QUICK)
    with exit_on_unusable_input():
        report(args)


def report(args: argparse.Namespace) -> None:
    """The whole measurement."""
    for option in ("tokens", "lora_rank", "most_rows", "threads", "repetitions"):
        if getattr(args, option) < 1:
            raise ValueError(f"{option}: expected an integer >= 1, found {getattr(args, option)}")
    for option in ("num_speculative_tokens", "dropped"):
        if not 1 <= getattr(args, option) <= MAX_SPECULATIVE_TOKENS:
            raise ValueError(f"{option}: expected 1 to {MAX_SPECULATIVE_TOKENS}, found {getattr(args, option)}")
    if not 0 < args.checkpointing <= 1:
        raise ValueError(f"checkpointing: expected a number over 0, up to 1, found {args.checkpointing}")
    lengths = integers("lengths", args.lengths)
    if args.anchors is not None and not 1 <= args.anchors <= lengths[0]:
        raise ValueError(f"anchors: expected 1 to {lengths[0]}, the shortest length, found {args.anchors}")
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    accelerator = make_accelerator(args.precision)
    base = load_base(args.base, device=accelerator.device)
    num_parameters, device = base.num_parameters(), accelerator.device
    ways = build_ways(
        accelerator,
        base,
        lora_rank=args.lora_rank,
        full=args.num_speculative_tokens,
        dropped=args.dropped,
        dropping=DROPPING,
        checkpointing=args.checkpointing,
        num_steps=2 * len(lengths) * (args.repetitions + 1),
        seed=args.seed,
    )
    result: dict[str, Any] = {
        "base": args.base,
        "num_parameters": num_parameters,
        **{name: getattr(args, name) for name in ("tokens", "lora_rank", "threads", "seed", "checkpointing")},
        "dtype": dtype_name(base.dtype),
        "mixed_precision": accelerator.mixed_precision,
        "rows": [],
        "left_out": [],
        **provenance(device),
    }
    for length in lengths:
        rows, left_out = measure(args, ways, length)
        result["rows"] += rows
        result["left_out"] += left_out
        # a long one behind it may be cut off
        table, notes = write(result, output_stem("training_cost", args.output, args.quick, device))
    print_tables([table], notes, ("way", "learned"))
    print(json.dumps(result))


def measure(args: argparse.Namespace, ways: Sequence[Way], length: int) -> tuple[list[dict], list[str]]:
    """Rows of figures of all ways at a length, and what was left out."""
    anchors, batch_size = args.anchors or default_anchors(length), max(1, args.tokens // length)
    mask_rows = [mask_rows_of(way, length, anchors) for way in ways]
    fitting = [
        way.form in (PARDEC, CHECKPOINTED) or length + rows <= args.most_rows
        for way, rows in zip(ways, mask_rows, strict=True)
    ]
    left_out = [
        f"T = {length}, {way.form}, {way.learned}, K = {way.num_speculative_tokens}: {length + rows} rows in a forward"
        for way, rows, fits in zip(ways, mask_rows, fitting, strict=True)
        if not fits
    ]
    kept = [way for way, fits in zip(ways, fitting, strict=True) if fits]
    sizes = {"batch_size": batch_size, "length": length, "anchors": anchors, "seed": args.seed}
    costs = measure_in_turn(kept, [batch_of(way, **sizes) for way in kept], args.repetitions, args.seconds)
    rows = []
    for way, cost in zip(kept, costs, strict=True):
        settings = {
            "length": length,
            "form": way.form,
            "learned": way.learned,
            "num_speculative_tokens": way.num_speculative_tokens,
            "keep_ratio": way.dropping.ratio,
            "batch_size": batch_size,
            "anchors": length if way.form == PARD else anchors,
            "mask_rows": batch_size * mask_rows_of(way, length, anchors),
        }
        rows.append(settings | figures(cost, reference_of(way, kept, costs)))
    return rows, left_out


def mask_rows_of(way: Way, length: int, anchors: int) -> int:
    """Of a sequence."""
    if isinstance(way.module, PardForward):
        return way.module.num_mask_rows(length)
    keep = way.dropping
    return sum(nested_block_lengths(anchors, way.num_speculative_tokens, keep.ratio, keep.floor))


def reference_of(way: Way, ways: Sequence[Way], costs: Sequence[Cost]) -> Cost:
    """What pardec takes that learns as much as it can of what this way learns."""
    same = [
        cost
        for other, cost in zip(ways, costs, strict=True)
        if other.form == PARDEC
        and (other.num_speculative_tokens, other.dropping) == (way.num_speculative_tokens, way.dropping)
        and (way.form == PARD or other.learned == way.learned)
    ]
    return same[0]


def figures(cost: Cost, reference: Cost) -> dict[str, Any]:
    """The figures of a way beside those of the reference, rounded."""
    found: dict[str, Any] = {"slots": cost.slots, "repetitions": len(cost.seconds)}
    for name, seconds in (("us_per_slot", cost.seconds), ("cpu_us_per_slot", cost.cpu_seconds)):
        low, median, high = quartiles([1e6 * one / cost.slots for one in seconds])
        found |= {name: round(median, 2), f"{name}_quartiles": [round(low, 2), round(high, 2)]}
    pairs = zip(cost.cpu_seconds, reference.cpu_seconds, strict=True)
    ratio = statistics.median(mine / other for mine, other in pairs) * reference.slots / cost.slots
    memory = cost.peak_bytes / cost.slots
    return found | {
        "ratio_to_pardec": round(ratio, 4),
        "kib_per_slot": round(memory / 1024, 3),
        "memory_ratio_to_pardec": round(memory / (reference.peak_bytes / reference.slots), 4),
    }


def name_of(row: dict) -> str:
    """A way as the picture's legend has it."""
    dropped = "" if row["keep_ratio"] == 1 else " with dropping"
    return f"{row['form']}, {row['learned']}, K = {row['num_speculative_tokens']}{dropped}"


def write(result: dict, stem: Path) -> tuple[TextTable, list[str]]:
    """Files and picture; returns the table and its notes."""
    title = (
        f"{result['base']}, {result['num_parameters'] / 1e6:,.1f} M parameters, {result['dtype']}, mixed precision "
        f"{result['mixed_precision']}; {result['device']}"
    )
    lines = []
    for row in result["rows"]:
        times = []
        for name in ("us_per_slot", "cpu_us_per_slot"):
            low, high = row[f"{name}_quartiles"]
            times.append(f"{row[name]:.0f} ({low:.0f} to {high:.0f})")
        K = f"{row['num_speculative_tokens']}{'' if row['keep_ratio'] == 1 else '*'}"
        sizes = [str(row[name]) for name in ("batch_size", "anchors", "mask_rows", "slots", "repetitions")]
        ratio, memory, beside = (
            number(row[name], digits)
            for name, digits in (("ratio_to_pardec", 2), ("kib_per_slot", 1), ("memory_ratio_to_pardec", 2))
        )
        lines.append([str(row["length"]), row["form"], row["learned"], K, *sizes, *times, ratio, memory, beside])
    table = TextTable(title, HEADER, lines, has_sections=True)
    notes = [*NOTES, *(f"left out: {one}" for one in result["left_out"])]
    page = markdown_page(result, f"What a slot of training costs on {result['base']}", title, [table.markdown()], notes)
    panels: dict[str, dict[str, dict[str, float]]] = {"CPU µs per slot": {}, "KiB per slot": {}}
    for row in result["rows"]:
        for panel, name in zip(panels, ("cpu_us_per_slot", "kib_per_slot"), strict=True):
            panels[panel].setdefault(name_of(row), {})[f"T = {row['length']}"] = row[name]
    write_files(result, stem, page, lambda path: plot_training_cost(panels, title, path))
    return table, notes


if __name__ == "__main__":
    main()
