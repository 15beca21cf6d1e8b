"""How much of what drafts can reach without seeing the tokens between does an adapter reach, by depth?

    python eval/floor.py runs/quickstart [runs/other ...] [--split validation] [--num-futures 64] [--quick]

A draft of mask tokens is one law for all futures, where the model's own law at a depth depends on the tokens between:
so even the best draft is refused at times. From futures that the model samples behind held-out texts this measures the
largest overlap sum min(p, q), which is the probability of acceptance, that any draft has which sees none of them, and
that which any has that sees the one before it, as with a sampler head (arXiv:2608.27339); and that of each adapter at
the same places. Writes a table, JSON and a picture into eval/results; the last line printed is one JSON object.
Exit code 0.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from reporting.plots import plot_floor
from reporting.result_files import output_stem, provenance, write_files
from reporting.text_tables import TextTable, markdown_page, print_tables
from timing.options import full_or_quick
from tqdm.auto import tqdm
from transformers.utils import logging

import pardec
from pardec.data.corpus import held_out_prompts
from pardec.data.python_sources import STDLIB, TEST, VALIDATION
from pardec.measures.acceptance import digest
from pardec.measures.floor import Overlaps, measure_overlaps
from pardec.model import SelfSpeculativeModel
from pardec.run import exit_on_unusable_input

FULL = {"num_prompts": 24, "max_new_tokens": 64, "stride": 16, "num_futures": 64, "num_predecessors": 8}
QUICK = {"num_prompts": 2, "max_new_tokens": 8, "stride": 4, "num_futures": 4, "num_predecessors": 2}
BOOTSTRAP_SAMPLES = 2000
NOTES = (
    "overlap: sum min(p, q) = 1 - total variation of target and draft, the probability that a draft is accepted, mean "
    "over sampled futures; not the share of drafts that steps accept, which drop all behind the first refused",
    "possible: the most that any draft has that sees no token between, or the one before it; the first is an estimate "
    "that on average is too large, as the best law is fitted to the futures that judge it, the second one that is too "
    "small, as it is fitted to one half of them and judged by the other; the truth lies between",
    "share: what the adapter has of the first of them, so on average too small a share; its 95 % interval is over "
    "prompts and says nothing of that bias",
)


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("adapters", nargs="+", help="directories, of one base")
    add("--data", default=STDLIB, help="python-stdlib, python-packages, or held-out data")
    add("--split", default=TEST, choices=(VALIDATION, TEST), help="of the first two")
    add("--num-prompts", type=int, help=f"default {FULL['num_prompts']}")
    add(
        "--max-new-tokens",
        type=int,
        help=f"that the base samples behind each prompt, for places; default {FULL['max_new_tokens']}",
    )
    add("--stride", type=int, help=f"tokens from one place to the next; default {FULL['stride']}")
    add("--num-futures", type=int, help=f"sampled at each place; default {FULL['num_futures']}")
    add("--num-predecessors", type=int, help=f"of them whose last token is given; default {FULL['num_predecessors']}")
    add("--temperature", type=float, default=0.8)
    add("--top-k", type=int, default=10, help="0 for the whole vocabulary")
    add("--seed", type=int, default=0)
    add("--output", help="path of the results without suffix; default eval/results/floor_<device>")
    add("--quick", action="store_true", help="little of everything, for a first look: runs/floor_quick")
    args = full_or_quick(parser, FULL, QUICK)
    with exit_on_unusable_input():
        logging.disable_progress_bar()
        report(args)


def report(args: argparse.Namespace) -> None:
    """Measures every adapter at the same places and writes what was found."""
    if args.stride < 1:
        raise ValueError(f"--stride: expected a number from 1 on, found {args.stride}")
    law = {"temperature": args.temperature, "top_k": args.top_k or None}
    rows, contexts, prompt_of, base = [], [], [], None
    for directory in args.adapters:
        model = pardec.load(directory)
        assert model.adapter is not None
        if not contexts:
            base = model.adapter.metadata.base.name
            contexts, prompt_of = places(args, model, law)
        elif model.adapter.metadata.base.name != base:
            found = model.adapter.metadata.base.name
            raise ValueError(f"{directory}: expected an adapter of {base}, as the first one is, found one of {found}")
        with tqdm(total=len(contexts), unit="place", desc=directory) as bar:
            found = measure_overlaps(
                model,
                contexts,
                num_futures=args.num_futures,
                num_predecessors=args.num_predecessors,
                seed=args.seed,
                on_batch=bar.update,
                **law,
            )
        rows.append(row_of(directory, found, prompt_of, has_head=model.adapter.head is not None))
        device = model.target.device
    settings = {name: vars(args)[name] for name in ("data", "split", "num_futures", "num_predecessors", "seed")}
    facts = {"base": base, "num_prompts": len(set(prompt_of)), "num_places": len(contexts)}
    facts |= {"contexts_sha256": digest(contexts), **settings, **law}
    result = {**facts, "rows": rows, **provenance(device)}
    stem = output_stem("floor", args.output, args.quick, device)
    write_files(result, stem, markdown_of(result), lambda path: plot_floor(rows, title_of(result), path))
    print_tables([table_of(result)], [*summaries(result), *NOTES], {"adapter"})
    print(json.dumps(result))


def places(args: argparse.Namespace, model: SelfSpeculativeModel, law: dict[str, Any]) -> tuple[list, list[int]]:
    """Texts behind which is drafted, each a prompt with some of what the base samples behind it, and their prompts."""
    if model.tokenizer is None:
        raise ValueError("base: expected a tokenizer beside the model, found none")
    prompts = held_out_prompts(model.tokenizer, args.split, args.data, args.num_prompts)
    out = model.generate(prompts, mode="plain", max_new_tokens=args.max_new_tokens, seed=args.seed, **law)
    contexts, prompt_of = [], []
    for index, (prompt, tokens) in enumerate(zip(prompts, out.token_ids, strict=True)):
        for end in range(0, len(tokens), args.stride):
            contexts.append([*prompt, *tokens[:end]])
            prompt_of.append(index)
    return contexts, prompt_of


def row_of(directory: str, found: Overlaps, prompt_of: Sequence[int], *, has_head: bool) -> dict[str, Any]:
    """Means over places by depth, with their intervals, and the shares of what is possible, by depth and of all."""
    values = {field.name: getattr(found, field.name).numpy() for field in fields(Overlaps)}
    pairs = {"share": ("drafted", "blind"), "share_with_head": ("with_head", "behind_one")}
    if not has_head:
        del values["with_head"], pairs["share_with_head"]
    lengths = {name: values.pop(f"{name}_length") for name in ("blind", "behind_one")}
    draws = resampled(prompt_of)
    row: dict[str, Any] = {"adapter": Path(directory).name}
    for name, one in values.items():
        row[name] = {"mean": rounded(one.mean(axis=0)), "interval": interval(draws @ one / draws.sum(1)[:, None])}
    for name, one in lengths.items():
        row[name]["mean_acceptance_length"] = round(1 + float(one.mean()), 4)
    for name, (reached, possible) in pairs.items():
        above, below = values[reached], values[possible]
        share, shares = above.sum(axis=0) / below.sum(axis=0), (draws @ above) / (draws @ below)
        overall = (draws @ above.sum(axis=1)) / (draws @ below.sum(axis=1))
        row[name] = {
            "mean": rounded(share),
            "interval": interval(shares),
            "all_depths": round(float(above.sum() / below.sum()), 4),
            "all_depths_interval": interval(overall[:, None])[0],
        }
    return row


def resampled(prompt_of: Sequence[int]) -> np.ndarray:
    """How often each place counts when prompts are drawn anew, shape [samples, places]."""
    owners = np.array(prompt_of)
    num_prompts = owners.max() + 1
    draws = np.random.default_rng(0).integers(num_prompts, size=(BOOTSTRAP_SAMPLES, num_prompts))
    return np.stack([np.bincount(draw, minlength=num_prompts)[owners] for draw in draws])


def interval(samples: np.ndarray) -> list[list[float]]:
    """95 % intervals of the columns."""
    low, high = np.percentile(samples, [2.5, 97.5], axis=0)
    return [rounded(pair) for pair in zip(low, high, strict=True)]


def rounded(values) -> list[float]:
    """As results keep them."""
    return [round(float(value), 4) for value in values]


def title_of(result: dict[str, Any]) -> str:
    """What the rows have in common."""
    law = f"temperature {result['temperature']}" + (f", top-k {result['top_k']}" if result["top_k"] else "")
    where = f"{result['num_places']} places of {result['num_prompts']} prompts of {result['data']} ({result['split']})"
    return f"overlap with {result['base']}: {where}, {law}, {result['num_futures']} futures of each"


def table_of(result: dict[str, Any]) -> TextTable:
    """By adapter and depth."""
    header = ("adapter", "depth", "possible, none seen", "reached", "share", "possible, one seen", "with head", "share")
    rows = []
    for row in result["rows"]:
        for j, _ in enumerate(row["blind"]["mean"]):
            cells = [row["adapter"], str(j + 1), _between(row, "blind", j), _value(row, "drafted", j)]
            cells += [_share(row, "share", j), _between(row, "behind_one", j)]
            has_head = "with_head" in row
            cells += [_value(row, "with_head", j), _share(row, "share_with_head", j)] if has_head else ["-", "-"]
            rows.append(cells)
    return TextTable(title_of(result), header, rows, has_sections=True)


def _between(row: dict[str, Any], name: str, j: int) -> str:
    return f"{row[name]['mean'][j]:.3f} / {row[f'{name}_shown']['mean'][j]:.3f}"


def _value(row: dict[str, Any], name: str, j: int) -> str:
    low, high = row[name]["interval"][j]
    return f"{row[name]['mean'][j]:.3f} [{low:.3f}, {high:.3f}]"


def _share(row: dict[str, Any], name: str, j: int) -> str:
    low, high = row[name]["interval"][j]
    return f"{row[name]['mean'][j]:.0%} [{low:.0%}, {high:.0%}]"


def summaries(result: dict[str, Any]) -> list[str]:
    """What could be accepted at most, and a sentence for each adapter."""
    first = result["rows"][0]
    lengths = [first[name]["mean_acceptance_length"] for name in ("blind", "behind_one")]
    said = [
        f"mean acceptance length, bonus token included, where drafts follow the laws of the largest overlap: "
        f"{lengths[0]:.2f} if they see no token between, {lengths[1]:.2f} if each sees the one before; both are judged "
        "by the futures that the laws were fitted to, so on average too large"
    ]
    for row in result["rows"]:
        words = f"{row['adapter']}: {_overall(row['share'])} of what is possible without a head"
        if "share_with_head" in row:
            words += f", {_overall(row['share_with_head'])} with one"
        said.append(f"{words} (sums over all depths, 95 % interval over prompts)")
    return said


def _overall(share: dict[str, Any]) -> str:
    low, high = share["all_depths_interval"]
    return f"{share['all_depths']:.0%} ({low:.0%}-{high:.0%})"


def markdown_of(result: dict[str, Any]) -> str:
    """The page of a result."""
    facts = f"{title_of(result)}, {result['device']}"
    notes = [*summaries(result), *NOTES]
    return markdown_page(result, "Floor of the drafts", facts, [table_of(result).markdown()], notes)


if __name__ == "__main__":
    main()
