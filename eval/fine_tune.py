"""A fine-tune such as a user makes of a base overnight, for studies of what becomes of its adapter.

    python eval/fine_tune.py tiny-python --data python-packages --output runs/tiny_python_tuned [--steps 150]

Every weight is trained on plain text by AdamW at a constant rate behind a warm-up. What is left is a folder like that
of any model, which `eval/studies/transfer.yaml` takes as a base. Prints one JSON object as the last line. Exit code 0.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from reporting.result_files import provenance
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import trange
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from pardec.data.fitting import pack
from pardec.data.python_sources import TRAIN, python_sources, source_folder
from pardec.data.tokenising import tokenise
from pardec.run import exit_on_unusable_input
from pardec.target.base import load_base, load_tokenizer

WARMUP_STEPS = 20


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("base", help="folder or name")
    add("--data", default="python-packages", help="text file, python-stdlib or python-packages")
    add("--output", required=True, help="folder of the model that is made; must not exist")
    add("--steps", type=int, default=150)
    add("--batch-size", type=int, default=8)
    add("--max-length", type=int, default=256, help="tokens of a sequence")
    add("--learning-rate", type=float, default=5e-4)
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    with exit_on_unusable_input():
        logging.disable_progress_bar()
        print(json.dumps(fine_tune(args)))


def fine_tune(args: argparse.Namespace) -> dict:
    """Trains and saves; returns what was done."""
    output = Path(args.output)
    if output.exists():
        raise ValueError(f"--output {output}: expected a folder that is not there yet, found one")
    base, tokenizer = load_base(args.base), load_tokenizer(args.base)
    if tokenizer is None:
        raise ValueError(f"base {args.base!r}: expected a tokenizer beside the model, found none")
    sequences = sequences_of(args, tokenizer)
    order = np.random.default_rng(args.seed).permutation(len(sequences))
    base.requires_grad_(True)
    optimizer = AdamW(base.parameters(), lr=args.learning_rate, weight_decay=0.0)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    losses = []
    for step in (bar := trange(args.steps, unit="step")):
        chosen = [order[(step * args.batch_size + i) % len(order)] for i in range(args.batch_size)]
        ids = torch.from_numpy(np.stack([sequences[i] for i in chosen]).astype(np.int64)).to(base.device)
        loss = base(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(base.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    base.requires_grad_(False).save_pretrained(output)
    tokenizer.save_pretrained(output)
    tenth = max(1, args.steps // 10)
    ends = {"first": sum(losses[:tenth]) / tenth, "last": sum(losses[-tenth:]) / tenth}
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    return {**settings, "loss": {name: round(value, 3) for name, value in ends.items()}, **provenance(base.device)}


def sequences_of(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """Token ids of training sequences, no more than the steps take."""
    folder = source_folder(args.data)
    texts = [Path(args.data).read_text()] if folder is None else list(python_sources(folder, TRAIN))
    documents, wanted, held = [], args.steps * args.batch_size * args.max_length, 0
    for index in np.random.default_rng(args.seed).permutation(len(texts)):
        if held >= wanted:
            break
        documents += tokenise({"text": texts[index]}, tokenizer, args.data)
        held += len(documents[-1].input_ids)
    sequences = [one.input_ids for one in pack(documents, args.max_length)]
    if not sequences:
        raise ValueError(f"--data {args.data}: expected at least {args.max_length} tokens, found {held}")
    return sequences


if __name__ == "__main__":
    main()
