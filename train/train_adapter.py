"""Learns mask embeddings, and where the recipe asks for them a gated LoRA and a sampler head, for a frozen model.

    accelerate launch train/train_adapter.py recipes/quickstart.yaml [section.key=value ...]

Also runs under plain python and torchrun. A run that was cut off continues when it is started again.
"""

import gc
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from pardec.adapters.adapter import Adapter, AdapterMetadata, BaseReference, HeadShape
from pardec.adapters.files import METADATA_FILE, load_adapter, save_adapter
from pardec.adapters.gated_lora import inject_lora, lora_weights
from pardec.config.adapter_recipe import Recipe
from pardec.config.recipe_files import recipe_of_command_line
from pardec.data.corpus import AnchoredSequences, Corpus, collate, load_corpus, standard_prompts
from pardec.decoding.probe import probe
from pardec.layout import nested_block_lengths
from pardec.measures.held_out import measure_held_out
from pardec.model import SelfSpeculativeModel
from pardec.run import (
    command_line,
    device_name,
    exit_on_unusable_input,
    git_commit,
    library_versions,
)
from pardec.target.base import load_base, load_tokenizer
from pardec.target.fingerprint import Fingerprint, fingerprint
from pardec.target.forward import TargetModel, embedding_weight, position_limit
from pardec.training.checkpoints import load_state, read_progress, save_state, steps_done_before
from pardec.training.curve import redraw_curve
from pardec.training.module import METRICS, Drafter, MaskTokenTrainer, Objective, part_of
from pardec.training.processes import JsonlTracker, make_accelerator
from pardec.training.warm_start import warm_start


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    with exit_on_unusable_input():
        train(recipe_of_command_line(__doc__, Recipe))


def train(recipe: Recipe) -> None:
    """The run, from recipe to the best adapter in output_dir."""
    output, steps = Path(recipe.output_dir), recipe.train.steps
    checkpoints = output / "checkpoints"
    first_step = steps_done_before(output, trained_by(recipe), METADATA_FILE, "an adapter")
    log = JsonlTracker(output / "metrics.jsonl", keep_until_step=first_step)
    accelerator = make_accelerator(recipe.train.mixed_precision, [log, *recipe.train.trackers], output)
    if first_step == steps:
        accelerator.print(f"{output} already holds the adapter of this recipe, trained for all {steps} steps")
        return

    # the frozen base, the proof on it that mask rows cannot disturb real ones, and the data:
    # everything that can be wrong with them is said before output_dir exists
    base, tokenizer = load_target(recipe, accelerator)
    identity = fingerprint(base, tokenizer)
    global_batch = recipe.train.batch_size * recipe.train.gradient_accumulation_steps * accelerator.num_processes
    corpus = read_corpus(recipe, tokenizer, accelerator, max_sequences=steps * global_batch)
    prompts = standard_prompts(corpus.validation, num_prompts=recipe.eval.num_prompts)
    check_sizes(recipe, base, corpus, prompts)

    # what is learned, and what was learned before this run was cut off
    module, peft_model, started_from = begin_module(recipe, base, identity)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(recipe, parameters)
    state = load_state(checkpoints, parameters, [optimizer]) or {"best": 0.0, "started_from": started_from}
    check_source(recipe, state, started_from)
    best = state["best"]
    schedule = make_schedule(recipe, optimizer, first_step)
    loader = make_loader(recipe, corpus, first_step, global_batch)
    wrapped, optimizer, loader = accelerator.prepare(module, optimizer, loader)

    announce(recipe, accelerator, module.target, parameters, corpus, prompts, first_step)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("pardec", config={})
    adapter_at = partial(current_adapter, recipe, accelerator, module, peft_model, identity, started_from)
    kept = {"recipe": trained_by(recipe), "started_from": started_from}
    progress = tqdm(total=steps, initial=first_step, unit="step", disable=not accelerator.is_main_process)
    batches, sums = iter(loader), no_sums(recipe, accelerator)
    for step in range(first_step, steps + 1):
        if step > first_step:
            micro_batches = [next(batches) for _ in range(recipe.train.gradient_accumulation_steps)]
            new, norm = optimiser_step(recipe, accelerator, wrapped, parameters, optimizer, micro_batches, step)
            sums += new
            schedule.step()
            progress.update()
            if step % recipe.train.log_every == 0 or step == steps:
                log_losses(accelerator, step, sums, norm, schedule.get_last_lr(), progress)
                sums.zero_()
        is_last = step == steps
        if accelerator.is_main_process and step == 0 and read_progress(checkpoints) is None:
            # a run that is killed before its first checkpoint is one to continue, too
            save_state(checkpoints, step, parameters, [optimizer], {"best": best, **kept})
        measured_before = 0 < step == first_step
        if accelerator.is_main_process and not measured_before and (step % recipe.eval.every == 0 or is_last):
            module.forget_prefix()
            measured = measure(recipe, accelerator, base, tokenizer, adapter_at(step, {}), prompts, step, progress)
            if measured["sampled"]["mean_acceptance_length"] > best:
                best = measured["sampled"]["mean_acceptance_length"]
                save_adapter(adapter_at(step, measured), output)
        accelerator.wait_for_everyone()
        is_due = step % recipe.train.checkpoint_every == 0 or is_last
        if accelerator.is_main_process and step > first_step and is_due:
            save_state(checkpoints, step, parameters, [optimizer], {"best": best, **kept})
    progress.close()
    accelerator.end_training()
    report(accelerator, best, output)


def report(accelerator: Accelerator, best: float, output: Path) -> None:
    """What came of the run, and what to do with it."""
    accelerator.print(
        f"best mean acceptance length {best:.3f} (validation, sampled); the adapter is in {output}\n"
        f"try: pardec generate {output} --compare --prompt 'def main():'"
    )


def make_schedule(recipe: Recipe, optimizer, first_step: int):
    """Linear warm-up and cosine decay, at the step where the run goes on."""
    warmup, steps = recipe.train.warmup_steps, recipe.train.steps
    schedule = get_cosine_schedule_with_warmup(optimizer, min(warmup, steps // 2), steps)
    for _ in range(first_step):
        schedule.step()
    return schedule


def make_loader(recipe: Recipe, corpus: Corpus, first_step: int, global_batch: int) -> DataLoader:
    """The examples that are still to come, in the order that every run of this recipe has."""
    total = recipe.train.steps * global_batch
    examples = AnchoredSequences(corpus.train, total, recipe.train.anchors_per_sequence, recipe.train.seed)
    rest = Subset(examples, range(first_step * global_batch, total))
    return DataLoader(rest, batch_size=recipe.train.batch_size, collate_fn=collate)


def trained_by(recipe: Recipe) -> dict:
    """The part of a recipe that a checkpoint depends on."""
    return recipe.model_dump(include={"base", "data", "adapter", "train"})


def begin_module(recipe: Recipe, base, identity: Fingerprint):
    """The training module and PEFT's view of the base with their first numbers; files of the adapter they are of."""
    module, peft_model = build_module(recipe, base)
    if recipe.adapter.start_from is None:
        return module, peft_model, None
    source = load_adapter(recipe.adapter.start_from)
    warm_start(module, peft_model, source, identity, recipe.train.frozen)
    return module, peft_model, source.metadata.files


def check_source(recipe: Recipe, state: dict, started_from: dict[str, str] | None) -> None:
    """Refuses to continue a run on another adapter than it began with: its frozen parts are read from there."""
    if state.get("started_from") != started_from:
        raise ValueError(
            f"adapter.start_from {recipe.adapter.start_from}: expected the adapter that this run began with, found "
            "another; choose another output_dir or remove it"
        )


def load_target(recipe: Recipe, accelerator: Accelerator):
    """Base and tokenizer, refused if this recipe cannot be trained exactly on them."""
    tokenizer = load_tokenizer(recipe.base)
    base = load_base(recipe.base, device=accelerator.device)
    if tokenizer is None:
        raise ValueError(f"base {recipe.base!r}: expected a tokenizer beside the model, found none")
    target = TargetModel.wrap(base)
    probe(target)
    limit, length = target.max_positions, recipe.data.max_length
    if limit is not None and length > limit:
        raise ValueError(f"data.max_length: expected at most {limit}, the positions of the base, found {length}")
    return base, tokenizer


def read_corpus(recipe: Recipe, tokenizer, accelerator: Accelerator, max_sequences: int) -> Corpus:
    """The data, read by the main process first, so that a cache is written once."""
    data = recipe.data
    accelerator.print(f"reading {data.path}")
    with accelerator.main_process_first():
        return load_corpus(
            data.path,
            tokenizer,
            format=data.format,
            subset=data.subset,
            split=data.split,
            validation_path=data.validation_path,
            test_path=data.test_path,
            max_length=data.max_length,
            max_tokens=max_sequences * data.max_length,
            seed=recipe.train.seed,
            show_progress=accelerator.is_main_process,
        )


def check_sizes(recipe: Recipe, base, corpus: Corpus, prompts: list[list[int]]) -> None:
    """Refuses data that the base has no embeddings or no positions for."""
    rows, limit = embedding_weight(base).shape[0], position_limit(base)
    largest = max(int(document.input_ids.max()) for document in (*corpus.train, *corpus.validation))
    if largest >= rows:
        raise ValueError(f"{recipe.data.path}: expected token ids below {rows}, those of the base, found {largest}")
    longest = max(map(len, prompts))
    if limit is not None and longest + recipe.eval.max_new_tokens > limit:
        raise ValueError(
            f"eval.max_new_tokens: expected at most {limit - longest} behind validation prompts of up to {longest} "
            f"tokens, as the base has {limit} positions, found {recipe.eval.max_new_tokens}"
        )


def build_module(recipe: Recipe, base):
    """The training module around the base, and PEFT's view of the base if there is a LoRA."""
    adapter, peft_model = recipe.adapter, None
    torch.manual_seed(recipe.train.seed)  # the first halves of LoRA and head start at random
    if adapter.lora is not None:
        lora = adapter.lora
        peft_model = inject_lora(base, r=lora.r, alpha=lora.alpha, target_modules=lora.target_modules)
    drafter = Drafter(
        adapter.num_speculative_tokens,
        mask_sharing=adapter.mask_sharing,
        draft_input=adapter.draft_input,
        initialisation=adapter.mask_initialisation,
        has_lora=adapter.lora is not None,
        head_width=0 if adapter.head is None else adapter.head.width,
        joint_head=adapter.head is not None and adapter.head.joint,
    )
    train = recipe.train
    objective = Objective(train.objective, recipe.position_weights(), train.temperature, train.top_k)
    return MaskTokenTrainer(
        base, drafter, objective, keep_ratio=train.keep.ratio, keep_floor=train.keep.floor
    ), peft_model


def build_optimizer(recipe: Recipe, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """AdamW with a learning rate each for the mask embeddings, the LoRA and the sampler head."""
    rates = {
        "mask_embeddings": recipe.train.learning_rate,
        "lora": recipe.train.lora_learning_rate,
        "head": recipe.train.head_learning_rate,
    }
    groups = [{"params": [p for n, p in parameters.items() if part_of(n) == part], "lr": rates[part]} for part in rates]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)


def no_sums(recipe: Recipe, accelerator: Accelerator) -> Tensor:
    """Zeros for what `optimiser_step` adds up, shape [9, K]."""
    return torch.zeros(len(METRICS) + 2, recipe.adapter.num_speculative_tokens, device=accelerator.device)


def optimiser_step(
    recipe: Recipe, accelerator: Accelerator, wrapped, parameters: Mapping[str, Tensor], optimizer, batches, step: int
) -> tuple[Tensor, float]:
    """One update; returns sums and the gradient's norm before it was clipped.

    The sums are those of `METRICS` per position, and below them loss and rows of all: shape [9, K].

    Losses are summed over every target of the step, and gradients divided by their global number, so that neither
    accumulation nor the number of processes changes the update.
    """
    # noise at mask rows is drawn anew in every step and process, and again where a run is continued
    torch.manual_seed((recipe.train.seed * 1_000_003 + step) * accelerator.num_processes + accelerator.process_index)
    N = recipe.train.anchors_per_sequence
    part = recipe.train.anchors_per_forward or N
    chunks = [(batch, first) for batch in batches for first in range(0, N, part)]
    totals = no_sums(recipe, accelerator)
    for index, (batch, first) in enumerate(chunks):
        is_last = index == len(chunks) - 1
        with nullcontext() if is_last else accelerator.no_sync(wrapped):
            logged = step % recipe.train.log_every == 0 or step == recipe.train.steps
            loss_sum, count, metrics = wrapped(**batch, first_anchor=first, num_anchors=part, with_metrics=logged)
            accelerator.backward(loss_sum)
        totals[:-2] += metrics if logged else 0
        totals[-2] += loss_sum.detach()
        totals[-1] += count
    totals = cast(Tensor, accelerator.reduce(totals, "sum"))
    for parameter in parameters.values():
        if parameter.grad is not None:  # a distributed backward has averaged over processes
            parameter.grad *= accelerator.num_processes / totals[-1, 0].clamp_min(1)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), recipe.train.max_grad_norm))
    loss = float(totals[-2, 0] / totals[-1, 0].clamp_min(1))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise ValueError(
            f"step {step}: expected a finite loss, found loss {loss} and gradient norm {norm}; lower "
            "train.learning_rate or train.lora_learning_rate; the best adapter so far is kept"
        )
    optimizer.step()
    optimizer.zero_grad()
    return totals, norm


def log_losses(
    accelerator: Accelerator, step: int, sums: Tensor, norm: float, rates: Sequence[float | Tensor], progress
) -> None:
    """Loss since the last call; teacher-forced agreement and overlap per position, of the steps that are logged."""
    rows: dict[str, Tensor] = dict(zip(METRICS, sums[:-2], strict=True))
    loss = float(sums[-2, 0] / sums[-1, 0].clamp_min(1))
    minutes = time.process_time() / 60
    values = {"loss": loss, "gradient_norm": norm, "learning_rate": rates[0], "cpu_minutes": minutes}
    names = {"argmax_agreement": "agreement", "overlap": "overlap"}
    if bool(rows["head_overlap"].any()):
        names |= {"head_argmax_agreement": "head_agreement", "head_overlap": "head_overlap"}
    values |= {name: (rows[metric] / rows["rows"].clamp_min(1)).tolist() for name, metric in names.items()}
    accelerator.log(values, step=step)
    progress.set_postfix(loss=f"{loss:.3f}")


def measure(
    recipe: Recipe, accelerator: Accelerator, base, tokenizer, adapter: Adapter, prompts, step: int, progress
) -> dict:
    """Acceptance of the real decoder on validation prompts, sampled and greedy; a picture of it in output_dir."""
    model = SelfSpeculativeModel(base, tokenizer, adapter)
    found = measure_held_out(
        model,
        prompts,
        max_new_tokens=recipe.eval.max_new_tokens,
        temperature=recipe.eval.temperature,
        top_k=recipe.eval.top_k,
        seed=recipe.train.seed,
    )
    del model
    gc.collect()  # its graphs and caches are for the next steps to use
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    accelerator.log(found.to_log(), step=step)
    redraw_curve(Path(recipe.output_dir) / "metrics.jsonl", Path(recipe.output_dir) / "training.png")
    progress.write(
        f"step {step}: mean acceptance length {found.sampled.mean_acceptance_length:.3f} sampled, "
        f"{found.greedy.mean_acceptance_length:.3f} greedy (validation, bonus token included)"
    )
    return {"split": "validation", **found.to_dict()}


def current_adapter(
    recipe: Recipe,
    accelerator: Accelerator,
    module: MaskTokenTrainer,
    peft_model,
    identity: Fingerprint,
    started_from: dict[str, str] | None,
    step: int,
    measured: dict,
) -> Adapter:
    """A copy of what is learned so far, with its provenance."""
    head = recipe.adapter.head
    metadata = AdapterMetadata(
        num_speculative_tokens=recipe.adapter.num_speculative_tokens,
        mask_sharing=recipe.adapter.mask_sharing,
        draft_input=recipe.adapter.draft_input,
        head=None if head is None else HeadShape(width=head.width, shortlist=head.shortlist),
        base=BaseReference(name=recipe.base, revision=getattr(module.target.base.config, "_commit_hash", None)),
        fingerprint=identity,
        training={
            "recipe": recipe.model_dump(),
            "started_from": started_from,
            "command": command_line(),
            "git_commit": git_commit(),
            "versions": library_versions(),
            "device": device_name(accelerator.device),
            "num_processes": accelerator.num_processes,
            "step": step,
            "cpu_minutes": round(time.process_time() / 60, 2),
        },
        measured=measured,
    )
    masks, lora = module.mask_embeddings, None if peft_model is None else lora_weights(peft_model)
    weights = None if module.head is None else {n: _copied(p) for n, p in module.head.named_parameters()}
    return Adapter(None if masks is None else _copied(masks), metadata, lora, weights)


def _copied(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)


def announce(
    recipe: Recipe,
    accelerator: Accelerator,
    target: TargetModel,
    parameters: Mapping[str, Tensor],
    corpus: Corpus,
    prompts,
    first_step: int,
) -> None:
    """Sizes and a memory estimate, before the first step allocates anything."""
    if not accelerator.is_main_process:
        return
    Path(recipe.output_dir).mkdir(parents=True, exist_ok=True)
    weights = sum(p.numel() * p.element_size() for p in target.base.parameters())
    rows, N = recipe.train.batch_size * recipe.data.max_length, recipe.train.anchors_per_sequence
    part, K = recipe.train.anchors_per_forward or N, recipe.adapter.num_speculative_tokens
    all_rows, mask_rows = (
        recipe.train.batch_size * sum(nested_block_lengths(n, K, recipe.train.keep.ratio, recipe.train.keep.floor))
        for n in (N, min(part, N))
    )
    # the target's law of all mask rows, about three times while it is made; logits of those of a forward about six
    # times in float32 with their gradients
    logits = (3 * all_rows + 6 * mask_rows) * target.vocab_size * 4
    hidden = getattr(target.base.config.get_text_config(decoder=True), "hidden_size", target.embedding_dim)
    activations = mask_rows * target.num_layers * hidden * 24 * 4
    learned = sum(p.numel() for p in parameters.values())
    print(
        f"base {recipe.base}: {weights / 2**20:,.0f} MiB; learned: {learned:,} numbers; "
        f"{len(corpus.train):,} sequences; {len(prompts)} validation prompts\n"
        f"per forward: {rows:,} real rows, {mask_rows:,} mask rows; "
        f"memory estimate {(weights + logits + activations) / 2**30:.1f} GiB per process "
        "(less with fewer train.anchors_per_forward)"
    )
    if target.device.type == "cpu" and accelerator.num_processes * torch.get_num_threads() < (os.cpu_count() or 1):
        print(
            f"{torch.get_num_threads()} of {os.cpu_count()} processors in use; "
            f"accelerate launch --num_cpu_threads_per_process {os.cpu_count()} uses all"
        )
    if first_step:
        print(f"continuing {recipe.output_dir} at step {first_step}")


if __name__ == "__main__":
    main()
