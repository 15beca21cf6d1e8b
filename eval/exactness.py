"""Are the greedy tokens of every mode the base's own, in each dtype, and where they are not, is it a tie?

    python eval/exactness.py runs/quickstart --dtypes float32,bfloat16 [--prompts FILE.jsonl] [--output runs/exactness]

Every prompt is decoded in the modes plain, two_pass and fused and by the base's own `generate`, one at a time, and but
for two_pass also in batches; all are compared with plain and with `generate`. What plain decoding and `generate` differ
by among themselves, where nothing is drafted, is the dtype's floor: the drafts' differences are to be read against it.
Where two sequences first differ, one plain forward of the base over what they share says whether their tokens are a tie
that rounding decides. Prints Markdown tables and one JSON object as the last line. Exit code 1 if a difference is no
tie, 0 otherwise.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import torch
from reporting.result_files import write_json
from reporting.text_tables import listed
from rich import box
from rich.console import Console
from rich.table import Table
from timing.baselines import Setting, generate_way
from timing.options import add_prompt_options, check_device, full_or_quick
from tqdm.auto import tqdm
from transformers.utils import logging

import pardec
from pardec.data.benchmarks import Prompt, read_prompts
from pardec.measures.divergence import Divergence, divergence_from
from pardec.model import SelfSpeculativeModel
from pardec.run import command_line, device_name, exit_on_unusable_input, library_versions
from pardec.target.base import neutral_generation_config

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}
# mode, prompts decoded together at most
RUNS = (("plain", 1), ("plain", 8), ("two_pass", 1), ("fused", 1), ("fused", 8), ("generate", 1), ("generate", 8))
UNDRAFTED = ("plain", "generate")
FULL = {"num_prompts": None, "max_new_tokens": 128}
QUICK = {"num_prompts": 3, "max_new_tokens": 24}


def compare(
    prompts: Sequence[Prompt],
    found: Sequence[Sequence[int]],
    reference: Sequence[Sequence[int]],
    diverges: Callable[[Prompt, Sequence[int], Sequence[int]], Divergence | None],
) -> dict:
    """Compares the continuations of all prompts.

    Args:
        prompts: that were continued.
        found: new tokens of each in one mode.
        reference: new tokens that they are compared with.
        diverges: the first divergence of two continuations of a prompt, None if they are the same.

    Returns:
        dict: `identical`, the share of prompts whose sequences are the same; `num_tokens` compared, which end at a
            divergence; `num_divergences`; `num_unexplained`; `divergences`, as dicts.
    """
    divergences, num_tokens = [], 0
    for prompt, ours, theirs in zip(prompts, found, reference, strict=True):
        one = diverges(prompt, ours, theirs)
        num_tokens += len(theirs) if one is None else one.index + 1
        if one is not None:
            divergences.append(one)
    return {
        "num_prompts": len(prompts),
        "num_tokens": num_tokens,
        "identical": round(1 - len(divergences) / len(prompts), 4),
        "num_divergences": len(divergences),
        "num_unexplained": sum(not one.explained for one in divergences),
        "divergences": [asdict(one) for one in divergences],
    }


def decode(
    model: SelfSpeculativeModel, prompts: Sequence[Prompt], args: argparse.Namespace, dtype: str
) -> dict[tuple[str, int], list[list[int]]]:
    """Greedy new tokens of every prompt by mode and batch size; mode `generate` is the base's own."""
    outputs: dict[tuple[str, int], list[list[int]]] = {(mode, min(size, len(prompts))): [] for mode, size in RUNS}
    settings = {"max_new_tokens": args.max_new_tokens, "num_speculative_tokens": args.num_speculative_tokens}
    model.base_model.generation_config = neutral_generation_config(model.base_model, stop_at_eos=True)
    own = generate_way(model.base_model, Setting("greedy", args.max_new_tokens), name="generate")
    with tqdm(total=len(outputs) * len(prompts), desc=dtype, unit="prompt") as bar:
        for (mode, batch_size), collected in outputs.items():
            for start in range(0, len(prompts), batch_size):
                batch = [prompt.token_ids for prompt in prompts[start : start + batch_size]]
                if mode == "generate":
                    collected += own.decode(batch, 0).token_ids
                else:
                    collected += model.generate(batch, mode=mode, **settings).token_ids
                bar.update(len(batch))
    return outputs


def measure(model: SelfSpeculativeModel, prompts: Sequence[Prompt], args: argparse.Namespace, dtype: str) -> list[dict]:
    """Decodes all prompts in every way and compares: one row for each mode, batch size and reference."""
    outputs = decode(model, prompts, args, dtype)

    def diverges(prompt: Prompt, ours: Sequence[int], theirs: Sequence[int]) -> Divergence | None:
        return divergence_from(model.base_model, prompt.name, prompt.token_ids, ours, theirs)

    rows = []
    for reference in UNDRAFTED:
        for (mode, batch_size), found in outputs.items():
            # plain against `generate` is what `generate` against plain is
            if (mode, batch_size) == (reference, 1) or (mode == "generate" != reference):
                continue
            row = {"dtype": dtype, "mode": mode, "batch_size": batch_size, "reference": reference}
            row["is_floor"] = mode in UNDRAFTED
            rows.append(row | compare(prompts, found, outputs[reference, 1], diverges))
    return rows


def floors(rows: Sequence[dict]) -> dict[str, dict[str, float]]:
    """By dtype the mean share of identical texts: `floor` where nothing was drafted on either side, and `drafted`."""
    found = {}
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        shares = {True: [], False: []}
        for row in rows:
            if row["dtype"] == dtype:
                shares[row["is_floor"]].append(row["identical"])
        means = {name: round(fmean(shares[is_floor]), 4) for name, is_floor in (("floor", True), ("drafted", False))}
        found[dtype] = means
    return found


def report(args: argparse.Namespace) -> bool:
    """Measures in every dtype, prints and writes; whether every divergence is a tie."""
    logging.disable_progress_bar()
    check_options(args)
    rows, prompts, facts = [], [], {}
    for dtype in args.dtypes.split(","):
        gc.collect()  # frees the model before this one, which its hooks refer to
        model = pardec.load(args.directory, base=args.base, dtype=DTYPES[dtype], device=args.device)
        assert model.adapter is not None
        # not what `pardec tune` chose here: that may be fewer, or plain decoding
        args.num_speculative_tokens = args.num_speculative_tokens or model.adapter.metadata.num_speculative_tokens
        limits = {"num_prompts": args.num_prompts, "max_prompt_tokens": args.max_prompt_tokens}
        prompts = prompts or read_prompts(args.prompts, model.tokenizer, split=args.split, **limits)
        # refuses what does not fit the model before anything is decoded
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids)).token_ids
        model.stream(longest, max_new_tokens=args.max_new_tokens, num_speculative_tokens=args.num_speculative_tokens)
        facts = {"adapter": args.directory, "device": device_name(model.target.device), "num_prompts": len(prompts)}
        rows += measure(model, prompts, args, dtype)
        del model
    asked = ("base", "prompts", "split", "max_new_tokens", "max_prompt_tokens", "num_speculative_tokens")
    facts |= {key: getattr(args, key) for key in asked} | {"command": command_line(), "versions": library_versions()}
    exact = not any(row["num_unexplained"] for row in rows)
    # JSON has no number for what is not finite
    found = {"exact": exact, **facts, "identical_by_dtype": floors(rows), "rows": rows}
    result = json.loads(json.dumps(found), parse_constant=lambda name: None)
    text = print_tables(result)
    print(json.dumps(result))
    if args.output is not None:
        path = Path(args.output if args.output.endswith(".json") else f"{args.output}/exactness.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(result, path)
        path.with_suffix(".md").write_text(text, encoding="utf-8")
    return exact


def print_tables(result: dict) -> str:
    """Prints the Markdown report and returns it: a line for each comparison, and one for each divergence."""
    console = Console(width=1000, record=True, markup=False, highlight=False)  # no cell is broken into lines
    asked = f"{result['num_prompts']} prompts of {result['prompts']}, at most {result['max_new_tokens']} new tokens"
    console.print(f"# Exactness of {result['adapter']}", f"`{result['command']}`", sep="\n\n", end="\n\n")
    console.print(f"{asked}, K = {result['num_speculative_tokens']}; {result['device']}; {listed(result['versions'])}")
    names = ("dtype", "mode", "batch", "against")
    table = Table(*names, "tokens compared", "identical", "divergences", "unexplained", box=box.MARKDOWN)
    gaps = ("top-2 gap", "/ largest logit", "gap of the ids", "below the best", "tolerance")
    places = Table(*names, "prompt", "token", "ids", *gaps, "explained", box=box.MARKDOWN)
    for row in result["rows"]:
        run = (row["dtype"], row["mode"], str(row["batch_size"]), row["reference"])
        counts = (str(row["num_tokens"]), f"{row['identical']:.1%}", str(row["num_divergences"]))
        table.add_row(*run, *counts, str(row["num_unexplained"]))
        for one in row["divergences"]:
            ids = " / ".join("end" if token is None else str(token) for token in one["tokens"])
            values = (one[key] for key in ("top2_gap", "relative_gap", "token_gap", "shortfall", "tolerance"))
            cells = ("not finite" if value is None else f"{value:.2g}" for value in values)
            places.add_row(*run, one["prompt"], str(one["index"]), ids, *cells, "yes" if one["explained"] else "NO")
    console.print(table)
    for dtype, means in result["identical_by_dtype"].items():
        console.print(
            f"{dtype}: {means['drafted']:.1%} of the texts are the same with drafts as without, on average; where "
            f"nothing is drafted, {means['floor']:.1%} are, of plain decoding and `generate` alone and in batches.",
            end="\n\n",
        )
    if places.row_count:
        console.print("First divergences, with the logits of one plain forward there:", places, sep="\n")
    return "".join(line.rstrip() + "\n" for line in console.export_text().splitlines())


def check_options(args: argparse.Namespace) -> None:
    """Refuses what no model could use."""
    for name in args.dtypes.split(","):
        if name not in DTYPES:
            raise ValueError(f"dtypes: expected some of {','.join(DTYPES)}, found {name!r}")
    if args.num_speculative_tokens is not None and args.num_speculative_tokens < 1:
        raise ValueError(f"num_speculative_tokens: expected an integer >= 1, found {args.num_speculative_tokens}")
    check_device(args.device)


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="adapter directory")
    parser.add_argument("--base", help="base model, if not the one that the adapter names")
    add_prompt_options(parser)
    parser.add_argument("--num-prompts", type=int, help="default all of the source")
    parser.add_argument("--max-prompt-tokens", type=int, help="keep only the end of longer prompts")
    parser.add_argument("--max-new-tokens", type=int, help="limit per prompt")
    parser.add_argument("--dtypes", default="float32,bfloat16", help=f"some of {','.join(DTYPES)}")
    parser.add_argument("--device", help="default CUDA where there is one")
    parser.add_argument("--num-speculative-tokens", type=int, help="default what was trained")
    parser.add_argument("--output", help="folder, or .json file, for the JSON and the Markdown beside it")
    parser.add_argument("--quick", action="store_true", help="few prompts and tokens, for a first look")
    args = full_or_quick(parser, FULL, QUICK)
    with exit_on_unusable_input():
        sys.exit(0 if report(args) else 1)


if __name__ == "__main__":
    main()
