"""Learns mask embeddings, and where the recipe asks for them a gated LoRA and a sampler head, for a frozen model.

    accelerate launch train/train_adapter.py recipes/quickstart.yaml [section.key=value ...]

Also runs under plain python and torchrun. A run that was cut off continues when it is started again, by any number
of processes that makes the same steps; SIGTERM and SIGUSR1 let it finish a step, save, and exit with code 75.
"""

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from before_first_step import (
    begin_module,
    launch_of,
    load_target,
    make_loader,
    read_data,
    sizes_of,
    start,
    told_of_finished,
)
from torch import Tensor
from tqdm.auto import tqdm

from pardec.adapters.files import load_adapter
from pardec.config.adapter_recipe import Recipe
from pardec.config.recipe_files import recipe_of_command_line
from pardec.measures.examiner import Examiner
from pardec.run import exit_on_unusable_input
from pardec.target.fingerprint import fingerprint
from pardec.training.running.agreement import any_process, failing_together
from pardec.training.running.checkpoints import add_to_state, check_same, load_state, read_progress, save_state
from pardec.training.running.launch import idle_processors
from pardec.training.running.processes import STOPPED, as_steps_run_it, run_in, stop_signals
from pardec.training.steps import Learner, build_optimizer, cpu_minutes, depth_at, losses_of, make_schedule
from pardec.training.warm_start import check_source


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    with exit_on_unusable_input():
        train(recipe_of_command_line(__doc__, Recipe))


def train(recipe: Recipe) -> None:
    """The run, from recipe to the best adapter in output_dir."""
    output, train = Path(recipe.output_dir), recipe.train
    accelerator, first_step = start(recipe)
    if first_step == train.steps:
        accelerator.print(told_of_finished(recipe))
        return

    global_batch = train.batch_size * train.gradient_accumulation_steps * accelerator.num_processes
    data: dict[str, Any] = {"global_batch": global_batch}  # a step's examples depend on it, not on who runs which
    check_same(output, data)
    accelerator.print(launch_of(recipe, accelerator))

    # the frozen base, the proof on it that mask rows cannot disturb real ones, and the data:
    # everything that can be wrong with them is said before output_dir exists
    target, tokenizer = load_target(recipe, accelerator)
    identity = fingerprint(target.base, tokenizer)
    data["base_sha256"] = identity.digest  # a folder or a hub name may have come to hold another
    check_same(output, data)
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
    loader = make_loader(recipe, corpus, first_example, global_batch)
    optimizer, loader = accelerator.prepare(optimizer, loader)
    wrapped = as_steps_run_it(accelerator, module, learned.values(), base_is_sharded=bool(train.shard_base))

    with accelerator.autocast():
        sizes = sizes_of(recipe, accelerator, module, learned, prompts)

    minutes = partial(cpu_minutes, state.get("cpu_minutes", 0.0), accelerator.num_processes)

    def save(step: int, best: float, measured: int | None) -> None:
        progress = {"best": best, "measured": measured, "examples": step * global_batch, "cpu_minutes": minutes()}
        save_state(checkpoints, step, learned, [optimizer], {**progress, **kept}, keep=train.checkpoint_keep)

    with run_in(accelerator, recipe.output_dir, sizes + idle_processors(accelerator), first_step):
        clip = train.max_grad_norm
        learner = Learner(
            accelerator, wrapped, learned, optimizer, schedule, train.seed, train.anchors_per_forward, clip
        )
        examiner = Examiner(recipe, accelerator, module, peft_model, identity, origin, tokenizer, prompts, minutes)
        with told_what_is_kept(accelerator, checkpoints):
            best, reached = take_steps(recipe, learner, examiner, loader, first_step, state, save)
        accelerator.end_training()
    if reached < train.steps:
        accelerator.print(f"stopped behind step {reached}, as a signal asked for; the same command goes on from there")
        raise SystemExit(STOPPED)
    accelerator.print(farewell(output, best, is_chat=tokenizer.chat_template is not None))


@contextmanager
def told_what_is_kept(accelerator: Accelerator, checkpoints: Path) -> Iterator[None]:
    """A line where Ctrl-C ends the steps inside, as it does at once."""
    try:
        yield
    except KeyboardInterrupt:
        kept = (read_progress(checkpoints) or {"step": 0})["step"]
        accelerator.print(f"what came behind step {kept} is lost; the same command goes on from there")
        raise


def farewell(output: Path, best: float, *, is_chat: bool) -> str:
    """What has come out, where it is, and a prompt to try it on: a user's message if the base is a chat model."""
    training = load_adapter(output).metadata.training
    kept, adapter = training.get("step"), shlex.quote(str(output))
    found = (
        f"best mean acceptance length {best:.3f} (validation, sampled), that of step {kept}; the adapter is in {output}"
    )
    if kept == 0:
        is_new = training["recipe"]["adapter"].get("start_from") is None
        what = "has learned nothing" if is_new else "is what it started from"
        return f"{found}\nno step made it better: what is kept {what}; try lower learning rates or other data"
    prompt = "--chat --prompt 'Explain how a rainbow forms.'" if is_chat else "--prompt 'def main():'"
    how = " --chat --prompt-file YOUR_PROMPTS.jsonl" if is_chat else ""
    return (
        f"{found}\ntry: pardec generate {adapter} --compare {prompt}\n"
        f"choose how much it drafts on your device, or it may be slower than plain: pardec tune {adapter}{how}"
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
    checkpoints = Path(recipe.output_dir) / "checkpoints"
    bar = tqdm(total=train.steps, initial=first_step, unit="step", disable=not is_main)
    with bar as progress, stop_signals() as received:
        with failing_together(accelerator):
            if is_main and first_step == 0 and read_progress(checkpoints) is None:
                save(0, best, None)  # a run that is killed before its first checkpoint is one to continue, too
        if first_step % recipe.eval.every == 0 and measured != first_step:
            progress.set_description(f"measuring step {first_step}")
            best, measured = examiner.measure(first_step, best), first_step
            progress.set_description("")
            progress.unpause()  # what steps take is not told by that
        for step in range(first_step + 1, train.steps + 1):
            is_last = step == train.steps
            is_logged = step % train.log_every == 0 or is_last
            with failing_together(accelerator):  # one of them may find the disk full, or data that have changed
                micro_batches = [next(batches) for _ in range(train.gradient_accumulation_steps)]
            depth = depth_at(step, train.steps, train.grow_speculative_tokens)
            new, norm = learner.update(micro_batches, step, max_depth=depth, with_metrics=is_logged)
            sums = sums + new
            progress.update()
            if is_logged:
                losses = losses_of(sums, norm, learner.schedule.get_last_lr()[0], examiner.minutes())
                with failing_together(accelerator):
                    accelerator.log(losses, step=step)
                progress.set_postfix(loss=f"{losses['loss']:.3f}")
                sums = 0.0
            is_stopped = any_process(accelerator, bool(received)) and not is_last
            is_measured = (step % recipe.eval.every == 0 or is_last) and not is_stopped
            if is_last:
                best, measured = examiner.measure(step, best), step
            if step % train.checkpoint_every == 0 or is_measured or is_stopped:
                with failing_together(accelerator):  # nobody ends before all is written
                    if is_main:
                        save(step, best, measured)
            if is_measured and not is_last:  # behind the save: who asks to stop may not wait so long
                best, measured = examiner.measure(step, best), step
                with failing_together(accelerator):
                    if is_main:
                        add_to_state(checkpoints, {"best": best, "measured": measured})
                is_stopped = any_process(accelerator, bool(received))
            if is_stopped:
                return best, step
    return best, train.steps


if __name__ == "__main__":
    main()
