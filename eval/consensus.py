"""What do samples of one prompt bring each other that copy from each other, beside samples that copy from themselves?

    python eval/consensus.py DIR [--samples 4,8] [--copy-tokens 8] [--prompts FILE.jsonl] [--quick]

Every prompt is sampled plainly, and the steps are counted that the same texts take where copies are verified alone:
each sample looking in its own text, or in those of its neighbours too, as far as they have got by then. Writes a table
and JSON into eval/results; the last line printed is one JSON object. Exit code 0.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from reporting.intervals import ratio_interval
from reporting.result_files import output_stem, provenance, write_page
from reporting.text_tables import TextTable, markdown_page, print_tables
from timing.options import add_prompt_options, full_or_quick, integers
from tqdm.auto import tqdm
from transformers.utils import logging

import pardec
from pardec.data.benchmarks import read_prompts
from pardec.decoding.copying import Copier, Texts, begin_context, sources_of
from pardec.run import exit_on_unusable_input

FULL = {"num_prompts": 16, "samples": "2,4,8", "max_new_tokens": 128}
QUICK = {"num_prompts": 2, "samples": "2", "max_new_tokens": 12}
NOTES = (
    "tokens per step: emitted / steps of the sequences, prefill aside, sums over sums",
    "gain: their ratio on the same texts, with its 95 % interval by bootstrap over prompts",
)


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("directory", help="of an adapter, whose base is sampled")
    add_prompt_options(parser)
    add("--num-prompts", type=int, help=f"default {FULL['num_prompts']}")
    add("--samples", help=f"that look in each other's texts, default {FULL['samples']}; divisors of the largest")
    add("--max-new-tokens", type=int, help=f"default {FULL['max_new_tokens']}")
    add("--copy-tokens", type=int, default=8)
    add("--temperature", type=float, default=0.8)
    add("--top-k", type=int, default=10)
    add("--output", help="path of the results without suffix; default eval/results/consensus_<device>")
    add("--quick", action="store_true", help="little of everything, for a first look: runs/consensus_quick")
    args = full_or_quick(parser, FULL, QUICK)
    with exit_on_unusable_input():
        logging.disable_progress_bar()
        report(args)


def report(args: argparse.Namespace) -> None:
    """Samples every prompt and counts for every number of samples."""
    counts = integers("samples", args.samples)
    most = counts[-1]
    if any(most % count for count in counts):
        raise ValueError(f"samples: expected divisors of the largest, {most}, found {args.samples!r}")
    model = pardec.load(args.directory)
    options = {"split": args.split, "num_prompts": args.num_prompts, "max_prompt_tokens": None}
    prompts = [prompt.token_ids for prompt in read_prompts(args.prompts, model.tokenizer, **options)]
    texts = []
    for seed, prompt in enumerate(tqdm(prompts, unit="prompt")):
        law = {"temperature": args.temperature, "top_k": args.top_k, "seed": seed, "mode": "plain"}
        out = model.generate([prompt], max_new_tokens=args.max_new_tokens, num_return_sequences=most, **law)
        texts.append(out.token_ids)
    rows = [row_of(prompts, texts, count, args.copy_tokens) for count in counts]
    asked = ("prompts", "split", "max_new_tokens", "copy_tokens", "temperature", "top_k")
    facts = {"adapter": args.directory, "num_prompts": len(prompts), **{name: vars(args)[name] for name in asked}}
    result = {**facts, "samples_of_each": most, "rows": rows, **provenance(model.target.device)}
    write_page(result, output_stem("consensus", args.output, args.quick, model.target.device), markdown_of(result))
    print_tables([table_of(result)], NOTES, set())
    print(json.dumps(result))


def row_of(
    prompts: Sequence[list[int]], texts: Sequence[list[list[int]]], count: int, copy_tokens: int
) -> dict[str, Any]:
    """Figures where `count` samples of each prompt at a time look in each other's texts."""
    tokens, apart, together = (np.zeros(len(prompts)) for _ in range(3))
    for index, (prompt, samples) in enumerate(zip(prompts, texts, strict=True)):
        tokens[index] = sum(len(one) - 1 for one in samples)
        for start in range(0, len(samples), count):
            some = samples[start : start + count]
            apart[index] += sum(steps_of(prompt, some, copy_tokens, [[row] for row in range(count)]))
            together[index] += sum(steps_of(prompt, some, copy_tokens, sources_of([prompt] * count)))
    return {
        "samples": count,
        "tokens_per_step_apart": round(float(tokens.sum() / apart.sum()), 4),
        "tokens_per_step_together": round(float(tokens.sum() / together.sum()), 4),
        "gain": round(float(apart.sum() / together.sum()), 4),
        "gain_interval": ratio_interval(apart, together),
    }


def steps_of(prompt: list[int], texts: list[list[int]], copy_tokens: int, sources: list[list[int]]) -> list[int]:
    """Steps that each text takes behind prefill where all are decoded together and copies are verified alone."""
    ends, width = torch.tensor([len(prompt) + len(text) for text in texts]), len(prompt) + max(map(len, texts))
    ids = torch.tensor([[*prompt, *text, *[0] * (width - len(prompt) - len(text))] for text in texts])
    context, copier = begin_context(ids, width + copy_tokens + 1), Copier(copy_tokens, ids.device)
    # what stands behind a text is no token, so that no copy is that
    following = torch.where(torch.arange(width) < ends[:, None], ids, -1)
    following = torch.nn.functional.pad(following, (0, copy_tokens), value=-1)
    index, none = torch.arange(copy_tokens), torch.zeros_like(ends)
    lengths, steps = none + len(prompt) + 1, none
    while bool((lengths < ends).any()):
        found = copier.candidates(Texts(context, lengths, torch.tensor(sources)), lengths, none)
        truth = following.gather(1, (lengths[:, None] + index).clamp_max(following.shape[1] - 1))
        stands = (found.ids == truth) & (index < found.length[:, None])
        steps = steps + (lengths < ends)
        lengths = torch.minimum(lengths + 1 + stands.long().cumprod(dim=1).sum(dim=1), ends)
    return steps.tolist()


def table_of(result: dict[str, Any]) -> TextTable:
    """By number of samples."""
    law = f"temperature {result['temperature']}, top-k {result['top_k']}"
    many = f"{result['samples_of_each']} samples of each of {result['num_prompts']} prompts of {result['prompts']}"
    title = f"{result['adapter']}: {many}, {law}, {result['copy_tokens']} copied tokens"
    header = ("samples that look in each other's texts", "tokens per step, apart", "together", "gain")
    return TextTable(title, header, [_cells(row) for row in result["rows"]])


def _cells(row: dict[str, Any]) -> list[str]:
    low, high = row["gain_interval"]
    figures = [f"{row['tokens_per_step_apart']:.3f}", f"{row['tokens_per_step_together']:.3f}"]
    return [str(row["samples"]), *figures, f"{row['gain']:.3f} ({low:.3f}-{high:.3f})"]


def markdown_of(result: dict[str, Any]) -> str:
    """The page."""
    table = table_of(result)
    facts = f"{result['max_new_tokens']} new tokens, {result['device']}"
    parts = [f"{table.title}\n", table.markdown()]
    return markdown_page(result, "Samples of one prompt that copy from each other", facts, parts, NOTES)


if __name__ == "__main__":
    main()
