"""What do adapters accept, for how many CPU minutes of training, beside what was aimed at and what could be reached?

    python eval/acceptance_targets.py runs/quickstart_embeddings runs/quickstart [--floor FILE.json ...]

Decodes held-out prompts with each adapter, sampled and greedily, one with a sampler head also without it. Beside it
stand the aims for the packaged base, and the most that any draft could reach which sees as much: what eval/floor.py has
found for the same base, split, law and number of drafted tokens. Writes a table and JSON into
eval/results; the last line printed is one JSON object. Exit code 0.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reporting.result_files import output_stem, provenance, write_page
from reporting.text_tables import TextTable, markdown_page, number, print_tables
from timing.options import full_or_quick
from tqdm.auto import tqdm
from transformers.utils import logging

import pardec
from pardec.adapters.adapter import Adapter
from pardec.adapters.files import load_adapter
from pardec.data.corpus import held_out_prompts
from pardec.data.python_sources import STDLIB, TEST, VALIDATION
from pardec.measures.acceptance import Acceptance, digest, measure_acceptance
from pardec.model import SelfSpeculativeModel
from pardec.run import exit_on_unusable_input

PACKAGED = "tiny-python"
FULL = {"num_prompts": 64, "max_new_tokens": 128}
QUICK = {"num_prompts": 2, "max_new_tokens": 8}
EMBEDDINGS, LORA, HEAD = "mask embeddings", "LoRA", "LoRA and head"


@dataclass(frozen=True)
class Aim:
    """Mean acceptance lengths to be reached on the packaged base, and the CPU minutes of training for it."""

    sampled: float | None
    greedy: float | None
    cpu_minutes: int | None


AIMS = {EMBEDDINGS: Aim(1.33, None, 6), LORA: Aim(2.3, 2.4, 78), HEAD: Aim(2.7, 2.9, 89)}
# what floor.py measures for drafts that see as much
FLOORS = {EMBEDDINGS: "blind", LORA: "blind", HEAD: "behind_one"}
HEADER = (
    "adapter", "drafts by", "K", "CPU minutes", "sampled", "greedy", "greedy outside repetition", "aim: sampled",
    "greedy outside repetition", "CPU minutes", "floor, sampled", "share of it",
)  # fmt: skip
NOTES = (
    "sampled, greedy: mean acceptance length, bonus token included, 95 % interval over prompts; greedy figures of "
    "small models are flattered by loops, so the second of them counts only what lies outside exact repetition",
    "CPU minutes: of training, up to the step that was kept, with its own measurements; of a run that went on from "
    "another adapter, those of both; where a head was trained beside a LoRA, of both parts in both rows",
    "floor: the largest mean acceptance length that K drafts could have which see no token between, with a head the "
    "one before; an estimate, on average too large; share: of the accepted drafts in it; neither has an interval",
)


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("adapters", nargs="+", help="directories, of one base")
    add("--floor", nargs="+", default=[], metavar="FILE.json", help="what eval/floor.py has written")
    add("--split", default=TEST, choices=(VALIDATION, TEST), help="of python-stdlib")
    add("--num-prompts", type=int, help=f"default {FULL['num_prompts']}")
    add("--max-new-tokens", type=int, help=f"default {FULL['max_new_tokens']}")
    add("--temperature", type=float, default=0.8)
    add("--top-k", type=int, default=10, help="0 for the whole vocabulary")
    add("--seed", type=int, default=0)
    add("--output", help="path of the results without suffix; default eval/results/acceptance_targets_<device>")
    add("--quick", action="store_true", help="little of everything, for a first look: runs/acceptance_targets_quick")
    args = full_or_quick(parser, FULL, QUICK)
    with exit_on_unusable_input():
        logging.disable_progress_bar()
        report(args)


def report(args: argparse.Namespace) -> None:
    """Measures every adapter on the same prompts and writes what was found."""
    law = {"temperature": args.temperature, "top_k": args.top_k or None}
    floors = [read_floor(path, args.split, law) for path in args.floor]
    rows, prompts, base = [], [], None
    for directory in args.adapters:
        model = pardec.load(directory)
        adapter = model.adapter
        assert adapter is not None
        if model.tokenizer is None:
            raise ValueError(f"{directory}: expected a tokenizer beside its base, found none")
        if not rows:
            base = adapter.metadata.base.name
            prompts = held_out_prompts(model.tokenizer, args.split, num_prompts=args.num_prompts)
        elif adapter.metadata.base.name != base:
            found = adapter.metadata.base.name
            raise ValueError(f"{directory}: expected an adapter of {base}, as the first one is, found one of {found}")
        for use_head in [False, True] if adapter.head is not None else [False]:
            row = row_of(directory, adapter, use_head=use_head)
            settings = {"max_new_tokens": args.max_new_tokens, "seed": args.seed}
            row |= measured(model, prompts, law, settings, row, use_head=use_head)
            rows.append(row | floor_of(row, floors, base))
        device = model.target.device
    settings = {name: vars(args)[name] for name in ("split", "max_new_tokens", "seed")}
    facts = {"base": base, "num_prompts": len(prompts), "prompts_sha256": digest(prompts), **settings, **law}
    result = {**facts, "rows": rows, **provenance(device)}
    facts_told = f"{title_of(result)}, {result['device']}"
    page = markdown_page(
        result, "What is accepted, aimed at and possible", facts_told, [table_of(result).markdown()], NOTES
    )
    write_page(result, output_stem("acceptance_targets", args.output, args.quick, device), page)
    print_tables([table_of(result)], NOTES, {"adapter", "drafts by"})
    print(json.dumps(result))


def read_floor(path: str, split: str, law: dict[str, Any]) -> dict[str, Any]:
    """A result of eval/floor.py.

    Raises:
        ValueError: if there is none, or it is of another split or law.
    """
    if not Path(path).is_file():
        raise ValueError(f"--floor: expected a file that eval/floor.py has written, found nothing at {path}")
    found = json.loads(Path(path).read_text())
    if "num_futures" not in found:
        raise ValueError(f"--floor: expected a file that eval/floor.py has written, found another at {path}")
    expected = {"data": STDLIB, "split": split, **law}
    for key, value in expected.items():
        if found[key] != value:
            raise ValueError(f"--floor: {path}: expected {key} {value}, as adapters are measured, found {found[key]}")
    return found


def row_of(directory: str, adapter: Adapter, *, use_head: bool) -> dict[str, Any]:
    """What an adapter is."""
    parts = HEAD if use_head else EMBEDDINGS if adapter.lora is None else LORA
    aim = AIMS[parts] if adapter.metadata.base.name == PACKAGED else Aim(None, None, None)
    return {
        "adapter": Path(directory).name,
        "parts": parts,
        "num_speculative_tokens": adapter.metadata.num_speculative_tokens,
        "cpu_minutes": training_minutes(directory),
        "aim": {"sampled": aim.sampled, "greedy_outside_repetition": aim.greedy, "cpu_minutes": aim.cpu_minutes},
    }


def training_minutes(directory: str | Path) -> float | None:
    """CPU minutes of its training and of what it went on from; None where they were not kept, or that is not here.

    What it went on from is looked for from here and beside it, as its recipe named it from where it was started, and
    told by its files: runs are made anew in folders of the same name.
    """
    training = load_adapter(directory).metadata.training
    source, before = training.get("recipe", {}).get("adapter", {}).get("start_from"), 0.0
    if source is not None:
        folders = (Path(source), Path(directory).resolve().parent / Path(source).name)
        files, there = training.get("started_from"), [folder for folder in folders if folder.is_dir()]
        same = (folder for folder in there if load_adapter(folder).metadata.files == files)
        before = next(map(training_minutes, same), None)
    own = training.get("cpu_minutes")
    return None if before is None or own is None else round(before + own, 2)


def measured(
    model: SelfSpeculativeModel,
    prompts: list[list[int]],
    law: dict[str, Any],
    settings: dict[str, Any],
    row: dict[str, Any],
    *,
    use_head: bool,
) -> dict[str, Any]:
    """Acceptance, sampled and greedy."""
    options = {**settings, "num_speculative_tokens": row["num_speculative_tokens"]}
    # asked for only where there is one to leave out or to take
    options |= {} if model.adapter is None or model.adapter.head is None else {"use_head": use_head}
    with tqdm(total=2 * len(prompts), unit="prompt", desc=f"{row['adapter']}, {row['parts']}") as bar:
        sampled = measure_acceptance(model, prompts, on_batch=bar.update, **law, **options)
        greedy = measure_acceptance(model, prompts, on_batch=bar.update, **options)
    return {"sampled": figures(sampled), "greedy": figures(greedy)}


def figures(found: Acceptance) -> dict[str, Any]:
    """As results keep them, with (accepted tokens, drafts) of each prompt for whoever compares."""
    return {**found.to_dict(), "pairs": found.pairs, "outside_pairs": found.outside_pairs}


def floor_of(row: dict[str, Any], floors: list[dict[str, Any]], base: str | None) -> dict[str, Any]:
    """The floor of a row's base, parts and K, if it was measured, and how much of it is reached."""
    K, name = row["num_speculative_tokens"], FLOORS[row["parts"]]
    ours = [one for floor in floors if floor["base"] == base for one in floor["rows"] if len(one[name]["mean"]) == K]
    if not ours:
        return {"floor": None, "share": None}
    most = ours[0][name]["mean_acceptance_length"]
    return {"floor": most, "share": round((row["sampled"]["mean_acceptance_length"] - 1) / (most - 1), 4)}


def title_of(result: dict[str, Any]) -> str:
    """What the rows have in common."""
    law = f"temperature {result['temperature']}" + (f", top-k {result['top_k']}" if result["top_k"] else "")
    return (
        f"{result['base']}: {result['num_prompts']} prompts of python-stdlib ({result['split']}), "
        f"{result['max_new_tokens']} new tokens, sampled at {law}"
    )


def table_of(result: dict[str, Any]) -> TextTable:
    """By adapter."""
    return TextTable(title_of(result), HEADER, [cells_of(row) for row in result["rows"]], has_sections=True)


def cells_of(row: dict[str, Any]) -> list[str]:
    """A row as text, in the order of `HEADER`."""
    sampled, greedy, aim = row["sampled"], row["greedy"], row["aim"]
    cells = [row["adapter"], row["parts"], str(row["num_speculative_tokens"]), number(row["cpu_minutes"], 1)]
    cells += [_with_interval(one["mean_acceptance_length"], one["interval"]) for one in (sampled, greedy)]
    cells.append(_with_interval(greedy["outside_repetition"], greedy["outside_interval"]))
    cells += [number(aim["sampled"], 2), number(aim["greedy_outside_repetition"], 2), number(aim["cpu_minutes"], 0)]
    share = "-" if row["share"] is None else f"{row['share']:.0%}"
    return [*cells, number(row["floor"], 2), share]


def _with_interval(value: float | None, interval: list[float] | None) -> str:
    if value is None or interval is None:
        return "-"
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


if __name__ == "__main__":
    main()
