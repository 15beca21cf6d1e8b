"""Trains a LLaMA-architecture base model and its byte-level BPE tokenizer from scratch on Python sources.

    accelerate launch train/pretrain_base.py recipes/pretrain_tiny_python.yaml [section.key=value ...]

Also runs under plain python and torchrun. A run that was cut off continues when it is started again. With
several processes each holds the whole model. Legend: T tokens of a sequence.
"""

import hashlib
import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pardec.config.pretrain_recipe import PretrainRecipe
from pardec.config.recipe_files import recipe_of_command_line
from pardec.data.corpus import Corpus, pack
from pardec.data.pretrain_data import (
    SEPARATOR,
    SEPARATOR_ID,
    encode,
    example_order,
    held_out_windows,
    read_sources,
    train_tokenizer,
)
from pardec.data.python_sources import TEST, TRAIN, VALIDATION
from pardec.data.reading import DataError
from pardec.run import device_name, exit_on_unusable_input, git_commit, library_versions
from pardec.target.forward import embedding_weight
from pardec.training.checkpoints import load_state, read_progress, save_state, steps_done_before
from pardec.training.processes import JsonlTracker, make_accelerator

MODEL_FILE, CARD_FILE = "model.safetensors", "README.md"
IGNORED_LABEL = -100


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    with exit_on_unusable_input():
        pretrain(recipe_of_command_line(__doc__, PretrainRecipe))


def pretrain(recipe: PretrainRecipe) -> None:
    """The run, from recipe to a model folder in output_dir."""
    output, steps = Path(recipe.output_dir), recipe.train.steps
    first_step = steps_done_before(output, trained_by(recipe), MODEL_FILE, "a model")
    log = JsonlTracker(output / "metrics.jsonl", keep_until_step=first_step)
    accelerator = make_accelerator(recipe.train.mixed_precision, [log])
    if first_step == steps and (output / CARD_FILE).exists():
        accelerator.print(f"{output} already holds the model of this recipe, trained for all {steps} steps")
        return

    # text, tokenizer and tokens: everything that can be wrong with them is said before output_dir exists
    tokenizer, corpus, sizes = read_corpus(recipe, accelerator)
    windows = {
        VALIDATION: held_out_windows(corpus.validation, recipe.data.max_length, recipe.eval.max_tokens),
        TEST: held_out_windows(corpus.test, recipe.data.max_length, recipe.eval.max_tokens),
    }

    # what is learned, and what was learned before this run was cut off
    model = build_model(recipe).to(accelerator.device)  # type: ignore[arg-type]
    optimizers = build_optimizers(recipe, model)
    continued = {"recipe": trained_by(recipe), "digest": digest_of(corpus, tokenizer, accelerator)}
    restore(output, model, optimizers, continued["digest"])
    wrapped = accelerator.prepare(model)

    announce(recipe, accelerator, model, corpus, sizes, first_step)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("pardec", config={})
    loss_on = partial(held_out_loss, accelerator, batch_size=recipe.train.batch_size)
    run_steps(
        recipe,
        accelerator,
        wrapped,
        optimizers,
        corpus=corpus,
        first_step=first_step,
        measure=lambda: loss_on(model, windows[VALIDATION]),
        save=lambda step: checkpoint(output, accelerator, step, model, optimizers, continued),
    )

    # the weights that are measured are the ones that are saved
    bare = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    round_to_bfloat16(bare)
    measured = {split: loss_on(bare, windows[split]) for split in windows}
    accelerator.log({f"held_out_loss/{split}": loss for split, loss in measured.items()}, step=steps)
    if accelerator.is_main_process:
        rows = [(s, sizes["files"][s], sum(len(w) - 1 for w in windows[s]), measured[s]) for s in windows]
        export(output, bare, tokenizer, model_card(recipe, accelerator, bare, corpus, sizes, rows))
    accelerator.print(
        f"held-out loss {measured[VALIDATION]:.3f} (validation), {measured[TEST]:.3f} (test) nats per token; "
        f"the model is in {output}\n"
        f"try: accelerate launch train/train_adapter.py recipes/quickstart.yaml base={output}"
    )
    accelerator.end_training()


# ---------------------------------------------------------------------- the run and its folder


def trained_by(recipe: PretrainRecipe) -> dict:
    """The part of a recipe that a checkpoint depends on; the folder of the text may have moved."""
    parts = recipe.model_dump(include={"data", "tokenizer", "model", "train"})
    parts["data"]["path"] = without_folder(recipe.data.path)
    return parts


def checkpoint(
    output: Path, accelerator: Accelerator, step: int, model: PreTrainedModel, optimizers, continued: dict
) -> None:
    """What `restore` needs, written by one process."""
    if accelerator.is_main_process:
        save_state(output / "checkpoints", step, dict(model.named_parameters()), optimizers, continued)


def restore(output: Path, model: PreTrainedModel, optimizers: Sequence[Optimizer], digest: str) -> None:
    """Weights and optimisers of the newest checkpoint, if there is one.

    Raises:
        ValueError: if it was trained on other data.
    """
    progress = read_progress(output / "checkpoints")
    if progress is not None and progress["digest"] != digest:
        raise ValueError(
            f"output_dir {output}: expected the text and number of processes that its checkpoint was trained "
            "with, found others; choose another output_dir or remove it"
        )
    load_state(output / "checkpoints", dict(model.named_parameters()), optimizers)


def announce(
    recipe: PretrainRecipe,
    accelerator: Accelerator,
    model: PreTrainedModel,
    corpus: Corpus,
    sizes: dict,
    first_step: int,
) -> None:
    """Sizes and a memory estimate, before the first step allocates anything."""
    if not accelerator.is_main_process:
        return
    Path(recipe.output_dir).mkdir(parents=True, exist_ok=True)
    T, tokens = recipe.data.max_length, tokens_of_run(recipe, accelerator)
    # float32 weights, gradients and at most two moments; logits in float32 with their softmax and gradient
    weights_bytes = model.num_parameters() * 4 * 4
    logits_bytes = recipe.train.batch_size * T * model.config.vocab_size * 4 * 3
    print(
        f"{model.num_parameters():,} parameters; {sizes['files'][TRAIN]:,} files, "
        f"{len(corpus.train):,} sequences of {T} tokens; {tokens // recipe.train.steps:,} tokens per step, "
        f"{tokens / (len(corpus.train) * T):.2f} passes\n"
        f"memory: at least {(weights_bytes + logits_bytes) / 2**30:.1f} GiB per process for weights, "
        "optimisers and logits (less with a smaller train.batch_size)"
    )
    if first_step:
        print(f"continuing {recipe.output_dir} at step {first_step}")


# ---------------------------------------------------------------------- data


def read_corpus(recipe: PretrainRecipe, accelerator: Accelerator) -> tuple[Tokenizer, Corpus, dict]:
    """The tokenizer, trained by one process; the tokens; and how many files and characters they come from."""
    data, T, show = recipe.data, recipe.data.max_length, accelerator.is_main_process
    accelerator.print(f"reading {data.path}")
    texts = read_sources(data.path, seed=recipe.train.seed, max_characters=data.max_characters)
    serialised = [""]
    if accelerator.is_main_process:
        accelerator.print("training the tokenizer")
        trained = train_tokenizer(texts[TRAIN], recipe.tokenizer.vocab_size, show_progress=sys.stderr.isatty())
        serialised = [trained.to_str()]
    tokenizer = Tokenizer.from_str(broadcast_object_list(serialised)[0])
    if tokenizer.get_vocab_size() < recipe.tokenizer.vocab_size:
        raise DataError(
            f"tokenizer.vocab_size: expected at most {tokenizer.get_vocab_size()}, all that the text of "
            f"{data.path} gives, found {recipe.tokenizer.vocab_size}"
        )
    max_tokens = tokens_of_run(recipe, accelerator)
    documents = encode(texts[TRAIN], tokenizer, max_tokens=max_tokens, show_progress=show)
    train = pack(documents, T)
    if not train:
        raise DataError(f"{data.path}: expected at least {T} tokens (data.max_length) of text, found fewer")
    corpus = Corpus(train, encode(texts[VALIDATION], tokenizer), encode(texts[TEST], tokenizer))
    files = {TRAIN: len(documents), VALIDATION: len(corpus.validation), TEST: len(corpus.test)}
    return tokenizer, corpus, {"files": files, "characters": sum(map(len, texts[TRAIN][: len(documents)]))}


def tokens_of_run(recipe: PretrainRecipe, accelerator: Accelerator) -> int:
    """Tokens that all steps and processes train on together."""
    return math.prod(run_shape(recipe, accelerator)) * recipe.data.max_length


def run_shape(recipe: PretrainRecipe, accelerator: Accelerator) -> tuple[int, int, int, int]:
    """Steps, forwards per step, processes, sequences per forward."""
    train = recipe.train
    return train.steps, train.gradient_accumulation_steps, accelerator.num_processes, train.batch_size


def digest_of(corpus: Corpus, tokenizer: Tokenizer, accelerator: Accelerator) -> str:
    """What a checkpoint must be continued with: the tokens, their tokenizer and the number of processes."""
    digest = hashlib.sha256(f"{accelerator.num_processes} {tokenizer.to_str()}".encode())
    for sequence in corpus.train:
        digest.update(sequence.input_ids.tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------- model and steps


def build_model(recipe: PretrainRecipe) -> PreTrainedModel:
    """The model with random weights, the same in every process."""
    config = LlamaConfig(
        vocab_size=recipe.tokenizer.vocab_size,
        bos_token_id=SEPARATOR_ID,
        eos_token_id=SEPARATOR_ID,
        **recipe.model.model_dump(),
    )
    torch.manual_seed(recipe.train.seed)
    return LlamaForCausalLM(config).train()


def build_optimizers(recipe: PretrainRecipe, model: PreTrainedModel) -> list[Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest, as torch.optim.Muon's documentation asks.

    Source: https://kellerjordan.github.io/posts/muon/
    """
    outer = {embedding_weight(model), model.get_output_embeddings().weight}  # type: ignore[union-attr]
    matrices = [p for p in model.parameters() if p.ndim == 2 and p not in outer]
    rest = [p for p in model.parameters() if p.ndim != 2 or p in outer]
    return [
        Muon(matrices, lr=recipe.train.muon_learning_rate, weight_decay=recipe.train.weight_decay),
        AdamW(rest, lr=recipe.train.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def run_steps(
    recipe: PretrainRecipe,
    accelerator: Accelerator,
    wrapped: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    corpus: Corpus,
    first_step: int,
    measure: Callable[[], float],
    save: Callable[[int], None],
) -> None:
    """The steps after `first_step`, in an order of sequences that depends on nothing but the recipe."""
    train, losses = recipe.train, []
    order = example_order(len(corpus.train), run_shape(recipe, accelerator), train.seed)
    # closed by errors too, so that their line stands alone
    bar = tqdm(total=train.steps, initial=first_step, unit="step", disable=not accelerator.is_main_process)
    with bar as progress:
        for step in range(first_step + 1, train.steps + 1):
            share = set_rates(optimizers, step, train.steps, train.decay_share)
            mine = order[step - 1, :, accelerator.process_index]
            batches = np.stack([[corpus.train[i].input_ids for i in rows] for rows in mine]).astype(np.int64)
            losses.append(optimiser_step(recipe, accelerator, wrapped, optimizers, torch.from_numpy(batches), step))
            progress.update()
            if step % train.log_every == 0 or step == train.steps:
                loss = sum(losses) / len(losses)
                rates = {
                    "muon_learning_rate": share * train.muon_learning_rate,
                    "learning_rate": share * train.learning_rate,
                }
                accelerator.log({"loss": loss, **rates}, step=step)
                progress.set_postfix(loss=f"{loss:.3f}")
                losses.clear()
            if step % recipe.eval.every == 0 and step < train.steps:
                loss = measure()
                accelerator.log({"held_out_loss/validation": loss}, step=step)
                progress.write(f"step {step}: held-out loss {loss:.3f} nats per token (validation)")
            if step % train.checkpoint_every == 0 or step == train.steps:
                save(step)


def set_rates(optimizers: Sequence[Optimizer], step: int, steps: int, decay_share: float) -> float:
    """Sets the rates of step 1, 2, ...; returns their share of the full ones: constant, then linear to 0."""
    decay_steps = decay_share * steps
    share = min(1.0, (steps - step + 1) / decay_steps) if decay_steps else 1.0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group.setdefault("initial_lr", group["lr"])
    return share


def optimiser_step(
    recipe: PretrainRecipe,
    accelerator: Accelerator,
    wrapped: nn.Module,
    optimizers: Sequence[Optimizer],
    batches: Tensor,
    step: int,
) -> float:
    """One update from token ids of shape [forwards, batch, T]; returns the loss, in nats per token.

    Every sequence has T - 1 targets, so that the mean of means is the mean over the tokens of the step.
    """
    total = torch.zeros((), device=accelerator.device)
    for index, ids in enumerate(batches.to(accelerator.device)):
        is_last = index == len(batches) - 1
        with nullcontext() if is_last else accelerator.no_sync(wrapped):
            loss = wrapped(input_ids=ids, labels=ids, use_cache=False).loss / len(batches)
            accelerator.backward(loss)
        total += loss.detach()
    loss = float(accelerator.reduce(total, "mean"))  # type: ignore[arg-type]
    norm = float(nn.utils.clip_grad_norm_(wrapped.parameters(), recipe.train.max_grad_norm))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise ValueError(
            f"step {step}: expected a finite loss, found loss {loss} and gradient norm {norm}; lower "
            "train.muon_learning_rate or train.learning_rate"
        )
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss


@torch.no_grad()
def held_out_loss(
    accelerator: Accelerator, model: PreTrainedModel, windows: Sequence[Tensor], batch_size: int
) -> float:
    """Mean negative log-likelihood in nats per predicted token, over all processes."""
    mine = windows[accelerator.process_index :: accelerator.num_processes]
    nats, tokens = 0.0, 0
    for first in range(0, len(mine), batch_size):
        batch = list(mine[first : first + batch_size])
        labels = nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=IGNORED_LABEL)
        labels = labels.to(accelerator.device)
        # padding stands on the right, where no row that counts sees it
        logits = model(input_ids=labels.clamp_min(SEPARATOR_ID), use_cache=False).logits[:, :-1]
        losses = nn.functional.cross_entropy(
            logits.float().flatten(0, 1),
            labels[:, 1:].flatten(),
            ignore_index=IGNORED_LABEL,
            reduction="sum",
        )
        nats += float(losses)
        tokens += sum(len(window) - 1 for window in batch)
    sums = accelerator.reduce(torch.tensor([nats, tokens], device=accelerator.device), "sum")
    return float(sums[0] / sums[1])  # type: ignore[index]


# ---------------------------------------------------------------------- what is left behind


@torch.no_grad()
def round_to_bfloat16(model: PreTrainedModel) -> None:
    """Gives every weight the value that it will have in the file; computing stays in float32."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def export(output: Path, model: PreTrainedModel, tokenizer: Tokenizer, card: str) -> None:
    """Writes the model folder aside and renames file by file, the card last: where it is, all is."""
    aside = output / f".writing-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SEPARATOR,
        "eos_token": SEPARATOR,
        "model_max_length": model.config.max_position_embeddings,
    }
    try:
        model.to(torch.bfloat16).save_pretrained(aside)  # type: ignore[arg-type]
        tokenizer.save(str(aside / "tokenizer.json"))
        (aside / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        (aside / CARD_FILE).write_text(card)
        for file in sorted(aside.iterdir(), key=lambda file: file.name == CARD_FILE):
            os.replace(file, output / file.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def model_card(
    recipe: PretrainRecipe,
    accelerator: Accelerator,
    model: PreTrainedModel,
    corpus: Corpus,
    sizes: dict,
    rows: list[tuple[str, int, int, float]],
) -> str:
    """README.md: what the model is and how to make it again, without folders of this machine.

    `rows` are of the table of held-out losses: split, files, predicted tokens, nats per token.
    """
    T, tokens = recipe.data.max_length, tokens_of_run(recipe, accelerator)
    shareable = recipe.model_dump()
    shareable["data"]["path"] = without_folder(recipe.data.path)
    shareable["output_dir"] = without_folder(recipe.output_dir)
    command = shlex.join(without_folder(argument) for argument in [Path(sys.argv[0]).name, *sys.argv[1:]])
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    table = "\n".join(f"| {s} | {files:,} | {n:,} | {loss:.4f} |" for s, files, n, loss in rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {Path(recipe.output_dir).name}

A LLaMA-architecture causal language model of {model.num_parameters():,} parameters, trained from scratch on
Python sources by `train/pretrain_base.py` of pardec, stored in bfloat16. Byte-level BPE of
{model.config.vocab_size:,} tokens; token {SEPARATOR_ID} `{SEPARATOR}` stands before every file.

- Text: `{shareable["data"]["path"]}`, {sizes["files"][TRAIN]:,} training files,
  {sizes["characters"]:,} characters, {len(corpus.train) * T:,} tokens in sequences of {T}.
- Training: {recipe.train.steps:,} steps of {tokens // recipe.train.steps:,} tokens,
  {tokens / (len(corpus.train) * T):.2f} passes, mixed precision {accelerator.mixed_precision},
  {accelerator.num_processes} process(es) on {device_name(accelerator.device)}.
- Command: `{command}`
- Versions: {versions}; commit {git_commit() or "unknown"}.

Held-out loss of the stored weights: files are held out by the hash of their path (`split_of` in
`pardec/data/python_sources.py`), each read alone in windows of at most {T} tokens, every token but the first
predicted once.

| split | files | predicted tokens | nats per token |
|---|---:|---:|---:|
{table}

```yaml
{yaml.safe_dump(shareable, sort_keys=False).rstrip()}
```
"""


def without_folder(argument: str) -> str:
    """An argument with the folder of an absolute path in it left out."""
    key, equals, value = argument.rpartition("=")
    return key + equals + (Path(value).name if Path(value).expanduser().is_absolute() else value)


if __name__ == "__main__":
    main()
