"""Learns mask embeddings, and where the recipe asks for them a gated LoRA and a sampler head, for a frozen model.

    accelerate launch train/train_adapter.py recipes/quickstart.yaml [section.key=value ...]

Also runs under plain python and torchrun. A run that was cut off continues when it is started again, by any number
of processes that makes the same steps; SIGTERM and SIGUSR1 let it finish a step, save, and exit with code 75.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from pardec.adapters.files import METADATA_FILE, load_adapter
from pardec.config.adapter_recipe import DataConfig, Recipe
from pardec.config.recipe_files import recipe_of_command_line
from pardec.data.corpus import Corpus, load_corpus, prompts_with_room
from pardec.data.examples import AnchoredSequences, collate, collate_used
from pardec.data.fitting import told_long
from pardec.data.tokenising import check_token_ids
from pardec.decoding.probing.probe import probe
from pardec.measures.examiner import Examiner
from pardec.run import exit_on_unusable_input
from pardec.target.base import load_base, load_tokenizer
from pardec.target.fingerprint import Fingerprint, fingerprint
from pardec.target.forward import TargetModel, embedding_weight
from pardec.target.sharding import held_bytes, load_sharded_base, running_bytes
from pardec.training.checkpoints import check_same, load_state, read_progress, save_state, steps_done_before
from pardec.training.launch import idle_processors, launch_told
from pardec.training.memory import check_fits, free_bytes, learned_bytes, measure_step
from pardec.training.module import MaskTokenTrainer
from pardec.training.peft_lora import inject_lora
from pardec.training.processes import (
    STOPPED,
    JsonlTracker,
    any_process,
    as_steps_run_it,
    begin_run,
    make_accelerator,
    refuse_other_state,
    stop_signals,
)
from pardec.training.steps import Learner, build_optimizer, depth_at, losses_of, make_schedule
from pardec.training.warm_start import check_source, warm_start


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    with exit_on_unusable_input():
        train(recipe_of_command_line(__doc__, Recipe))


def train(recipe: Recipe) -> None:
    """The run, from recipe to the best adapter in output_dir."""
    output, train = Path(recipe.output_dir), recipe.train
    accelerator, first_step = start(recipe)
    if first_step == train.steps:
        accelerator.print(f"{output} already holds the adapter of this recipe, trained for all {train.steps} steps")
        return

    global_batch = train.batch_size * train.gradient_accumulation_steps * accelerator.num_processes
    data: dict[str, Any] = {"global_batch": global_batch}  # a step's examples depend on it, not on who runs which
    check_same(output, data)
    accelerator.print(launch_of(recipe, accelerator))

    # the frozen base, the proof on it that mask rows cannot disturb real ones, and the data:
    # everything that can be wrong with them is said before output_dir exists
    target, tokenizer = load_target(recipe, accelerator)
    identity = fingerprint(target.base, tokenizer)
    corpus, prompts = read_data(recipe, target, tokenizer, accelerator)
    data["data_sha256"] = corpus.digest()
    check_same(output, data)

    # what is learned, and what was learned before this run was cut off
    module, peft_model, origin = begin_module(recipe, target.base, identity)
    learned = {name: p for name, p in module.named_parameters() if p.requires_grad}
    rates = {"mask_embeddings": train.learning_rate, "lora": train.lora_learning_rate, "head": train.head_learning_rate}
    optimizer = build_optimizer(learned, rates)
    source = origin["started_from"]
    checkpoints, kept = output / "checkpoints", {"recipe": recipe.of_checkpoints(), "started_from": source, **data}
    state = load_state(checkpoints, learned, [optimizer]) or {"best": 0.0, "measured": None, **kept}
    check_source(recipe.adapter.start_from, state.get("started_from"), source)
    schedule = make_schedule(optimizer, train.warmup_steps, train.steps, first_step)
    first_example = int(state.get("examples") or first_step * global_batch)
    optimizer, loader = accelerator.prepare(optimizer, make_loader(recipe, corpus, first_example, global_batch))
    wrapped = as_steps_run_it(accelerator, module, learned.values(), base_is_sharded=bool(train.shard_base))

    with accelerator.autocast():
        sizes = sizes_of(recipe, module, learned, prompts)
    begin_run(accelerator, recipe.output_dir, sizes + idle_processors(accelerator), first_step)
    learner = Learner(
        accelerator, wrapped, learned, optimizer, schedule, train.seed, train.anchors_per_forward, train.max_grad_norm
    )

    def save(step: int, best: float, measured: int | None) -> None:
        progress = {"best": best, "measured": measured, "examples": step * global_batch, **kept}
        save_state(checkpoints, step, learned, [optimizer], progress, keep=train.checkpoint_keep)

    examiner = Examiner(recipe, accelerator, module, peft_model, identity, origin, tokenizer, prompts)
    best, reached = take_steps(recipe, learner, examiner, loader, first_step, state, save)
    accelerator.end_training()
    if reached < train.steps:
        accelerator.print(f"stopped behind step {reached}, as a signal asked for; the same command goes on from there")
        raise SystemExit(STOPPED)
    accelerator.print(farewell(output, best))


def farewell(output: Path, best: float) -> str:
    """What has come out, and where it is."""
    kept = load_adapter(output).metadata.training.get("step")
    found = (
        f"best mean acceptance length {best:.3f} (validation, sampled), that of step {kept}; the adapter is in {output}"
    )
    if kept == 0:
        return (
            f"{found}\nno step made it better: what is kept has learned nothing; try lower learning rates or other data"
        )
    return f"{found}\ntry: pardec generate {output} --compare --prompt 'def main():'"


# ---------------------------------------------------------------------- before the first step


def start(recipe: Recipe) -> tuple[Accelerator, int]:
    """The processes of the run, and the steps that it has behind it."""
    output = Path(recipe.output_dir)
    defaults = Recipe(base="", output_dir="", data=DataConfig(path="")).of_checkpoints()
    first_step = steps_done_before(output, recipe.of_checkpoints(), METADATA_FILE, "an adapter", defaults)
    log = JsonlTracker(output / "metrics.jsonl", keep_until_step=first_step)
    accelerator = make_accelerator(recipe.train.mixed_precision, [log, *recipe.train.trackers], output)
    refuse_other_state(accelerator, output, first_step)
    return accelerator, first_step


def launch_of(recipe: Recipe, accelerator: Accelerator) -> str:
    """The processes, what lies in each and what a step is."""
    base_is = {False: "whole in each", True: "sharded over all", "machine": "sharded over those of each machine"}
    return launch_told(
        accelerator,
        batch_size=recipe.train.batch_size,
        accumulation=recipe.train.gradient_accumulation_steps,
        max_length=recipe.data.max_length,
        base_is=base_is[recipe.train.shard_base],
    )


def load_target(recipe: Recipe, accelerator: Accelerator):
    """Base and tokenizer, refused if this recipe cannot be trained exactly on them."""
    tokenizer = load_tokenizer(recipe.base)
    group = recipe.train.shard_base
    if group and accelerator.num_processes > 1:
        base = load_sharded_base(recipe.base, accelerator.device, "machine" if group == "machine" else "all")
    else:
        base = load_base(recipe.base, device=accelerator.device)
    target = TargetModel.wrap(base)
    if tokenizer is None:
        raise ValueError(f"base {recipe.base!r}: expected a tokenizer beside the model, found none")
    probe(target)
    limit, length = target.max_positions, recipe.data.max_length
    if limit is not None and length > limit:
        raise ValueError(f"data.max_length: expected at most {limit}, the positions of the base, found {length}")
    return target, tokenizer


def read_data(
    recipe: Recipe, target: TargetModel, tokenizer, accelerator: Accelerator
) -> tuple[Corpus, list[list[int]]]:
    """The data, of which the main process tokenises the first before others read them, and the validation prompts.

    Refused if the base has no embeddings or no positions for them.
    """
    data = recipe.data
    accelerator.print(f"reading {data.path}")
    with accelerator.main_process_first():
        corpus = load_corpus(
            **data.model_dump(),  # the section's keys are named as the arguments
            tokenizer=tokenizer,
            num_embeddings=embedding_weight(target.base).shape[0],
            num_prompts=recipe.eval.num_prompts,
            seed=recipe.train.seed,
            show_progress=accelerator.is_main_process,
        )
    accelerator.print(corpus.counts.told(data.max_length))
    prompts, too_long = prompts_with_room(
        corpus.validation,
        recipe.eval.num_prompts,
        max_new_tokens=recipe.eval.max_new_tokens,
        max_positions=target.max_positions,
        where=data.validation_path or data.path,
    )
    if too_long:
        accelerator.print(told_long(too_long))
    largest = max(int(document.input_ids.max()) for document in corpus.validation)
    check_token_ids(largest, embedding_weight(target.base).shape[0], "the base", data.path)
    return corpus, prompts


def make_loader(recipe: Recipe, corpus: Corpus, first_example: int, global_batch: int) -> DataLoader:
    """The examples that are still to come, in the order that every run of this recipe has."""
    train, num_examples = recipe.train, recipe.train.steps * global_batch
    examples = AnchoredSequences(corpus.train, num_examples, recipe.anchors(), train.seed, global_batch)
    rest = Subset(examples, range(first_example, num_examples))
    needs_all = train.anchors_per_forward is not None or train.keep.ratio < 1
    return DataLoader(rest, batch_size=train.batch_size, collate_fn=collate if needs_all else collate_used)


def begin_module(recipe: Recipe, base, identity: Fingerprint):
    """The training module and PEFT's view of the base with their first numbers, and what is told of their origin."""
    lora, keep, peft_model = recipe.adapter.lora, recipe.train.keep, None
    torch.manual_seed(recipe.train.seed)  # the first halves of LoRA and head start at random
    if lora is not None:
        peft_model = inject_lora(base, r=lora.r, alpha=lora.alpha, target_modules=lora.target_modules)
    module = MaskTokenTrainer(
        base, recipe.adapter.drafter(), recipe.objective(), keep_ratio=keep.ratio, keep_floor=keep.floor
    )
    if recipe.adapter.start_from is None:
        return module, peft_model, {"started_from": None}
    source = load_adapter(recipe.adapter.start_from)
    moved = warm_start(module, peft_model, source, identity, recipe.train.frozen, transfer=recipe.adapter.transfer)
    return module, peft_model, {"started_from": source.metadata.files, **({"moved_from": moved} if moved else {})}


def sizes_of(recipe: Recipe, module: MaskTokenTrainer, learned: Mapping[str, Tensor], prompts: list[list[int]]) -> str:
    """Sizes and the memory that the run will take, found by tiny steps.

    Raises:
        ValueError: if that is more than is free, naming what would fit.
    """
    base, train, T = module.target.base, recipe.train, recipe.data.max_length
    num_learned, step = sum(p.numel() for p in learned.values()), measure_step(module)
    to_come = learned_bytes(num_learned) * 3 // 4  # the numbers themselves are there
    needed = {N: step.bytes_for(train.batch_size, T, recipe.mask_rows(N)) for N in recipe.anchors_to_try()}
    check_fits(needed, to_come, free_bytes(module.target.device), batch_size=train.batch_size)
    (anchors, of_step), *_ = needed.items()
    memory, mask_rows = running_bytes(base) + to_come + of_step, recipe.mask_rows(anchors)
    return (
        f"base {recipe.base}: {held_bytes(base) / 2**20:,.0f} MiB per process; learned: {num_learned:,} numbers; "
        f"{len(prompts)} validation prompts\n"
        f"per forward: {train.batch_size * T:,} real rows, {mask_rows:,} mask rows; "
        f"memory estimate {memory / 2**30:.1f} GiB per process (less with fewer train.anchors_per_forward)"
    )


# ---------------------------------------------------------------------- steps


def take_steps(
    recipe: Recipe,
    learner: Learner,
    examiner: Examiner,
    loader: Iterable[Mapping[str, Tensor]],
    first_step: int,
    state: Mapping[str, Any],
    save: Callable[[int, float, int | None], None],
) -> tuple[float, int]:
    """The steps that are still to come; returns the best mean acceptance length and the step that was reached.

    That is the last one, or an earlier one where a signal has asked to stop. `save` is given step, best and the step
    that was measured last.
    """
    train, accelerator, batches, sums = recipe.train, learner.accelerator, iter(loader), 0.0
    # a state from before such stops was measured where it was due
    is_main, best, measured = accelerator.is_main_process, state["best"], state.get("measured", first_step)
    bar = tqdm(total=train.steps, initial=first_step, unit="step", disable=not is_main)
    with bar as progress, stop_signals() as received:
        if is_main and first_step == 0 and read_progress(Path(recipe.output_dir) / "checkpoints") is None:
            save(0, best, None)  # a run that is killed before its first checkpoint is one to continue, too
        if first_step % recipe.eval.every == 0 and measured != first_step:
            best, measured = examiner.measure(first_step, best), first_step
        accelerator.wait_for_everyone()
        for step in range(first_step + 1, train.steps + 1):
            is_last = step == train.steps
            is_logged = step % train.log_every == 0 or is_last
            micro_batches = [next(batches) for _ in range(train.gradient_accumulation_steps)]
            depth = depth_at(step, train.steps, train.grow_speculative_tokens)
            new, norm = learner.update(micro_batches, step, max_depth=depth, with_metrics=is_logged)
            sums = sums + new
            progress.update()
            if is_logged:
                losses, sums = losses_of(sums, norm, learner.schedule.get_last_lr()[0]), 0.0
                accelerator.log(losses, step=step)
                progress.set_postfix(loss=f"{losses['loss']:.3f}")
            is_stopped = any_process(accelerator, bool(received)) and not is_last
            if (step % recipe.eval.every == 0 or is_last) and not is_stopped:
                best, measured = examiner.measure(step, best), step
            if is_main and (step % train.checkpoint_every == 0 or is_last or is_stopped):
                save(step, best, measured)
            accelerator.wait_for_everyone()  # nobody ends before all is written
            if is_stopped:
                return best, step
    return best, train.steps


if __name__ == "__main__":
    main()
