"""Acceptance of an adapter on held-out prompts: greedy, greedy outside repetition, sampled.

    python eval/acceptance.py runs/quickstart [--split validation] [--num-speculative-tokens 2]

Prints a table for people and one JSON object as the last line.
"""

import argparse
import json

from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers.utils import logging

import pardec
from pardec.acceptance import Acceptance, measure_acceptance
from pardec.data import STDLIB, TEST, VALIDATION, held_out_prompts
from pardec.run import device_name, exit_on_unusable_input, library_versions


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="adapter directory")
    parser.add_argument("--data", default=STDLIB, help="python-stdlib, python-packages, or held-out data")
    parser.add_argument("--split", default=TEST, choices=(VALIDATION, TEST), help="of the first two")
    parser.add_argument("--num-prompts", type=int, help="default all standard prompts")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--num-speculative-tokens", type=int, help="default what was trained")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with exit_on_unusable_input():
        report(args)


def report(args: argparse.Namespace) -> None:
    """Measures, prints the table and the JSON line."""
    logging.disable_progress_bar()
    model = pardec.load(args.directory)
    if model.tokenizer is None:
        raise ValueError("base: expected a tokenizer beside the model, found none")
    prompts = held_out_prompts(model.tokenizer, args.split, args.data, args.num_prompts)
    bar = tqdm(total=2 * len(prompts), unit="prompt")
    settings = {"max_new_tokens": args.max_new_tokens, "seed": args.seed, "on_batch": bar.update}
    settings["num_speculative_tokens"] = args.num_speculative_tokens
    greedy = measure_acceptance(model, prompts, **settings)
    sampled = measure_acceptance(model, prompts, temperature=args.temperature, top_k=args.top_k, **settings)
    bar.close()
    table = Table(
        "decoding",
        "mean acceptance length",
        "95 % interval",
        "outside repetition",
        "95 % interval",
        title=f"{args.directory}, {len(prompts)} prompts of {args.data} ({args.split}), bonus token included",
    )
    table.add_row("greedy", *_cells(greedy))
    table.add_row(f"temperature {args.temperature}, top-k {args.top_k}", *_cells(sampled))
    Console().print(table)
    result = {
        "adapter": args.directory,
        "split": args.split,
        "num_prompts": len(prompts),
        "max_new_tokens": args.max_new_tokens,
        "greedy": greedy.to_dict(),
        "sampled": {"temperature": args.temperature, "top_k": args.top_k, **sampled.to_dict()},
        "device": device_name(model.target.device),
        "versions": library_versions(),
    }
    print(json.dumps(result))


def _cells(measured: Acceptance) -> list[str]:
    low, high = measured.interval
    cells = [f"{measured.mean_acceptance_length:.3f}", f"{low:.3f} to {high:.3f}"]
    if measured.outside_interval is None:
        return [*cells, "-", "-"]
    low, high = measured.outside_interval
    return [*cells, f"{measured.outside_repetition:.3f}", f"{low:.3f} to {high:.3f}"]


if __name__ == "__main__":
    main()
