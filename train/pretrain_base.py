"""Trains a LLaMA-architecture base model and its byte-level BPE tokenizer from scratch on Python sources.

    accelerate launch train/pretrain_base.py recipes/pretrain_tiny_python.yaml [section.key=value ...]

Also runs under plain python and torchrun. A run that was cut off continues when it is started again. With
several processes each holds the whole model. Legend: T tokens of a sequence.
"""

import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tokenizers import Tokenizer
from torch import nn
from torch.optim import Optimizer
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pardec.config.pretrain_recipe import PretrainRecipe
from pardec.config.recipe_files import recipe_of_command_line
from pardec.data.fitting import pack
from pardec.data.pretrain_data import (
    SEPARATOR_ID,
    PretrainCorpus,
    encode,
    example_order,
    held_out_windows,
    read_sources,
    train_tokenizer,
)
from pardec.data.python_sources import TEST, TRAIN, VALIDATION
from pardec.data.row_checks import DataError
from pardec.run import exit_on_unusable_input
from pardec.training.model_folder import CARD_FILE, MODEL_FILE, export, model_card, round_to_bfloat16, without_folder
from pardec.training.pretraining import (
    build_optimizers,
    held_out_loss,
    optimiser_step,
    pretraining_bytes,
    set_rates,
)
from pardec.training.running.checkpoints import check_same, load_state, save_state, steps_done_before
from pardec.training.running.processes import JsonlTracker, make_accelerator, run_in


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    with exit_on_unusable_input():
        pretrain(recipe_of_command_line(__doc__, PretrainRecipe))


def pretrain(recipe: PretrainRecipe) -> None:
    """The run, from recipe to a model folder in output_dir."""
    output, train, T = Path(recipe.output_dir), recipe.train, recipe.data.max_length
    first_step = steps_done_before(output, trained_by(recipe), MODEL_FILE, "a model")
    log = JsonlTracker(output / "metrics.jsonl", keep_until_step=first_step)
    accelerator = make_accelerator(train.mixed_precision, [log])
    if first_step == train.steps and (output / CARD_FILE).exists():
        accelerator.print(f"{output} already holds the model of this recipe, trained for all {train.steps} steps")
        return

    # text, tokenizer and tokens: everything that can be wrong with them is said before output_dir exists
    shape = (train.steps, train.gradient_accumulation_steps, accelerator.num_processes, train.batch_size)
    num_tokens = math.prod(shape) * T
    tokenizer, corpus, num_files, num_characters = read_corpus(recipe, accelerator, num_tokens)
    kept: dict[str, Any] = {"recipe": trained_by(recipe), "num_processes": accelerator.num_processes}
    kept["digest"] = digest_of(corpus, tokenizer, accelerator)
    check_same(output, kept)
    held_out = {VALIDATION: corpus.validation, TEST: corpus.test}
    windows = {split: held_out_windows(texts, T, recipe.eval.max_tokens) for split, texts in held_out.items()}

    # what is learned, and what was learned before this run was cut off
    model = build_model(recipe).to(accelerator.device)  # type: ignore[arg-type]
    optimizers = build_optimizers(model, train.muon_learning_rate, train.learning_rate, train.weight_decay)
    parameters = dict(model.named_parameters())
    load_state(output / "checkpoints", parameters, optimizers)
    wrapped = accelerator.prepare(model)

    sizes = sizes_of(recipe, model, len(corpus.train), num_files, num_tokens)
    with run_in(accelerator, recipe.output_dir, sizes, first_step):
        loss_on = partial(held_out_loss, accelerator, batch_size=train.batch_size)
        take_steps(
            recipe,
            accelerator,
            wrapped,
            optimizers,
            [document.input_ids for document in corpus.train],
            example_order(len(corpus.train), shape, train.seed),
            first_step,
            measure=lambda: loss_on(model, windows[VALIDATION]),
            save=lambda step: save_state(output / "checkpoints", step, parameters, optimizers, kept),
        )

        # the weights that are measured are the ones that are saved
        bare = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        round_to_bfloat16(bare)
        measured = {split: loss_on(bare, windows[split]) for split in windows}
        accelerator.log({f"held_out_loss/{split}": loss for split, loss in measured.items()}, step=train.steps)
        if accelerator.is_main_process:
            rows = [(s, len(held_out[s]), sum(len(w) - 1 for w in windows[s]), measured[s]) for s in windows]
            card = model_card(
                recipe.model_dump(), accelerator, bare, len(corpus.train), num_files, num_characters, num_tokens, rows
            )
            export(output, bare, tokenizer, card)
    accelerator.print(
        f"held-out loss {measured[VALIDATION]:.3f} (validation), {measured[TEST]:.3f} (test) nats per token; "
        f"the model is in {output}\n"
        f"try: accelerate launch train/train_adapter.py recipes/quickstart.yaml base={output} "
        f"output_dir=runs/quickstart_{output.name}"
    )
    accelerator.end_training()


# ---------------------------------------------------------------------- before the first step


def trained_by(recipe: PretrainRecipe) -> dict:
    """The part of a recipe that a checkpoint depends on; the folder of the text may have moved."""
    parts = recipe.model_dump(include={"data", "tokenizer", "model", "train"})
    parts["data"]["path"] = without_folder(recipe.data.path)
    return parts


def read_corpus(
    recipe: PretrainRecipe, accelerator: Accelerator, max_tokens: int
) -> tuple[Tokenizer, PretrainCorpus, int, int]:
    """The tokenizer, trained by one process; the tokens; how many files and characters those to learn come from."""
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
    documents = encode(texts[TRAIN], tokenizer, max_tokens=max_tokens, show_progress=show)
    train = pack(documents, T)
    if not train:
        raise DataError(f"{data.path}: expected at least {T} tokens (data.max_length) of text, found fewer")
    corpus = PretrainCorpus(train, encode(texts[VALIDATION], tokenizer), encode(texts[TEST], tokenizer))
    return tokenizer, corpus, len(documents), sum(map(len, texts[TRAIN][: len(documents)]))


def digest_of(corpus: PretrainCorpus, tokenizer: Tokenizer, accelerator: Accelerator) -> str:
    """What a checkpoint must be continued with: the tokens, their tokenizer and the number of processes."""
    digest = hashlib.sha256(f"{accelerator.num_processes} {tokenizer.to_str()}".encode())
    for sequence in corpus.train:
        digest.update(sequence.input_ids.tobytes())
    return digest.hexdigest()


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


def sizes_of(
    recipe: PretrainRecipe, model: PreTrainedModel, num_sequences: int, num_files: int, num_tokens: int
) -> str:
    """Sizes and a memory estimate."""
    T, num_parameters = recipe.data.max_length, model.num_parameters()
    memory = pretraining_bytes(num_parameters, recipe.train.batch_size * T, model.config.vocab_size)
    return (
        f"{num_parameters:,} parameters; {num_files:,} files, {num_sequences:,} sequences of {T} tokens; "
        f"{num_tokens // recipe.train.steps:,} tokens per step, {num_tokens / (num_sequences * T):.2f} passes\n"
        f"memory: at least {memory / 2**30:.1f} GiB per process for weights, "
        "optimisers and logits (less with a smaller train.batch_size)"
    )


# ---------------------------------------------------------------------- steps


def take_steps(
    recipe: PretrainRecipe,
    accelerator: Accelerator,
    wrapped: nn.Module,
    optimizers: Sequence[Optimizer],
    sequences: Sequence[np.ndarray],
    order: np.ndarray,
    first_step: int,
    *,
    measure: Callable[[], float],
    save: Callable[[int], None],
) -> None:
    """The steps after `first_step`, in the order of sequences that `order`, from `example_order`, has for them."""
    train, losses = recipe.train, []
    # closed by errors too, so that their line stands alone
    bar = tqdm(total=train.steps, initial=first_step, unit="step", disable=not accelerator.is_main_process)
    with bar as progress:
        for step in range(first_step + 1, train.steps + 1):
            is_last = step == train.steps
            share = set_rates(optimizers, step, train.steps, train.decay_share)
            mine = order[step - 1, :, accelerator.process_index]
            batches = np.stack([[sequences[i] for i in rows] for rows in mine]).astype(np.int64)
            ids = torch.from_numpy(batches)
            losses.append(optimiser_step(accelerator, wrapped, optimizers, ids, step, train.max_grad_norm))
            progress.update()
            if step % train.log_every == 0 or is_last:
                loss = sum(losses) / len(losses)
                rates = {
                    "muon_learning_rate": share * train.muon_learning_rate,
                    "learning_rate": share * train.learning_rate,
                }
                accelerator.log({"loss": loss, **rates}, step=step)
                progress.set_postfix(loss=f"{loss:.3f}")
                losses.clear()
            if step % recipe.eval.every == 0 and not is_last:
                loss = measure()
                accelerator.log({"held_out_loss/validation": loss}, step=step)
                progress.write(f"step {step}: held-out loss {loss:.3f} nats per token (validation)")
            if accelerator.is_main_process and (step % train.checkpoint_every == 0 or is_last):
                save(step)


if __name__ == "__main__":
    main()
