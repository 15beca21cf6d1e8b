"""Which setting of a recipe gives the drafts that are accepted most?

    python eval/ablate.py eval/studies/objectives.yaml [--only NAME,NAME] [--set section.key=value ...] [--quick]

The variants of a study are trained one after another under one budget by train/train_adapter.py, and each adapter
decodes the same held-out prompts, greedily and sampled: how defaults of recipes are chosen. Everything is kept in
--work: what is done is not done again, what was cut off continues, and a variant whose settings have changed is
trained anew in a folder of its own. Settings are what recipes say: a base, a file of data or code that changed under
its name is not noticed (another --work then). A variant that fails does not stop the others. Writes a table, JSON and
a picture into eval/results; the last line printed is one JSON object.
Exit code 1 if a variant failed. The format of study files: eval/studies/study.py.
"""

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from reporting.result_files import output_stem, provenance
from studies.study import Study, Variant, load_study, shortened
from studies.study_rows import FAILED, rows_of
from studies.study_tables import print_results, write_results
from studies.variant_runs import alone, base_of, evaluate, is_trained, read_record, train
from tqdm.auto import tqdm
from transformers.utils import logging

from pardec.data.corpus import held_out_prompts
from pardec.run import exit_on_unusable_input
from pardec.target.base import load_tokenizer


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("study", help="YAML file")
    add("--only", help="names of variants, with commas; the table shows all that are done")
    add("--set", nargs="+", default=[], metavar="section.key=value", help="for all trained variants")
    add("--work", help="folder of adapters, logs and records; default runs/studies/<study>")
    add("--output", help="path of the results without suffix; default eval/results/study_<study>_<device>")
    add("--list", action="store_true", help="print variants and their commands, do nothing")
    add("--quick", action="store_true", help="few steps and prompts, for a first look: runs/study_*_quick")
    args = parser.parse_args()
    with exit_on_unusable_input():
        sys.exit(report(args))


def report(args: argparse.Namespace) -> int:
    """The whole study; returns the exit code."""
    logging.disable_progress_bar()
    study = load_study(args.study, args.set)
    if args.quick:
        study = shortened(study)
    work = Path(args.work or f"runs/studies/{study.name}{'_quick' if args.quick else ''}")
    chosen = chosen_variants(study, args.only)
    if args.list:
        list_variants(study, work)
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompts = prompts_by_base(study)
    failures = run_variants(study, chosen, work, prompts, device)
    rows = rows_of(study, work, prompts, device, failures)
    result = {"study": study.name, "rows": rows} | facts(study, prompts, device)
    write_results(result, output_stem(f"study_{study.name}", args.output, args.quick, device))
    print_results(result)
    print(json.dumps(result))
    names = {variant.name for variant in chosen}
    return int(any(row["status"] == FAILED and row["variant"] in names for row in rows))


def chosen_variants(study: Study, only: str | None) -> list[Variant]:
    """Those that `--only` names, in the order of the file; default all."""
    if only is None:
        return list(study.variants)
    known, asked = [variant.name for variant in study.variants], only.split(",")
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise ValueError(f"--only: expected some of {', '.join(known)}, found {unknown[0]!r}")
    return [variant for variant in study.variants if variant.name in asked]


def list_variants(study: Study, work: Path) -> None:
    """Prints how each variant is trained."""
    for variant in study.variants:
        done = is_trained(read_record(variant, work), variant, work)
        made = f"adapter {variant.adapter}" if variant.adapter else shlex.join(["python", *variant.command(work)])
        print(f"{variant.name}{' (trained)' if done else ''}: {made}")


def prompts_by_base(study: Study) -> dict[str, list[list[int]]]:
    """The held-out prompts, by name of the base, whose tokenizer they go through."""
    prompts = {}
    for base in dict.fromkeys(map(base_of, study.variants)):
        tokenizer = load_tokenizer(base)
        if tokenizer is None:
            raise ValueError(f"base {base!r}: expected a tokenizer beside the model, found none")
        evaluation = study.evaluation
        prompts[base] = held_out_prompts(tokenizer, evaluation.split, evaluation.data, evaluation.num_prompts)
    return prompts


def run_variants(
    study: Study,
    chosen: Sequence[Variant],
    work: Path,
    prompts: dict[str, list[list[int]]],
    device: torch.device,
) -> dict[str, str]:
    """Trains and evaluates what is left of the chosen variants; by name, why some could not be evaluated."""
    failures = {}
    # the lower line, only on a terminal: what the variant at work says
    with tqdm(chosen, unit="variant") as bar, tqdm(bar_format="{desc}", disable=None, leave=False) as line:

        def show(text: str) -> None:
            line.set_description_str(text[:110])

        for variant in bar:
            bar.set_description(variant.name)
            with alone(variant, work) as lock:
                record = read_record(variant, work)
                if not is_trained(record, variant, work):
                    record = train(variant, work, lock, show)
                    said = record["training"]["reason"] or "trained"
                    bar.write(f"{variant.name}: {said} after {record['training']['seconds']:.0f} s", file=sys.stderr)
                if is_trained(record, variant, work):
                    try:
                        evaluate(variant, work, study.evaluation, prompts[base_of(variant)], device, show)
                    except (ValueError, OSError, RuntimeError) as error:
                        failures[variant.name] = " ".join(f"error: {error}".split())
                        bar.write(f"{variant.name}: {failures[variant.name]}", file=sys.stderr)
    return failures


def facts(study: Study, prompts: dict[str, list[list[int]]], device: torch.device) -> dict:
    """What the rows depend on."""
    return {
        "evaluation": study.evaluation.model_dump(),
        "budget": study.budget.model_dump(),
        "num_prompts": min(map(len, prompts.values())),
        "base": list(prompts),
        "data_sha256": digests_of_files(study),
        **provenance(device),
    }


def digests_of_files(study: Study) -> dict[str, str]:
    """Of the files that variants are trained on, by path; folders, packages and what is not there are left out."""
    paths = [Path(variant.recipe.data.path) for variant in study.variants if variant.recipe is not None]
    files = [path for path in dict.fromkeys(paths) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    main()
