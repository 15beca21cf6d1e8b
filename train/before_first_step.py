"""What comes before the first step of `train_adapter.py`: processes, base, data, what is learned, memory for it.

Everything that can be wrong with a recipe is said here, before anything is written.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from pardec.adapters.adapter import AdapterError
from pardec.adapters.files import METADATA_FILE, load_adapter
from pardec.config.adapter_recipe import DataConfig, Recipe
from pardec.data.corpus import Corpus, load_corpus, prompts_with_room
from pardec.data.examples import AnchoredSequences, collate, collate_used
from pardec.data.fitting import told_long
from pardec.data.tokenising import check_token_ids
from pardec.decoding.probing.probe import probe
from pardec.target.base import load_base, load_tokenizer
from pardec.target.fingerprint import Fingerprint
from pardec.target.forward import TargetModel, embedding_weight
from pardec.target.sharding import held_bytes, load_sharded_base, running_bytes
from pardec.training.memory import learned_bytes
from pardec.training.memory_fit import fit_step, free_bytes
from pardec.training.module import MaskTokenTrainer
from pardec.training.peft_lora import inject_lora
from pardec.training.running.agreement import failing_together, main_process_first, of_all
from pardec.training.running.checkpoints import read_progress, steps_done_before
from pardec.training.running.launch import launch_told, processes_here
from pardec.training.running.processes import JsonlTracker, make_accelerator, refuse_other_state
from pardec.training.warm_start import warm_start


def start(recipe: Recipe) -> tuple[Accelerator, int]:
    """The processes of the run, and the steps that it has behind it."""
    output = Path(recipe.output_dir)
    defaults = Recipe(base="", output_dir="", data=DataConfig(path="")).of_checkpoints()
    first_step = steps_done_before(output, recipe.of_checkpoints(), METADATA_FILE, "an adapter", defaults)
    refuse_lost_adapter(output)
    log = JsonlTracker(output / "metrics.jsonl", keep_until_step=first_step)
    accelerator = make_accelerator(recipe.train.mixed_precision, [log, *recipe.train.trackers], output)
    refuse_other_state(accelerator, output, first_step)
    return accelerator, first_step


def refuse_lost_adapter(output: Path) -> None:
    """Raises AdapterError if the adapter that a run has measured is not there as it was saved: no state has it."""
    if (read_progress(output / "checkpoints") or {}).get("measured") is None:
        return
    try:
        load_adapter(output)
    except AdapterError as error:
        raise AdapterError(f"{error}; the best of this run is lost, choose another output_dir") from None


def told_of_finished(recipe: Recipe) -> str:
    """That a run has all its steps behind it.

    Raises:
        ValueError: if what it left has other numbers than the recipe asks for.
    """
    output, asked = recipe.output_dir, recipe.adapter.dtype
    found = load_adapter(output).metadata.training["recipe"]["adapter"].get("dtype", "float32")
    if found != asked:
        raise ValueError(
            f"output_dir {output}: expected adapter.dtype = {asked} as in this recipe, found the adapter of a finished "
            f"run in {found}; choose another output_dir"
        )
    return (
        f"{output} already holds the adapter of this recipe, trained for all {recipe.train.steps} steps; "
        "whether base or data have changed since was not looked at"
    )


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
    with main_process_first(accelerator):
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
    train, total = recipe.train, recipe.train.steps * global_batch
    examples = AnchoredSequences(corpus.train, total, recipe.anchors(), train.seed, examples_per_step=global_batch)
    rest = Subset(examples, range(first_example, total))
    # dropping goes by how many anchors there are, and forwards of some of them must be as many in every process
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
    module.run_layers_twice(recipe.train.gradient_checkpointing)
    if recipe.adapter.start_from is None:
        return module, peft_model, {"started_from": None}
    source = load_adapter(recipe.adapter.start_from)
    moved = warm_start(module, peft_model, source, identity, recipe.train.frozen, transfer=recipe.adapter.transfer)
    return module, peft_model, {"started_from": source.metadata.files, **({"moved_from": moved} if moved else {})}


def sizes_of(
    recipe: Recipe,
    accelerator: Accelerator,
    module: MaskTokenTrainer,
    learned: Mapping[str, Tensor],
    prompts: list[list[int]],
) -> str:
    """Sizes and the memory that the run will take, found by tiny steps; cuts the pass over real tokens so that it fits.

    Raises:
        ValueError: if that is more than is free, naming what would fit; in all processes, if it is in one of them.
    """
    base, train, T = module.target.base, recipe.train, recipe.data.max_length
    num_learned, here = sum(p.numel() for p in learned.values()), processes_here(accelerator)
    to_come = learned_bytes(num_learned) * 3 // 4  # the numbers themselves are there
    mask_rows = {N: recipe.mask_rows(N) for N in recipe.anchors_to_try()}
    free = min(of_all(accelerator, free_bytes(module.target.device, here)))
    with failing_together(accelerator):
        num_slices, of_step = fit_step(
            module, mask_rows, batch_size=train.batch_size, num_tokens=T, learned=to_come, free=free
        )
    module.prefix_slices = max(of_all(accelerator, num_slices))
    in_slices = f" in {module.prefix_slices} slices" if module.prefix_slices > 1 else ""
    memory = running_bytes(base) + to_come + of_step
    return (
        f"base {recipe.base}: {held_bytes(base) / 2**20:,.0f} MiB per process; learned: {num_learned:,} numbers; "
        f"{len(prompts)} validation prompts\n"
        f"per forward: {train.batch_size * T:,} real rows{in_slices}, {next(iter(mask_rows.values())):,} mask rows; "
        f"memory estimate {memory / 2**30:.1f} GiB per process "
        "(less with fewer train.anchors_per_forward, or train.gradient_checkpointing)"
    )
