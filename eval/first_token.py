"""How long does a call take to its first token, beside transformers' `generate`?

    python eval/first_token.py DIR [--prompt-tokens 16,64,256,1024] [--batch-sizes 1,4] [--repetitions 5]
    python eval/first_token.py DIR --quick

A call of one new token: the prompts' forward, with the mask tokens behind it where tokens are drafted, and all that a
call does beside it, such as looking whether weights have changed. On CUDA the prompts of up to 1,024 tokens together
are run by a graph; beside it stand calls in which nothing is captured. Prompts are random tokens, other ones in each
call. Prints a table, writes JSON and Markdown into eval/results; the last line is one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from reporting.result_files import output_stem, provenance, write_page
from reporting.text_tables import TextTable, markdown_page, number, print_tables
from timing.clock import quartiles
from timing.options import full_or_quick, integers
from tqdm.auto import tqdm
from transformers.utils import logging

import pardec
from pardec.model import SelfSpeculativeModel
from pardec.run import dtype_name, exit_on_unusable_input
from pardec.target.base import neutral_generation_config

FULL = {"prompt_tokens": "16,64,256,1024", "batch_sizes": "1,4", "repetitions": 5}
QUICK = {"prompt_tokens": "8,24", "batch_sizes": "1", "repetitions": 2}
GENERATE = "generate"
HEADER = ("prompts", "tokens of each", "way", "ms to the first token", "x generate")
NOTES = (
    "ms: median (lower to upper quartile) over calls, all ways in turn",
    "x generate: median of the ratios of transformers' milliseconds to these in the same round; more is faster",
)


@dataclass(frozen=True)
class Way:
    """A way to begin: its name, and what emits the first token behind each of some prompts."""

    name: str
    begin: Callable[[list[list[int]]], object]


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("directory", help="adapter, or its name")
    add("--base", help="base model, if not the one that the adapter names")
    add("--device", help="default CUDA where there is one")
    add("--dtype", help="default float32 on a CPU, the base's own on CUDA")
    add("--prompt-tokens", help=f"numbers with commas, default {FULL['prompt_tokens']}")
    add("--batch-sizes", help=f"prompts in a call, numbers with commas, default {FULL['batch_sizes']}")
    add("--repetitions", type=int, help=f"counted calls of each way, default {FULL['repetitions']}; two more warm up")
    add("--output", help="path of the results without suffix; default eval/results/first_token_<device>")
    add("--quick", action="store_true", help="short prompts: runs/first_token_quick")
    args = full_or_quick(parser, FULL, QUICK)
    with exit_on_unusable_input():
        report(args)


def report(args: argparse.Namespace) -> None:
    """The whole measurement."""
    lengths, sizes = integers("prompt_tokens", args.prompt_tokens), integers("batch_sizes", args.batch_sizes)
    if args.repetitions < 1:
        raise ValueError(f"repetitions: expected an integer >= 1, found {args.repetitions}")
    logging.disable_progress_bar()
    model = pardec.load(args.directory, base=args.base, device=args.device, dtype=args.dtype)
    for length in lengths:  # judged before anything is measured
        model.engines.check([[0] * length], 1, sizes[-1])
    assert model.adapter is not None
    base, ways, rows = args.base or model.adapter.metadata.base.name, ways_of(model), []
    with tqdm(total=len(lengths) * len(sizes) * len(ways) * (args.repetitions + 2), unit="call") as bar:
        for size in sizes:
            for length in lengths:
                rows += measured(model, ways, size, length, args.repetitions, bar.update)
    result: dict[str, Any] = {
        "adapter": args.directory,
        "base": base,
        "dtype": dtype_name(model.target.dtype),
        "threads": torch.get_num_threads(),
        "repetitions": args.repetitions,
        "rows": rows,
        **provenance(model.target.device),
    }
    table, facts = table_of(rows), f"{base}, {result['dtype']}, {result['device']}"
    page = markdown_page(result, "Milliseconds to the first token", facts, [table.markdown()], NOTES)
    write_page(result, output_stem("first_token", args.output, args.quick, model.target.device), page)
    print_tables([table], NOTES, ("way",))
    print(json.dumps(result))


def ways_of(model: SelfSpeculativeModel) -> list[Way]:
    """transformers' own, plain and fused; where these are captured, both also as they run without."""
    config = neutral_generation_config(model.base_model, stop_at_eos=False)
    config.max_new_tokens, config.do_sample = 1, False

    def generate(prompts: list[list[int]]) -> None:
        ids = torch.tensor(prompts, device=model.target.device)
        model.base_model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)  # type: ignore[operator]

    def ours(mode: str, capture: bool, prompts: list[list[int]]) -> None:
        captures, model.capture = model.capture, capture
        try:
            model.generate(prompts, max_new_tokens=1, mode=mode)
        finally:
            model.capture = captures

    ways = [Way(GENERATE, generate)]
    for mode in ("plain", "fused"):
        ways.append(Way(mode, partial(ours, mode, model.capture)))
        if model.capture:
            ways.append(Way(f"{mode}, not captured", partial(ours, mode, False)))
    return ways


def measured(
    model: SelfSpeculativeModel,
    ways: Sequence[Way],
    size: int,
    length: int,
    repetitions: int,
    on_call: Callable[[], object],
) -> list[dict[str, Any]]:
    """Rows of figures of all ways in turn, behind two rounds that capture and warm up."""
    generator, device = torch.Generator().manual_seed(length), model.target.device
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(repetitions + 2):
        prompts = torch.randint(model.target.vocab_size, (size, length), generator=generator).tolist()
        for way, mine in zip(ways, seconds, strict=True):
            mine.append(seconds_to_its_end(partial(way.begin, prompts), device))
            on_call()
    counted = [mine[2:] for mine in seconds]
    rows = []
    for way, mine in zip(ways, counted, strict=True):
        low, median, high = quartiles([1000 * one for one in mine])
        ratio = statistics.median(theirs / one for theirs, one in zip(counted[0], mine, strict=True))
        row = {"batch_size": size, "prompt_tokens": length, "way": way.name, "ms": round(median, 3)}
        rows.append(row | {"ms_quartiles": [round(low, 3), round(high, 3)], "ratio_to_generate": round(ratio, 4)})
    return rows


def seconds_to_its_end(work: Callable[[], object], device: torch.device) -> float:
    """By the wall's clock: what the host does beside the device is part of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def table_of(rows: Sequence[dict[str, Any]]) -> TextTable:
    """The table of all rows."""
    cells = [
        [
            str(row["batch_size"]),
            str(row["prompt_tokens"]),
            row["way"],
            f"{row['ms']:.2f} ({row['ms_quartiles'][0]:.2f}-{row['ms_quartiles'][1]:.2f})",
            number(row["ratio_to_generate"], 2),
        ]
        for row in rows
    ]
    return TextTable("milliseconds to the first token", HEADER, cells, has_sections=True)


if __name__ == "__main__":
    main()
