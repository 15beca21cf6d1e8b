"""What do samples of one prompt bring each other that copy from each other, beside samples that copy from themselves?

    python eval/consensus.py DIR [--samples 4,8] [--copy-tokens 8] [--num-speculative-tokens 0] [--prompts FILE]

Every prompt is sampled as often either way, in batches of one size: together with the others of its prompt, which look
in each other's texts, or with those of other prompts, which have nothing in common. Both take turns. Writes a table and
JSON into eval/results; the last line printed is one JSON object. Exit code 0.
"""

import argparse
import json
from typing import Any

import numpy as np
from reporting.result_files import output_stem, provenance, write_page
from reporting.text_tables import TextTable, markdown_page, print_tables
from timing.clock import quartiles
from timing.options import add_prompt_options, full_or_quick, integers
from tqdm.auto import tqdm
from transformers.utils import logging

import pardec
from pardec.data.benchmarks import read_prompts
from pardec.decoding.stats import DecodeStats
from pardec.model import SelfSpeculativeModel
from pardec.run import exit_on_unusable_input

FULL = {"num_prompts": 16, "samples": "4,8", "max_new_tokens": 128}
QUICK = {"num_prompts": 2, "samples": "2", "max_new_tokens": 12}
BOOTSTRAP_SAMPLES = 2000
NOTES = (
    "tokens per step: emitted / steps of the sequences, prefill aside, sums over sums",
    "gain: their ratio, with its 95 % interval by bootstrap over prompts",
    "x apart: tokens/s together over tokens/s apart, of batches of one size that followed each other, median (lower-"
    "upper quartile); prefill included, which together is of one prompt",
)


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("directory", help="of an adapter")
    add_prompt_options(parser)
    add("--num-prompts", type=int, help=f"default {FULL['num_prompts']}")
    add("--samples", help=f"of each prompt, numbers with commas that divide the prompts, default {FULL['samples']}")
    add("--max-new-tokens", type=int, help=f"default {FULL['max_new_tokens']}")
    add("--copy-tokens", type=int, default=8)
    add("--num-speculative-tokens", type=int, default=0, help="drafted before the copies")
    add("--temperature", type=float, default=0.8)
    add("--top-k", type=int, default=10)
    add("--output", help="path of the results without suffix; default eval/results/consensus_<device>")
    add("--quick", action="store_true", help="little of everything, for a first look: runs/consensus_quick")
    args = full_or_quick(parser, FULL, QUICK)
    with exit_on_unusable_input():
        logging.disable_progress_bar()
        report(args)


def report(args: argparse.Namespace) -> None:
    """Measures every number of samples and writes what was found."""
    counts = integers("samples", args.samples)
    model = pardec.load(args.directory)
    options = {"split": args.split, "num_prompts": args.num_prompts, "max_prompt_tokens": None}
    prompts = [prompt.token_ids for prompt in read_prompts(args.prompts, model.tokenizer, **options)]
    for count in counts:
        if len(prompts) % count:
            raise ValueError(f"samples: expected divisors of {len(prompts)}, the number of prompts, found {count}")
    with tqdm(total=2 * len(prompts) * len(counts), unit="call") as bar:
        rows = [row_of(model, prompts, count, args, bar) for count in counts]
    asked = (
        "prompts",
        "split",
        "max_new_tokens",
        "copy_tokens",
        "num_speculative_tokens",
        "temperature",
        "top_k",
    )
    facts = {"adapter": args.directory, "num_prompts": len(prompts), **{name: vars(args)[name] for name in asked}}
    result = {**facts, "rows": rows, **provenance(model.target.device)}
    write_page(result, output_stem("consensus", args.output, args.quick, model.target.device), markdown_of(result))
    print_tables([table_of(result)], NOTES, set())
    print(json.dumps(result))


def row_of(
    model: SelfSpeculativeModel, prompts: list[list[int]], count: int, args: argparse.Namespace, bar: tqdm
) -> dict[str, Any]:
    """`count` samples of every prompt, together and apart."""
    size, figures = len(prompts), {"together": np.zeros((len(prompts), 2)), "apart": np.zeros((len(prompts), 2))}
    speeds: list[float] = []
    # apart: neighbours in turn, each with as many samples in all
    batches = [[(start + i) % size for i in range(count)] for start in range(0, size, count) for _ in range(count)]
    for seed in range(size):
        pair = {}
        for way, mine in (("together", [seed] * count), ("apart", batches[seed]))[:: -1 if seed % 2 else 1]:
            repeats = count if way == "together" else 1
            out = model.generate(
                [prompts[n] for n in mine[::repeats]],
                num_return_sequences=repeats,
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                top_k=args.top_k,
                seed=seed,
                mode="fused",
                num_speculative_tokens=args.num_speculative_tokens,
                copy_tokens=args.copy_tokens,
            )
            for prompt, one in zip(mine, out.stats.sequences, strict=True):
                figures[way][prompt] += tokens_and_steps(one)
            pair[way] = out.stats.tokens_per_second
            bar.update()
        speeds.append(pair["together"] / pair["apart"])
    low, median, high = quartiles(speeds)
    together, apart = figures["together"], figures["apart"]
    return {
        "samples": count,
        "tokens_per_step_apart": round(float(apart[:, 0].sum() / apart[:, 1].sum()), 4),
        "tokens_per_step_together": round(float(together[:, 0].sum() / together[:, 1].sum()), 4),
        "gain": round(float(gain(together, apart, np.arange(size)[None])[0]), 4),
        "gain_interval": gain_interval(together, apart),
        "speed_ratio": round(median, 4),
        "speed_ratio_quartiles": [round(low, 4), round(high, 4)],
    }


def tokens_and_steps(one: DecodeStats) -> np.ndarray:
    """Of one sequence, without the token of prefill."""
    return np.array([one.num_new_tokens - 1, one.num_steps], dtype=float)


def gain(together: np.ndarray, apart: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Ratio of tokens per step for each draw of prompts, shape [n, prompts]; figures of shape [prompts, 2]."""
    (tokens, steps), (others, taken) = (figures[draws].sum(axis=1).T for figures in (together, apart))
    return tokens / steps / (others / taken)


def gain_interval(together: np.ndarray, apart: np.ndarray) -> list[float]:
    """95 % over prompts."""
    draws = np.random.default_rng(0).integers(len(together), size=(BOOTSTRAP_SAMPLES, len(together)))
    return [round(float(x), 4) for x in np.percentile(gain(together, apart, draws), [2.5, 97.5])]


def table_of(result: dict[str, Any]) -> TextTable:
    """By number of samples."""
    law = f"temperature {result['temperature']}, top-k {result['top_k']}"
    ways = f"{result['num_speculative_tokens']} drafted, {result['copy_tokens']} copied tokens"
    title = f"{result['adapter']}: {result['num_prompts']} prompts of {result['prompts']}, {law}, {ways}"
    header = ("samples of a prompt", "tokens per step, apart", "together", "gain", "x apart")
    return TextTable(title, header, [_cells(row) for row in result["rows"]])


def _cells(row: dict[str, Any]) -> list[str]:
    (low, high), (lower, upper) = row["gain_interval"], row["speed_ratio_quartiles"]
    return [
        str(row["samples"]),
        f"{row['tokens_per_step_apart']:.3f}",
        f"{row['tokens_per_step_together']:.3f}",
        f"{row['gain']:.3f} ({low:.3f}-{high:.3f})",
        f"{row['speed_ratio']:.2f} ({lower:.2f}-{upper:.2f})",
    ]


def markdown_of(result: dict[str, Any]) -> str:
    """The page."""
    table = table_of(result)
    facts = f"{result['max_new_tokens']} new tokens, {result['device']}"
    parts = [f"{table.title}\n", table.markdown()]
    return markdown_page(result, "Samples of one prompt that copy from each other", facts, parts, NOTES)


if __name__ == "__main__":
    main()
