"""Which causal language models that transformers knows does pardec serve exactly, and which does it refuse?

    python eval/families.py [--families llama,mixtral] [--output runs/families]

Every family is made from a configuration, tiny and at random, saved in shards and loaded; an adapter with a LoRA on
all linear layers is trained for a few steps; then plain, two_pass and fused decoding, alone and in a ragged batch,
with the adapter's own drafts and with drafts of which most are right, are held against the base's own `generate`.
Prompts and continuations leave the windows of eight tokens. Prints a table and one JSON object as the last line. Exit
code 1 if a family neither works nor is refused with a reason, 0 otherwise; all families take three minutes.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matrix.family_check import NEW_TOKENS, PROMPT_LENGTHS, K, RefusedError, check_family, save_base
from matrix.tiny_configs import VARIANTS, WINDOW, layer_kinds
from reporting.result_files import provenance, write_json
from reporting.text_tables import TextTable, markdown_page, print_tables
from tqdm.auto import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from pardec.errors import first_line
from pardec.run import exit_on_unusable_input, written_aside

FAMILIES = (*sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), *VARIANTS)
SECONDS_FOR_ONE = 60


@dataclass(frozen=True)
class Row:
    """What came out for a family.

    Attributes:
        family: a model type, or one of `VARIANTS`.
        layers: kinds of its layers.
        result: `works`, `refused` or `fails`.
        reason: of a refusal or a failure, one line.
        num_lora_modules: layers with a LoRA; 0 where nothing was compared, as what follows.
        num_tokens: compared with `generate`, in all ways together.
        mean_acceptance_length: the least of the ways with planted drafts.
        batches: why several sequences at once are refused; empty where they are not.
    """

    family: str
    layers: str
    result: str
    reason: str = ""
    num_lora_modules: int = 0
    num_tokens: int = 0
    mean_acceptance_length: float = 0.0
    batches: str = ""


def check(family: str) -> Row:
    """Everything that is done with one family."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the tiny configurations, and PEFT's and torch's own
        layers = "unknown"
        try:
            layers = layer_kinds(family)
            with time_limit(SECONDS_FOR_ONE):
                save_base(family, Path(folder))
                compared = check_family(Path(folder))
        except RefusedError as error:
            return Row(family, layers, "refused", first_line(error).replace(f"base '{folder}': ", ""))
        except Exception as error:  # a traceback is what must not happen; here it is a line of the table
            return Row(family, layers, "fails", f"{type(error).__name__}: {first_line(error)}")
    return Row(family, layers, "works", **asdict(compared))


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Ends what runs inside by a TimeoutError when it takes longer."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"expected an end within {seconds} seconds, found none")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def table_of(rows: Sequence[Row]) -> TextTable:
    """A line for each family."""
    header = ("family", "layers", "result", "LoRA on", "tokens compared", "least acceptance, planted drafts")
    lines = []
    for row in rows:
        note = f", one sequence at a time: {row.batches}" if row.batches else ""
        result = row.result + (f": {row.reason}" if row.reason else note)
        figures = (str(row.num_lora_modules), str(row.num_tokens), f"{row.mean_acceptance_length:.2f}")
        lines.append([row.family, row.layers, result, *(figures if row.result == "works" else ("-", "-", "-"))])
    return TextTable("Families", header, lines)


def report(families: Sequence[str], stem: Path | None) -> bool:
    """Checks the families, prints and writes; whether none fails."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # models are tiny
    begin, rows = time.perf_counter(), []
    with tqdm(families, unit="family") as bar:
        for family in bar:
            bar.set_postfix_str(family)
            rows.append(check(family))
            if rows[-1].result == "fails":
                tqdm.write(f"{family}: {rows[-1].reason}", file=sys.stderr)
    counts = Counter(row.result for row in rows)
    result = {
        **provenance(torch.device("cpu")),
        "dtype": "float32",
        "num_speculative_tokens": K,
        "seconds": round(time.perf_counter() - begin),
        "counts": dict(counts),
        "rows": [asdict(row) for row in rows],
    }
    table = table_of(rows)
    summary = ", ".join(f"{counts[name]} {name}" for name in ("works", "refused", "fails"))
    print_tables([table], [summary], ("family", "layers", "result"), folded=("result", "layers"))
    if stem is not None:
        stem.parent.mkdir(parents=True, exist_ok=True)
        write_json(result, stem.with_suffix(".json"))
        facts = f"{summary}; {result['device']}, float32, commit {result['git_commit']}"
        with written_aside(stem.with_suffix(".md")) as aside:
            page = markdown_page(result, "Causal language models of transformers", facts, [table.markdown()], NOTES)
            aside.write_text(page, encoding="utf-8")
    print(json.dumps(result))
    return counts["fails"] == 0


NOTES = (
    "Each family is a tiny random model of four layers (fewer where its own code sets their number), saved in shards "
    "and loaded by `load_base`; refusals are its messages and those of the probe.",
    "`works`: PEFT's LoRA on all linear layers that read every row was trained for a few steps on two sequences; the "
    "gate gave the logits of PEFT's layers, and the decoder the drafts that training had; plain, two_pass and fused "
    f"decoding gave `generate`'s tokens for one prompt and a ragged batch of {len(PROMPT_LENGTHS)} (prompts of "
    f"{', '.join(map(str, PROMPT_LENGTHS))} tokens, {NEW_TOKENS} new ones, windows of {WINDOW} where there are any), "
    f"K = {K}, with the adapter's own drafts and with planted ones; the acceptance length is the least of the planted "
    "ways.",
    "A row with a note behind the model type is the same family otherwise configured.",
)


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", help="model types with commas between them; default all")
    parser.add_argument(
        "--output", help="path of the result files without suffix; default eval/results/families, nothing for some"
    )
    args = parser.parse_args()
    with exit_on_unusable_input():
        families = FAMILIES if args.families is None else args.families.split(",")
        unknown = [one for one in families if one not in FAMILIES]
        if unknown:
            raise ValueError(f"families: expected model types of causal language models, found {unknown[0]!r}")
        output = args.output or ("eval/results/families" if args.families is None else None)
        sys.exit(0 if report(families, None if output is None else Path(output)) else 1)


if __name__ == "__main__":
    main()
