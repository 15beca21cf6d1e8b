"""Lets a frozen base model continue texts or answer chat prompts: its own responses are data to train an adapter on.

    accelerate launch train/generate_responses.py recipes/responses_tiny_python.yaml [section.key=value ...]

Also runs under plain python and torchrun. Rows are appended in a fixed order, in batches of similar length: a run that
was cut off continues when it is started again, to the file that an uninterrupted one leaves. With several processes
each generates every so many-th batch, and the main one writes; the file does not depend on their number.
"""

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from pardec.config.recipe_files import recipe_of_command_line
from pardec.config.responses_recipe import ResponsesRecipe
from pardec.data.python_sources import PACKAGES, STDLIB
from pardec.data.reading import training_rows
from pardec.data.responses.follow_ups import between_answers
from pardec.data.responses.prompt_mix import draw_mix
from pardec.data.responses.response_file import (
    BY_LENGTH,
    SHORT_TOKENS,
    Batch,
    Prompt,
    about_file,
    append_rows,
    by_length,
    count_rows,
    keep_whole_batches,
    longest_row,
    one_turn,
    only_writer,
    plan_batches,
    read_about,
    response_row,
    two_turns,
    write_about,
)
from pardec.data.responses.response_prompts import draw_prompts
from pardec.data.tokenising import check_token_ids
from pardec.decoding.probing.probe import probe
from pardec.loading import load
from pardec.measures.acceptance import digest
from pardec.model import SelfSpeculativeModel
from pardec.run import exit_on_unusable_input
from pardec.target.base import PACKAGED_BASE, eos_token_ids, load_base, load_tokenizer
from pardec.target.fingerprint import Fingerprint, differences, fingerprint
from pardec.target.forward import embedding_weight
from pardec.training.running.agreement import failing_together, main_process_first
from pardec.training.running.processes import made_by, make_accelerator


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    with exit_on_unusable_input(), ExitStack() as held:
        generate(recipe_of_command_line(__doc__, ResponsesRecipe), held)


def generate(recipe: ResponsesRecipe, held: ExitStack) -> None:
    """The run, from recipe to the finished file, which other runs are kept from while `held` is open."""
    output = Path(recipe.output)
    before = read_about(output, recipe.model_dump())
    accelerator = make_accelerator("no")
    if before is not None and before.get("num_bytes") == output.stat().st_size:
        accelerator.print(f"{output} already holds all {recipe.num_responses} responses of this recipe")
        return

    # the frozen base, what it is to continue, and whether an earlier run has continued the same:
    # everything that can be wrong with them is said before anything is written
    model = load_model(recipe, accelerator)
    prompts, sources = read_prompts(recipe, model, accelerator)
    order = BY_LENGTH if before is None else before.get("order")  # a file goes on as it was begun
    if order == BY_LENGTH:
        prompts = by_length(prompts, recipe.batch_size)
    made = made_by(accelerator)
    about: dict[str, Any] = {
        "recipe": recipe.model_dump(),
        "fingerprint": fingerprint(model.base_model, model.tokenizer).model_dump(),
        "prompts_sha256": digest([prompt.input_ids for prompt in prompts]),
        **({"order": order} if order else {}),
        **({"sources": sources} if sources else {}),
        **made,
    }
    if before is not None:
        check_continues(output, before, about, model, recipe.data.name)
        about["earlier_runs"] = [*before.get("earlier_runs", []), {key: before[key] for key in made}]

    with failing_together(accelerator):  # or the others would wait for a main process that is refused
        if accelerator.is_main_process:
            held.enter_context(only_writer(output))
    batches = plan_batches(len(prompts), recipe.batch_size, recipe.share_of_greedy)
    num_done, counts = begin(output, accelerator, about, batches, prompts)
    announce(recipe, accelerator, prompts, sources, counts["responses"])
    there, is_main = counts["responses"], accelerator.is_main_process
    progress = tqdm(total=len(prompts), initial=there, unit="response", disable=not is_main)
    tokens_before, start = counts["response_tokens"], time.perf_counter()
    last_run: dict[str, Any] = {"first_response": there, "tokens": 0, "seconds": 0.0}
    for first in range(num_done, len(batches), accelerator.num_processes):
        # one batch for each process; the last round may have fewer
        mine = batches[first : first + accelerator.num_processes][accelerator.process_index :][:1]
        rows = gather_object([row for batch in mine for row in respond(recipe, model, batch, prompts)])
        with failing_together(accelerator):  # the others would wait for their next round
            if is_main:
                append_rows(output, rows)
        counts.update(count_rows(rows))
        last_run |= {"tokens": counts["response_tokens"] - tokens_before, "seconds": time.perf_counter() - start}
        last_run["tokens_per_second"] = last_run["tokens"] / last_run["seconds"]
        progress.update(len(rows))
        progress.set_postfix_str(f"{last_run['tokens_per_second']:,.0f} tokens/s")
    progress.close()

    if accelerator.is_main_process:
        write_about(output, about | {"counts": counts, "last_run": last_run, "num_bytes": output.stat().st_size})
    report(recipe, accelerator, counts, prompts)
    accelerator.end_training()


def load_model(recipe: ResponsesRecipe, accelerator: Accelerator) -> SelfSpeculativeModel:
    """The base, with the adapter that drafts if there is one, refused if it cannot be decoded exactly."""
    if recipe.adapter is not None:
        model = load(recipe.adapter, recipe.base, device=accelerator.device, dtype=recipe.dtype)
    else:
        base = load_base(recipe.base, device=accelerator.device, dtype=recipe.dtype)
        model = SelfSpeculativeModel(base, load_tokenizer(recipe.base), None)
        probe(model.target)
    if model.tokenizer is None:
        raise ValueError(f"base {recipe.base!r}: expected a tokenizer beside the model, found none")
    return model


def read_prompts(
    recipe: ResponsesRecipe, model: SelfSpeculativeModel, accelerator: Accelerator
) -> tuple[list[Prompt], list[dict[str, Any]]]:
    """The prompts, read by the main process first, so that a cache is written once, and what each source of a mix gave.

    Raises:
        ValueError: for data that cannot be used, or that the base has no embeddings or no positions for.
    """
    data, tokenizer = recipe.data, model.tokenizer
    assert tokenizer is not None
    limit = longest_prompt(recipe, model)
    accelerator.print(f"reading {data.name}")
    with main_process_first(accelerator):
        if data.mix is not None:
            prompts, sources = draw_mix(
                [section.source() for section in data.mix],
                tokenizer,
                num_prompts=recipe.num_responses,
                prompt_tokens=recipe.prompt_tokens,
                max_prompt_tokens=limit,
                follow_ups=data.follow_ups,
                seed=recipe.seed,
                show_progress=accelerator.is_main_process,
            )
        else:
            ids = draw_prompts(
                training_rows(data.name, data.format, data.split, data.subset),
                tokenizer,
                num_prompts=recipe.num_responses,
                prompt_tokens=recipe.prompt_tokens,
                max_prompt_tokens=limit,
                seed=recipe.seed,
                where=data.name,
                show_progress=accelerator.is_main_process,
            )
            prompts, sources = [Prompt(one) for one in ids], []
    largest = max(max(prompt.input_ids) for prompt in prompts)
    check_token_ids(largest, embedding_weight(model.base_model).shape[0], "the base", data.name)
    return prompts, sources


def longest_prompt(recipe: ResponsesRecipe, model: SelfSpeculativeModel) -> int | None:
    """How many tokens leave the base positions for an answer; None if there is no end of them."""
    limit = model.target.max_positions
    return None if limit is None else limit - recipe.max_new_tokens


def check_continues(
    output: Path, before: dict[str, Any], about: dict[str, Any], model: SelfSpeculativeModel, name: str
) -> None:
    """Refuses to continue another base's responses, or those to other prompts than the data of that name give."""
    then, now = (Fingerprint.model_validate(one["fingerprint"]) for one in (before, about))
    wrong = differences(then, now, embedding_weight(model.base_model).dtype)
    if wrong:
        raise ValueError(f"output {output}: its responses are another base's: {'; '.join(wrong)}")
    if before["prompts_sha256"] != about["prompts_sha256"]:
        raise ValueError(
            f"output {output}: expected responses to the prompts that {name} gives now, "
            "found responses to others; choose another output or remove it"
        )


def begin(
    output: Path, accelerator: Accelerator, about: dict[str, Any], batches: Sequence[Batch], prompts: list[Prompt]
) -> tuple[int, Counter[str]]:
    """Whole batches in the file and their counts; leaves beside the file what it is made by, before its first row."""
    kept: list[Any] = [0, Counter()]
    if accelerator.is_main_process:
        kept = list(keep_whole_batches(output, batches, prompts))
        write_about(output, about)
    broadcast_object_list(kept)
    return kept[0], kept[1]


def announce(
    recipe: ResponsesRecipe,
    accelerator: Accelerator,
    prompts: list[Prompt],
    sources: list[dict[str, Any]],
    num_kept: int,
) -> None:
    """How much there is to do."""
    lengths = sorted(len(prompt.input_ids) for prompt in prompts)
    different = len({tuple(prompt.input_ids) for prompt in prompts})
    accelerator.print(
        f"{len(prompts):,} prompts of {lengths[0]} to {lengths[-1]} tokens, {different:,} of them "
        f"different; up to {recipe.max_new_tokens} new tokens each, {recipe.share_of_greedy:.0%} greedy"
    )
    for one in sources:
        too_long = f"; {one['left_out']:,} left out, longer than prompt_tokens" if one["left_out"] else ""
        accelerator.print(f"{one['prompts']:,} of {one['kind']} from {one['path']}{too_long}")
    if num_kept:
        accelerator.print(f"continuing {recipe.output} at response {num_kept}")


def respond(
    recipe: ResponsesRecipe, model: SelfSpeculativeModel, batch: Batch, prompts: list[Prompt]
) -> list[dict[str, Any]]:
    """Rows of a batch, which depend on the recipe and the batch's place alone."""
    assert model.tokenizer is not None
    mine = prompts[batch.first : batch.first + batch.size]
    firsts = continue_all(recipe, model, batch, [prompt.input_ids for prompt in mine], seed=batch.first)
    answers = [one_turn(first) for first in firsts]

    # where the user says something more, the answer to that too
    between: dict[int, list[int]] = {}
    limit, ends = longest_prompt(recipe, model), eos_token_ids(model.base_model)
    for n, (prompt, first) in enumerate(zip(mine, firsts, strict=True)):
        leads = None if prompt.follow_up is None else between_answers(prompt, first, model.tokenizer, ends)
        if leads and (limit is None or len(prompt.input_ids) + len(first) + len(leads) <= limit):
            between[n] = leads
    asked = [[*mine[n].input_ids, *firsts[n], *leads] for n, leads in between.items()]
    seconds = continue_all(recipe, model, batch, asked, seed=2**30 + batch.first) if asked else []
    for (n, leads), second in zip(between.items(), seconds, strict=True):
        answers[n] = two_turns(firsts[n], leads, second)
    rows = enumerate(zip(mine, answers, strict=True), start=batch.first)
    return [response_row(index, batch.greedy, prompt, answer) for index, (prompt, answer) in rows]


def continue_all(
    recipe: ResponsesRecipe, model: SelfSpeculativeModel, batch: Batch, ids: list[list[int]], *, seed: int
) -> list[list[int]]:
    """What the base writes behind each of these token ids; `seed`, below 2^31, beside the recipe's own."""
    return model.generate(
        ids,
        max_new_tokens=recipe.max_new_tokens,
        temperature=0.0 if batch.greedy else recipe.temperature,
        top_k=recipe.top_k,
        top_p=recipe.top_p,
        min_p=recipe.min_p,
        seed=recipe.seed * 2**31 + seed,
        mode="plain" if recipe.adapter is None else "fused",
        # never a tuned choice, which may be another when the run is continued
        num_speculative_tokens=None if model.adapter is None else model.adapter.metadata.num_speculative_tokens,
    ).token_ids


def report(recipe: ResponsesRecipe, accelerator: Accelerator, counts: Counter[str], prompts: list[Prompt]) -> None:
    """What is there now, and how to train on it."""
    held_out = f" data.validation_path={recipe.data.path}" if recipe.data.path in (STDLIB, PACKAGES) else ""
    accelerator.print(
        f"{counts['responses']:,} responses ({counts['greedy']:,} greedy), {counts['response_tokens']:,} tokens of the "
        f"model's own, in {recipe.output}; about them: {about_file(Path(recipe.output))}"
    )
    kinds = sorted({prompt.kind for prompt in prompts if prompt.kind})
    if kinds:
        accelerator.print("responses by kind: " + ", ".join(f"{counts[kind]:,} {kind}" for kind in kinds))
    wanted = sum(prompt.follow_up is not None for prompt in prompts)
    if wanted:
        accelerator.print(f"{counts['follow_ups']:,} of {wanted:,} follow-ups answered")
    if counts["short"]:
        accelerator.print(f"{counts['short']:,} have fewer than {SHORT_TOKENS} tokens: they train next to nothing")
    max_length = max(len(prompt.input_ids) for prompt in prompts) + recipe.max_new_tokens
    if counts["follow_ups"]:
        max_length = longest_row(Path(recipe.output))
    # the rate of the recipe's LoRA is for the packaged model: larger ones diverge at it
    rates = "" if recipe.base == PACKAGED_BASE else " train.steps=2000 train.lora_learning_rate=2e-4"
    accelerator.print(
        f"try: accelerate launch train/train_adapter.py recipes/quickstart.yaml base={recipe.base} "
        f"data.path={recipe.output} data.max_length={max_length}{held_out}{rates} "
        f"output_dir=runs/quickstart_{Path(recipe.output).stem}"
    )


if __name__ == "__main__":
    main()
