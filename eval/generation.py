"""How many tokens of responses does a second of CPU time bring, beside transformers' `generate` on the same batches?

    python eval/generation.py recipes/responses_smollm2.yaml [section.key=value ...] [--batch-sizes 16,64] [--quick]

Takes base, prompts, limit and law from a recipe of `train/generate_responses.py`. Every text ends with the base's own
EOS or at the limit. Each batch, prompts in the order in which they are drawn, is decoded plainly by pardec and, padded
on the left, by `generate` in the same dtype, in turn, so that pairs are neighbours in time; what is counted is the CPU
time of this process, prefill and sampling included, on one thread unless --threads says otherwise. Writes JSON and a
table into eval/results; the last line printed is one JSON object. Exit code 0.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from reporting.result_files import output_stem, provenance, write_json
from reporting.text_tables import TextTable, markdown_page, print_tables
from timing.clock import quartiles
from timing.options import full_or_quick, integers
from tqdm.auto import tqdm
from transformers.utils import logging

from pardec.config.recipe_files import load_recipe
from pardec.config.responses_recipe import ResponsesRecipe
from pardec.data.reading import training_rows
from pardec.data.responses.prompt_mix import draw_mix
from pardec.data.responses.response_prompts import draw_prompts
from pardec.model import SelfSpeculativeModel
from pardec.run import dtype_name, exit_on_unusable_input, written_aside
from pardec.target.base import eos_token_ids, load_base, load_tokenizer, neutral_generation_config, pad_token_id

FULL = {"batch_sizes": "16,64", "num_batches": 3, "max_prompts": 128}
QUICK = {"batch_sizes": "2", "num_batches": 1, "max_prompts": 2}
NOTES = (
    "tokens per CPU second: emitted tokens up to each text's own end, by CPU time of the process, summed over batches; "
    "ratio: median over pairs of calls on the same batch, quartiles in brackets",
    "same: greedy texts that are those of `generate` in that batch, where rounding with padding decides ties too",
)


@dataclass(frozen=True)
class Pair:
    """A batch decoded by pardec and by `generate`.

    Attributes:
        tokens: emitted by each.
        seconds: of CPU time that each took.
        num_same: texts that are the same.
    """

    tokens: tuple[int, int]
    seconds: tuple[float, float]
    num_same: int

    @property
    def ratio(self) -> float:
        """Of tokens per CPU second."""
        (ours, theirs), (our_seconds, their_seconds) = self.tokens, self.seconds
        return ours / our_seconds / (theirs / their_seconds)


class Subject:
    """One base, one limit, and texts by either way to decode."""

    def __init__(self, recipe: ResponsesRecipe):
        base = load_base(recipe.base, device="cpu", dtype=recipe.dtype)
        base.generation_config = neutral_generation_config(base, stop_at_eos=True)
        self.model = SelfSpeculativeModel(base, load_tokenizer(recipe.base), None)
        self.recipe = recipe

    def prompts(self, num_prompts: int) -> list[list[int]]:
        """Token ids of the recipe's first prompts."""
        recipe, limit = self.recipe, self.model.target.max_positions
        longest = None if limit is None else limit - recipe.max_new_tokens
        if self.model.tokenizer is None:
            raise ValueError(f"base {recipe.base!r}: expected a tokenizer beside the model, found none")
        common = {"num_prompts": num_prompts, "prompt_tokens": recipe.prompt_tokens, "max_prompt_tokens": longest}
        if recipe.data.mix is None:
            rows = training_rows(recipe.data.name, recipe.data.format, recipe.data.split, recipe.data.subset)
            where, tokenizer = recipe.data.name, self.model.tokenizer
            return draw_prompts(rows, tokenizer, **common, seed=recipe.seed, where=where, show_progress=False)
        sources = [section.source() for section in recipe.data.mix]
        options = {"follow_ups": 0.0, "seed": recipe.seed, "show_progress": False}
        return [prompt.input_ids for prompt in draw_mix(sources, self.model.tokenizer, **common, **options)[0]]

    def ours(self, batch: list[list[int]], sampled: bool) -> list[list[int]]:
        """Texts by pardec."""
        law = {"temperature": self.recipe.temperature if sampled else 0.0, "seed": 0 if sampled else None}
        filters = {name: getattr(self.recipe, name) for name in ("top_k", "top_p", "min_p")}
        limit = self.recipe.max_new_tokens
        return self.model.generate(batch, max_new_tokens=limit, mode="plain", **law, **filters).token_ids

    def theirs(self, batch: list[list[int]], sampled: bool) -> list[list[int]]:
        """Texts by `generate`."""
        base, width = self.model.base_model, max(map(len, batch))
        ids = torch.tensor([[pad_token_id(base)] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        law: dict[str, Any] = {"do_sample": sampled}
        if sampled:
            law |= {name: getattr(self.recipe, name) for name in ("temperature", "top_k", "top_p", "min_p")}
            law = {name: value for name, value in law.items() if value is not None}
            law.setdefault("top_k", 0)  # transformers' own default would keep 50
        limit = self.recipe.max_new_tokens
        out = base.generate(ids, attention_mask=mask, max_new_tokens=limit, **law)  # type: ignore[operator]
        ends = set(eos_token_ids(base))
        return [up_to_end(text, ends) for text in out[:, width:].tolist()]


def up_to_end(text: list[int], ends: set[int]) -> list[int]:
    """The tokens up to the first of `ends`, included."""
    return text[: next((n for n, token in enumerate(text, 1) if token in ends), len(text))]


def cpu_time(work: Callable[[], list[list[int]]]) -> tuple[list[list[int]], float]:
    """What `work` gives, and the CPU seconds that it takes."""
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


def pair_of(subject: Subject, batch: list[list[int]], sampled: bool, ours_first: bool) -> Pair:
    """One batch both ways, one right behind the other."""
    ways = (subject.ours, subject.theirs) if ours_first else (subject.theirs, subject.ours)
    timed = [cpu_time(lambda way=way: way(batch, sampled)) for way in ways]
    (ours, our_seconds), (theirs, their_seconds) = timed if ours_first else timed[::-1]
    tokens = sum(map(len, ours)), sum(map(len, theirs))
    same = sum(one == other for one, other in zip(ours, theirs, strict=True))
    return Pair(tokens, (our_seconds, their_seconds), same)


def row_of(setting: str, size: int, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Figures of a setting and batch size."""
    low, _, high = quartiles([pair.ratio for pair in pairs])
    rates = [sum(pair.tokens[way] for pair in pairs) / sum(pair.seconds[way] for pair in pairs) for way in (0, 1)]
    same = sum(pair.num_same for pair in pairs)
    return {
        "setting": setting,
        "batch_size": size,
        "tokens_per_cpu_second": round(rates[0], 2),
        "tokens_per_cpu_second_of_generate": round(rates[1], 2),
        "ratio": round(statistics.median(pair.ratio for pair in pairs), 4),
        "ratio_quartiles": [round(low, 4), round(high, 4)],
        "num_same": same if setting == "greedy" else None,
        "num_texts": size * len(pairs),
        "pairs": [asdict(pair) for pair in pairs],
    }


def table_of(rows: Sequence[dict[str, Any]]) -> TextTable:
    """As people read it."""
    header = ("setting", "batch", "texts", "tokens per CPU second", "of generate", "ratio", "same")
    cells = [
        [
            row["setting"],
            str(row["batch_size"]),
            str(row["num_texts"]),
            f"{row['tokens_per_cpu_second']:.1f}",
            f"{row['tokens_per_cpu_second_of_generate']:.1f}",
            f"{row['ratio']:.2f} ({row['ratio_quartiles'][0]:.2f}-{row['ratio_quartiles'][1]:.2f})",
            "-" if row["num_same"] is None else f"{row['num_same']} of {row['num_texts']}",
        ]
        for row in rows
    ]
    return TextTable("Generation of responses, tokens per second of CPU time", header, cells)


def report(args: argparse.Namespace) -> None:
    """The whole measurement."""
    logging.set_verbosity_error()
    for option in ("num_batches", "max_prompts", "threads"):
        if getattr(args, option) < 1:
            raise ValueError(f"{option}: expected an integer >= 1, found {getattr(args, option)}")
    sizes = integers("batch_sizes", args.batch_sizes)
    if sizes[-1] > args.max_prompts:
        raise ValueError(f"batch_sizes: expected at most {args.max_prompts}, max_prompts, found {sizes[-1]}")
    recipe = load_recipe(args.recipe, args.overrides, ResponsesRecipe)
    torch.set_num_threads(args.threads)
    subject = Subject(recipe)
    prompts = subject.prompts(min(args.max_prompts, sizes[-1] * args.num_batches))
    subject.model.generate(prompts[:2], max_new_tokens=2, mode="plain")  # packs weights, once for all calls
    settings = ["greedy", "sampled"] if recipe.temperature else ["greedy"]
    batches = {
        size: [prompts[n * size : (n + 1) * size] for n in range(min(args.num_batches, len(prompts) // size))]
        for size in sizes
    }
    rows = []
    with tqdm(total=len(settings) * sum(map(len, batches.values())), unit="pair") as bar:
        for size in sizes:
            for setting in settings:
                pairs = []
                for number, batch in enumerate(batches[size]):
                    pairs.append(pair_of(subject, batch, setting == "sampled", ours_first=number % 2 == 0))
                    bar.update()
                rows.append(row_of(setting, size, pairs))
    facts = {name: getattr(recipe, name) for name in ("base", "max_new_tokens", "temperature", "top_k")}
    facts |= {"prompt_tokens": [min(map(len, prompts)), max(map(len, prompts))], "threads": args.threads}
    device = torch.device("cpu")
    dtype = dtype_name(subject.model.target.dtype)
    write(
        output_stem("generation", args.output, args.quick, device),
        {"rows": rows, **facts, "dtype": dtype} | provenance(device),
    )


def write(stem, result: dict[str, Any]) -> None:
    """Prints the table and the line of JSON, and leaves both as files."""
    table = table_of(result["rows"])
    print_tables([table], NOTES, ("setting",))
    print(json.dumps(result))
    shortest, longest = result["prompt_tokens"]
    facts = (
        f"{result['device']}; {result['base']}, {result['dtype']}, prompts of "
        f"{shortest} to {longest} tokens, at most {result['max_new_tokens']} new ones"
    )
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, stem.with_name(stem.name + ".json"))
    with written_aside(stem.with_name(stem.name + ".md")) as aside:
        aside.write_text(markdown_page(result, "Generation of responses", facts, [table.markdown()], NOTES))


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("recipe", help="YAML file of train/generate_responses.py")
    add("overrides", nargs="*", metavar="section.key=value")
    add("--batch-sizes", help=f"numbers with commas, default {FULL['batch_sizes']}")
    add("--num-batches", type=int, help=f"pairs of calls for each setting and size, default {FULL['num_batches']}")
    add("--max-prompts", type=int, help=f"large sizes have fewer batches, default {FULL['max_prompts']}")
    add("--threads", type=int, default=1, help="of both ways, default 1")
    add("--output", help="path of the results without suffix; default eval/results/generation_cpu")
    add("--quick", action="store_true", help="one small batch, for a first look: runs/generation_quick")
    args = full_or_quick(parser, FULL, QUICK)
    with exit_on_unusable_input():
        report(args)


if __name__ == "__main__":
    main()
