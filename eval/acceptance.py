"""How many drafted tokens are accepted on held-out prompts, by position and by category?

    python eval/acceptance.py runs/quickstart [--split validation] [--prompts FILE.jsonl] [--num-speculative-tokens 2]
    python eval/acceptance.py runs/quickstart --verify

Greedy, greedy outside repetition and sampled, with the ranks of what the model went on with. Prints tables for people
and one JSON object as the last line. --verify repeats the measurement that training stored
with the adapter, with all of its settings; exit code 1 if a figure differs by more than 2 %.
"""

import argparse
import json
import sys
from itertools import zip_longest
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers.utils import logging

import pardec
from pardec.data.benchmarks import Prompt, read_prompts
from pardec.data.corpus import held_out_prompts
from pardec.data.python_sources import STDLIB, TEST, VALIDATION, source_folder
from pardec.decoding.verify import VERIFICATIONS
from pardec.measures.acceptance import BATCH_SIZE, Acceptance
from pardec.measures.held_out import TOLERANCE, Comparison, HeldOut, measure_again, measure_held_out
from pardec.measures.ranks import TOP
from pardec.model import SelfSpeculativeModel
from pardec.run import device_name, exit_on_unusable_input, library_versions

HEAD = {"auto": None, "on": True, "off": False}


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="adapter directory")
    parser.add_argument("--verify", action="store_true", help="measure again what training has stored, nothing else")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", default=STDLIB, help="python-stdlib, python-packages, or held-out data")
    source.add_argument("--prompts", help="prompts instead: a .jsonl file, of a benchmark perhaps, or a text file")
    parser.add_argument("--split", default=TEST, choices=(VALIDATION, TEST), help="of the first two kinds of data")
    parser.add_argument("--num-prompts", type=int, help="default all")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--num-speculative-tokens", type=int, help="default what was trained, also after pardec tune")
    parser.add_argument("--head", default="auto", choices=HEAD, help="sampler head; auto: if the adapter has one")
    parser.add_argument("--verification", default="token", choices=VERIFICATIONS, help="of sampled drafts")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="prompts decoded together")
    args = parser.parse_args()
    with exit_on_unusable_input():
        if args.verify:
            refuse_beside_verify(parser, args)
        logging.disable_progress_bar()
        model = pardec.load(args.directory)
        sys.exit(verify(args.directory, model) if args.verify else report(args, model))


def refuse_beside_verify(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Options would be ignored."""
    for name, value in vars(args).items():
        if name not in ("directory", "verify") and value != parser.get_default(name):
            option = "--" + name.replace("_", "-")
            raise ValueError(f"--verify: expected no options beside it, as it takes what is stored, found {option}")


def report(args: argparse.Namespace, model: SelfSpeculativeModel) -> int:
    """Measures, prints the tables and the JSON line."""
    prompts = prompts_for(args, model)
    with tqdm(unit="prompt") as bar:
        found = measure_held_out(
            model,
            [prompt.token_ids for prompt in prompts],
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            seed=args.seed,
            batch_size=args.batch_size,
            num_speculative_tokens=args.num_speculative_tokens,
            use_head=HEAD[args.head],
            verification=args.verification,
            categories=[prompt.category for prompt in prompts],
            on_batch=bar.update,
        )
    where = args.prompts or f"{args.data} ({args.split})"
    title = f"{args.directory}, {len(prompts)} prompts of {where}, K = {found.settings['num_speculative_tokens']}"
    print_figures(found, title)
    result = {
        "adapter": args.directory,
        "split": None if args.prompts else args.split,
        "data": args.prompts or args.data,
        "head": args.head,
        **found.to_dict(),
    }
    print(json.dumps(result | machine(model)))
    return 0


def prompts_for(args: argparse.Namespace, model: SelfSpeculativeModel) -> list[Prompt]:
    """What is asked for; prompts that leave the base no room for new tokens lose their beginning."""
    if model.tokenizer is None:
        raise ValueError("base: expected a tokenizer beside the model, found none")
    if args.prompts is None and source_folder(args.data) is None:
        rows = held_out_prompts(model.tokenizer, args.split, args.data, args.num_prompts)
        return [Prompt(ids, "text", f"{args.data}/{index}") for index, ids in enumerate(rows)]
    limit = model.target.max_positions
    room = None if limit is None else max(limit - args.max_new_tokens, 1)
    return read_prompts(
        args.prompts or args.data,
        model.tokenizer,
        split=args.split,
        num_prompts=args.num_prompts,
        max_prompt_tokens=room,
    )


def print_figures(found: HeldOut, title: str) -> None:
    """The tables: mean acceptance lengths, positions, and categories where there are several."""
    settings = found.settings
    law = f"sampled at temperature {settings['temperature']}, top-k {settings['top_k']}"
    law += f", {settings['verification']} verification"
    ways = {"greedy": found.greedy, "sampled": found.sampled}
    if found.sampled_without_head is not None:
        ways["sampled, without head"] = found.sampled_without_head
    measures = ("mean acceptance\nlength", "95 % interval", "outside\nrepetition", "95 % interval", "tokens\nper step")
    heads = ("decoding", *measures)
    lengths = Table(*heads, title=f"{title}\n{law}; bonus token included", box=SIMPLE_HEAD)
    for name, one in ways.items():
        lengths.add_row(name, *_cells(one))
    console = Console()
    console.print(lengths, position_table(found))
    if len(found.greedy.by_category) > 1:
        console.print(category_table(ways))


def position_table(found: HeldOut) -> Table:
    """Acceptance of each drafted token, and how high it ranked what the model went on with."""
    heads = ("decoding", "position", "accepted", "given those\nbefore", *(f"top-{n}" for n in TOP))
    title = "drafts by position; top-n: the model's next token was among their n likeliest"
    table = Table(*heads, title=title, box=SIMPLE_HEAD)
    ways = {"greedy": (found.greedy, found.greedy_ranks), "sampled": (found.sampled, found.sampled_ranks)}
    for name, (one, ranks) in ways.items():
        rates = one.stats.acceptance_rate_per_position
        columns = (rates["unconditional"], rates["conditional"], *(ranks.unconditional[n] for n in TOP))
        # where no sequence lived to a draft there are ranks alone
        for j, row in enumerate(zip_longest(*columns)):
            cells = ("-" if value is None else f"{value:.3f}" for value in row)
            table.add_row("" if j else name, str(j + 1), *cells)
    return table


def category_table(ways: dict[str, Acceptance]) -> Table:
    """Mean acceptance length of each category of prompts."""
    title = "mean acceptance length by category, 95 % interval over prompts"
    table = Table("category", "prompts", *ways, title=title, box=SIMPLE_HEAD)
    for category, one in next(iter(ways.values())).by_category.items():
        cells = []
        for found in (way.by_category[category] for way in ways.values()):
            low, high = found.interval
            spread = f" ({low:.3f} to {high:.3f})" if found.num_prompts > 1 else ""
            cells.append(f"{found.mean_acceptance_length:.3f}{spread}")
        table.add_row(category, str(one.num_prompts), *cells)
    return table


def verify(directory: str, model: SelfSpeculativeModel) -> int:
    """Measures again what is stored in pardec.json, prints both; returns the exit code."""
    found, rows = measure_again(model)
    title = f"{directory}: mean acceptance length, stored by training and measured again"
    table = Table("figure", "stored", "found", "difference", "", title=title, box=SIMPLE_HEAD)
    for row in rows:
        difference = f"{100 * row.relative_difference:+.2f} %"
        table.add_row(row.figure, f"{row.stored:.4f}", f"{row.found:.4f}", difference, verdict(row))
    Console().print(table)
    agrees = all(row.agrees for row in rows)
    result: dict[str, Any] = {
        "adapter": directory,
        "verified": agrees,
        "tolerance": TOLERANCE,
        "rows": [
            {**vars(row), "relative_difference": round(row.relative_difference, 5), "agrees": row.agrees}
            for row in rows
        ],
        "found": found.to_dict(),
    }
    print(json.dumps(result | machine(model)))
    return 0 if agrees else 1


def verdict(row: Comparison) -> str:
    """The comparison in words."""
    if not row.agrees:
        return "DIFFERS"
    sample = {True: "same continuations", False: "other continuations", None: ""}[row.same_tokens]
    if abs(row.relative_difference) <= TOLERANCE:
        return sample
    low, high = row.interval
    return f"{sample or 'perhaps other continuations'}, by chance {low:.3f} to {high:.3f}"


def machine(model: SelfSpeculativeModel) -> dict[str, Any]:
    """Where figures come from."""
    return {"device": device_name(model.target.device), "versions": library_versions()}


def _cells(measured: Acceptance) -> list[str]:
    low, high = measured.interval
    cells = [f"{measured.mean_acceptance_length:.3f}", f"{low:.3f} to {high:.3f}"]
    outside = ["-", "-"]
    if measured.outside_interval is not None:
        low, high = measured.outside_interval
        outside = [f"{measured.outside_repetition:.3f}", f"{low:.3f} to {high:.3f}"]
    return [*cells, *outside, f"{measured.stats.tokens_per_step:.3f}"]


if __name__ == "__main__":
    main()
