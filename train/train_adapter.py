"""Learns mask embeddings, and where the recipe asks for them a gated LoRA and a sampler head, for a frozen model.

    accelerate launch train/train_adapter.py recipes/quickstart.yaml [section.key=value ...]

Also runs under plain python and torchrun. A run that was cut off continues when it is started again.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from pardec.adapters.adapter import Adapter, AdapterMetadata, BaseReference, HeadShape
from pardec.adapters.files import METADATA_FILE, load_adapter, save_adapter
from pardec.arguments import known_dtype
from pardec.config.adapter_recipe import Recipe
from pardec.config.recipe_files import recipe_of_command_line
from pardec.data.corpus import Corpus, load_corpus, prompts_with_room
from pardec.data.examples import AnchoredSequences, collate
from pardec.data.fitting import told_long
from pardec.data.tokenising import check_token_ids
from pardec.decoding.probing.probe import probe
from pardec.measures.floor import measure_floor
from pardec.measures.held_out import measure_held_out
from pardec.model import SelfSpeculativeModel
from pardec.run import exit_on_unusable_input
from pardec.target.base import load_base, load_tokenizer
from pardec.target.fingerprint import Fingerprint, fingerprint
from pardec.target.forward import TargetModel, embedding_weight
from pardec.training.checkpoints import check_same, load_state, read_progress, save_state, steps_done_before
from pardec.training.curve import redraw_curve
from pardec.training.memory import check_fits, free_bytes, learned_bytes, measure_step
from pardec.training.module import MaskTokenTrainer
from pardec.training.peft_lora import inject_lora
from pardec.training.processes import JsonlTracker, begin_run, idle_processors, made_by, make_accelerator
from pardec.training.steps import Learner, build_optimizer, depth_at, losses_of, make_schedule
from pardec.training.warm_start import check_source, learned_adapter, warm_start


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    with exit_on_unusable_input():
        train(recipe_of_command_line(__doc__, Recipe))


def train(recipe: Recipe) -> None:
    """The run, from recipe to the best adapter in output_dir."""
    output, train = Path(recipe.output_dir), recipe.train
    depends_on = recipe.of_checkpoints()
    first_step = steps_done_before(output, depends_on, METADATA_FILE, "an adapter")
    log = JsonlTracker(output / "metrics.jsonl", keep_until_step=first_step)
    accelerator = make_accelerator(train.mixed_precision, [log, *train.trackers], output)
    if first_step == train.steps:
        accelerator.print(f"{output} already holds the adapter of this recipe, trained for all {train.steps} steps")
        return

    data: dict[str, Any] = {"num_processes": accelerator.num_processes}  # a step's examples depend on it
    check_same(output, data)

    # the frozen base, the proof on it that mask rows cannot disturb real ones, and the data:
    # everything that can be wrong with them is said before output_dir exists
    target, tokenizer = load_target(recipe, accelerator)
    identity = fingerprint(target.base, tokenizer)
    global_batch = train.batch_size * train.gradient_accumulation_steps * accelerator.num_processes
    corpus, prompts = read_data(recipe, target, tokenizer, accelerator)
    data["data_sha256"] = corpus.digest()
    check_same(output, data)

    # what is learned, and what was learned before this run was cut off
    module, peft_model, origin = begin_module(recipe, target.base, identity)
    learned = {name: p for name, p in module.named_parameters() if p.requires_grad}
    rates = {"mask_embeddings": train.learning_rate, "lora": train.lora_learning_rate, "head": train.head_learning_rate}
    optimizer = build_optimizer(learned, rates)
    source = origin["started_from"]
    checkpoints, kept = output / "checkpoints", {"recipe": depends_on, "started_from": source, **data}
    state = load_state(checkpoints, learned, [optimizer]) or {"best": 0.0, **kept}
    check_source(recipe.adapter.start_from, state.get("started_from"), source)
    schedule = make_schedule(optimizer, train.warmup_steps, train.steps, first_step)
    loader = make_loader(recipe, corpus, first_step, global_batch)
    wrapped, optimizer, loader = accelerator.prepare(module, optimizer, loader)

    with accelerator.autocast():
        sizes = sizes_of(recipe, module, learned, prompts)
    begin_run(accelerator, recipe.output_dir, sizes + idle_processors(accelerator), first_step)
    learner = Learner(
        accelerator, wrapped, learned, optimizer, schedule, train.seed, train.anchors_per_forward, train.max_grad_norm
    )
    best = take_steps(
        recipe,
        learner,
        Examiner(recipe, accelerator, module, peft_model, identity, origin, tokenizer, prompts),
        loader,
        first_step,
        state["best"],
        lambda step, best: save_state(checkpoints, step, learned, [optimizer], {"best": best, **kept}),
    )
    accelerator.end_training()
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


def load_target(recipe: Recipe, accelerator: Accelerator):
    """Base and tokenizer, refused if this recipe cannot be trained exactly on them."""
    tokenizer = load_tokenizer(recipe.base)
    target = TargetModel.wrap(load_base(recipe.base, device=accelerator.device))
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


def make_loader(recipe: Recipe, corpus: Corpus, first_step: int, global_batch: int) -> DataLoader:
    """The examples that are still to come, in the order that every run of this recipe has."""
    total, anchors = recipe.train.steps * global_batch, recipe.train.anchors_per_sequence
    examples = AnchoredSequences(corpus.train, total, anchors, recipe.train.seed, examples_per_step=global_batch)
    rest = Subset(examples, range(first_step * global_batch, total))
    return DataLoader(rest, batch_size=recipe.train.batch_size, collate_fn=collate)


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
    weights = sum(p.numel() * p.element_size() for p in base.parameters() if not p.requires_grad)
    num_learned = sum(p.numel() for p in learned.values())
    step = measure_step(module)
    check_fits(
        {N: step.bytes_for(train.batch_size, T, recipe.mask_rows(N)) for N in recipe.anchors_to_try()},
        # the numbers themselves are there already
        learned_bytes(num_learned) * 3 // 4,
        free_bytes(module.target.device),
        batch_size=train.batch_size,
    )
    mask_rows = recipe.mask_rows(recipe.anchors_to_try()[0])
    memory = weights + learned_bytes(num_learned) + step.bytes_for(train.batch_size, T, mask_rows)
    return (
        f"base {recipe.base}: {weights / 2**20:,.0f} MiB; learned: {num_learned:,} numbers; "
        f"{len(prompts)} validation prompts\n"
        f"per forward: {train.batch_size * T:,} real rows, {mask_rows:,} mask rows; "
        f"memory estimate {memory / 2**30:.1f} GiB per process (less with fewer train.anchors_per_forward)"
    )


# ---------------------------------------------------------------------- steps


def take_steps(
    recipe: Recipe,
    learner: Learner,
    examiner: "Examiner",
    loader: Iterable[Mapping[str, Tensor]],
    first_step: int,
    best: float,
    save: Callable[[int, float], None],
) -> float:
    """The steps that are still to come; returns the best mean acceptance length, which the main process knows."""
    train, accelerator, batches, sums = recipe.train, learner.accelerator, iter(loader), 0.0
    is_main = accelerator.is_main_process
    progress = tqdm(total=train.steps, initial=first_step, unit="step", disable=not is_main)
    if is_main and first_step == 0:
        if read_progress(Path(recipe.output_dir) / "checkpoints") is None:
            save(0, best)  # a run that is killed before its first checkpoint is one to continue, too
        best = examiner.measure(0, best)
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
            losses = losses_of(sums, norm, learner.schedule.get_last_lr()[0])
            accelerator.log(losses, step=step)
            progress.set_postfix(loss=f"{losses['loss']:.3f}")
            sums = 0.0
        if is_main and (step % recipe.eval.every == 0 or is_last):
            best = examiner.measure(step, best)
        accelerator.wait_for_everyone()
        if is_main and (step % train.checkpoint_every == 0 or is_last):
            save(step, best)
    progress.close()
    return best


@dataclass(frozen=True)
class Examiner:
    """Measures what is learned so far with the real decoder, and leaves the best of it in output_dir."""

    recipe: Recipe
    accelerator: Accelerator
    module: MaskTokenTrainer
    peft_model: Any
    identity: Fingerprint
    origin: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]

    def measure(self, step: int, best: float) -> float:
        """Acceptance after `step` steps, sampled and greedy; returns the better of it, sampled, and `best`."""
        self.module.forget_prefix()
        output, settings = Path(self.recipe.output_dir), self.recipe.eval
        model = SelfSpeculativeModel(self.module.target.base, self.tokenizer, self.adapter(step, {}))
        if step == 0 and settings.top_k is not None:  # of the base alone
            law = {"temperature": settings.temperature, "top_k": settings.top_k, "seed": self.recipe.train.seed}
            self.accelerator.log(measure_floor(model, self.prompts, **law), step=step)
        found = measure_held_out(
            model,
            self.prompts,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            seed=self.recipe.train.seed,
        )
        clear_device_cache(garbage_collection=True)  # the decoder's graphs and caches are for the next steps to use
        self.accelerator.log(found.to_log(), step=step)
        redraw_curve(output / "metrics.jsonl", output / "training.png")
        tqdm.write(
            f"step {step}: mean acceptance length {found.sampled.mean_acceptance_length:.3f} sampled, "
            f"{found.greedy.mean_acceptance_length:.3f} greedy (validation, bonus token included)"
        )
        measured = {"split": "validation", **found.to_dict()}
        length = measured["sampled"]["mean_acceptance_length"]
        if length > best:
            save_adapter(self.adapter(step, measured), output)
        return max(best, length)

    def adapter(self, step: int, measured: dict[str, Any]) -> Adapter:
        """A copy of what is learned so far, with its provenance."""
        what, base = self.recipe.adapter, self.module.target.base
        metadata = AdapterMetadata(
            num_speculative_tokens=what.num_speculative_tokens,
            mask_sharing=what.mask_sharing,
            draft_input=what.draft_input,
            head=None if what.head is None else HeadShape(width=what.head.width, shortlist=what.head.shortlist),
            base=BaseReference(name=self.recipe.base, revision=getattr(base.config, "_commit_hash", None)),
            fingerprint=self.identity,
            training={
                "recipe": self.recipe.model_dump(),
                **self.origin,
                **made_by(self.accelerator),
                "step": step,
                "cpu_minutes": round(time.process_time() / 60, 2),
            },
            measured=measured,
        )
        return learned_adapter(self.module, self.peft_model, metadata).rounded(known_dtype(what.dtype))


if __name__ == "__main__":
    main()
