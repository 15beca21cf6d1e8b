"""Lets a chat model ask the questions that it was made for: prompts for train/generate_responses.py, without any data.

    python train/generate_questions.py smollm2-135m-instruct --output runs/responses/own_questions.jsonl

The model writes where its chat template lets the user speak (Magpie, arXiv:2406.08464). Rows have a `prompt`, as the
kind `questions` of `data.mix` reads it, none of them twice. A run that was cut off, or asked for fewer, continues when
it is started again, to the file that an uninterrupted one leaves.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers.utils import logging

from pardec.data.responses.own_questions import UserTurn, questions_of, user_turn
from pardec.data.responses.response_file import append_rows, only_writer, read_about, write_about
from pardec.decoding.probing.probe import probe
from pardec.model import SelfSpeculativeModel
from pardec.run import device_name, exit_on_unusable_input, library_versions
from pardec.target.base import eos_token_ids, load_base, load_tokenizer
from pardec.target.fingerprint import fingerprint

MAX_IN_VAIN = 20  # batches without a new question
# what the rows depend on
SETTINGS = ("base", "max_new_tokens", "temperature", "top_p", "seed", "dtype", "batch_size")


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="chat model: hub name, folder, GGUF file or smollm2-135m-instruct")
    parser.add_argument("--output", required=True, type=Path, help="JSONL file")
    parser.add_argument("--num-questions", type=int, default=400, help="default %(default)s")
    parser.add_argument(
        "--max-new-tokens", type=int, default=120, help="longer questions are left out; default %(default)s"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="default %(default)s")
    parser.add_argument("--top-p", type=float, default=0.95, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        help="questions asked together; a GPU has room for 256; default %(default)s",
    )
    parser.add_argument("--device", help="default CUDA where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default float32 on a CPU")
    with exit_on_unusable_input():
        ask(parser.parse_args())


def ask(args: argparse.Namespace) -> None:
    """The run, to a file of so many questions."""
    output: Path = args.output
    for option in ("num_questions", "batch_size"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option.replace('_', '-')}: expected an integer >= 1, found {getattr(args, option)}")
    if output.suffix != ".jsonl":
        raise ValueError(f"--output: expected a path that ends in .jsonl, found {output}")
    settings = {name: getattr(args, name) for name in SETTINGS}
    before = read_about(output, settings)
    model, turn = load_asker(args)
    assert model.tokenizer is not None
    about = {
        "recipe": settings,
        "fingerprint": fingerprint(model.base_model, model.tokenizer).model_dump(),
        "device": device_name(model.target.device),
        "versions": library_versions(),
    }
    if before is not None and before["fingerprint"] != about["fingerprint"]:
        raise ValueError(f"output {output}: its questions are another base's; choose another output or remove it")
    with only_writer(output), tqdm(total=args.num_questions, unit="question") as bar:
        before = read_about(output, settings)  # another run may have ended meanwhile
        write_about(output, about)
        rows = [] if before is None else whole_batches(output, args.num_questions)
        num_asked = continue_asking(args, model, turn, rows, bar)
    print(f"{num_asked:,} questions in {output}; as a source of responses: {{kind: questions, path: {output}}}")


def load_asker(args: argparse.Namespace) -> tuple[SelfSpeculativeModel, UserTurn]:
    """The frozen base, and where its template lets the user speak; refused before anything is written."""
    logging.disable_progress_bar()
    tokenizer = load_tokenizer(args.base)
    if tokenizer is None:
        raise ValueError(f"base {args.base!r}: expected a tokenizer beside the model, found none")
    turn = user_turn(tokenizer)
    model = SelfSpeculativeModel(load_base(args.base, device=args.device, dtype=args.dtype), tokenizer, None)
    probe(model.target)
    return model, turn


def continue_asking(
    args: argparse.Namespace, model: SelfSpeculativeModel, turn: UserTurn, rows: list[dict[str, Any]], bar: tqdm
) -> int:
    """Asks behind these rows until there are enough; returns how many."""
    assert model.tokenizer is not None
    seen, in_vain, ends = {row["prompt"] for row in rows}, 0, eos_token_ids(model.base_model)
    batch = rows[-1]["batch"] + 1 if rows else 0
    bar.update(len(seen))
    while len(seen) < args.num_questions:
        written = model.generate(
            [turn.input_ids] * args.batch_size,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed * 2**31 + batch,
            mode="plain",
        ).token_ids
        asked = dict.fromkeys(questions_of(written, turn, model.tokenizer, ends))
        new = [one for one in asked if one not in seen][: args.num_questions - len(seen)]
        in_vain = 0 if new else in_vain + 1
        if in_vain == MAX_IN_VAIN:
            raise ValueError(
                f"base {args.base!r}: expected new questions where its template lets the user speak, found none in "
                f"{MAX_IN_VAIN * args.batch_size} tries behind {len(seen)}"
            )
        append_rows(args.output, [{"prompt": one, "batch": batch} for one in new])
        seen.update(new)
        batch += 1
        bar.update(len(new))
    return len(seen)


def whole_batches(file: Path, num_questions: int) -> list[dict[str, Any]]:
    """Rows of an earlier run, all of them if there are so many; the file keeps these alone.

    Else its last batch, which may be short, is not among them, and is asked again.

    Raises:
        ValueError: for lines that no run has written.
    """
    lines = file.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    try:
        rows = [json.loads(line) for line in lines]
        end = rows[-1]["batch"] + (len(rows) >= num_questions) if rows else 0
        kept = [row for row in rows if row["batch"] < end and isinstance(row["prompt"], str)]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"output {file}: expected rows with prompt and batch, found others; remove it") from None
    os.truncate(file, sum(map(len, lines[: len(kept)])))
    return kept


if __name__ == "__main__":
    main()
