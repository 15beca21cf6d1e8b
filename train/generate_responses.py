"""Lets a frozen base model continue prompts, and leaves its own responses as data to train an adapter on.

    accelerate launch train/generate_responses.py recipes/responses_tiny_python.yaml [section.key=value ...]

Also runs under plain python and torchrun. Rows are appended in a fixed order, batch by batch: a run that was cut off
continues when it is started again, to the file that an uninterrupted one leaves. With several processes each
generates every so many-th batch, and the main one writes; the file does not depend on their number.
"""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from pardec.config.recipe_files import recipe_of_command_line
from pardec.config.responses_recipe import ResponsesRecipe
from pardec.data.python_sources import PACKAGES, STDLIB
from pardec.data.reading import training_rows
from pardec.data.response_prompts import draw_prompts
from pardec.data.responses import (
    SHORT_TOKENS,
    Batch,
    about_file,
    append_rows,
    count_rows,
    keep_whole_batches,
    plan_batches,
    read_about,
    response_row,
    write_about,
)
from pardec.data.tokenising import check_token_ids
from pardec.decoding.probe import probe
from pardec.loading import load
from pardec.measures.acceptance import digest
from pardec.model import SelfSpeculativeModel
from pardec.run import exit_on_unusable_input
from pardec.target.base import load_base, load_tokenizer
from pardec.target.fingerprint import Fingerprint, differences, fingerprint
from pardec.target.forward import embedding_weight
from pardec.training.processes import made_by, make_accelerator


def main() -> None:
    """Reads the command line; bad input ends with one line and exit code 2."""
    with exit_on_unusable_input():
        generate(recipe_of_command_line(__doc__, ResponsesRecipe))


def generate(recipe: ResponsesRecipe) -> None:
    """The run, from recipe to the finished file."""
    output = Path(recipe.output)
    before = read_about(output, recipe.model_dump())
    accelerator = make_accelerator("no")
    if before is not None and before.get("num_bytes") == output.stat().st_size:
        accelerator.print(f"{output} already holds all {recipe.num_responses} responses of this recipe")
        return

    # the frozen base, what it is to continue, and whether an earlier run has continued the same:
    # everything that can be wrong with them is said before anything is written
    model = load_model(recipe, accelerator)
    prompts = read_prompts(recipe, model, accelerator)
    identity = fingerprint(model.base_model, model.tokenizer)
    made = made_by(accelerator)
    about: dict[str, Any] = {
        "recipe": recipe.model_dump(),
        "fingerprint": identity.model_dump(),
        "prompts_sha256": digest(prompts),
        **made,
    }
    if before is not None:
        check_continues(output, before, about, model)
        about["earlier_runs"] = [*before.get("earlier_runs", []), {key: before[key] for key in made}]

    # whole batches that are there already stay
    batches = plan_batches(len(prompts), recipe.batch_size, recipe.share_of_greedy)
    num_done, counts = begin(output, accelerator, about, batches, prompts)
    announce(recipe, accelerator, prompts, counts["responses"])
    progress = tqdm(
        total=len(prompts), initial=counts["responses"], unit="response", disable=not accelerator.is_main_process
    )
    tokens_before, start = counts["response_tokens"], time.perf_counter()
    last_run: dict[str, Any] = {"first_response": counts["responses"], "tokens": 0, "seconds": 0.0}
    for first in range(num_done, len(batches), accelerator.num_processes):
        # one batch for each process; the last round may have fewer
        mine = batches[first : first + accelerator.num_processes][accelerator.process_index :][:1]
        rows = gather_object([row for batch in mine for row in respond(recipe, model, batch, prompts)])
        if accelerator.is_main_process:
            append_rows(output, rows)
        counts.update(count_rows(rows))
        last_run["tokens"] = counts["response_tokens"] - tokens_before
        last_run["seconds"] = time.perf_counter() - start
        last_run["tokens_per_second"] = last_run["tokens"] / last_run["seconds"]
        progress.update(len(rows))
        progress.set_postfix_str(f"{last_run['tokens_per_second']:,.0f} tokens/s")
    progress.close()

    if accelerator.is_main_process:
        num_bytes = output.stat().st_size
        write_about(output, {**about, "counts": counts, "last_run": last_run, "num_bytes": num_bytes})
    report(recipe, accelerator, counts, max(map(len, prompts)))
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


def read_prompts(recipe: ResponsesRecipe, model: SelfSpeculativeModel, accelerator: Accelerator) -> list[list[int]]:
    """The prompts, read by the main process first, so that a cache is written once.

    Raises:
        ValueError: for data that cannot be used, or that the base has no embeddings or no positions for.
    """
    data, limit = recipe.data, model.target.max_positions
    assert model.tokenizer is not None
    accelerator.print(f"reading {data.path}")
    with accelerator.main_process_first():
        prompts = draw_prompts(
            training_rows(data.path, data.format, data.split, data.subset),
            model.tokenizer,
            num_prompts=recipe.num_responses,
            prompt_tokens=recipe.prompt_tokens,
            max_prompt_tokens=None if limit is None else limit - recipe.max_new_tokens,
            seed=recipe.seed,
            where=data.path,
            show_progress=accelerator.is_main_process,
        )
    check_token_ids(max(map(max, prompts)), embedding_weight(model.base_model).shape[0], "the base", data.path)
    return prompts


def check_continues(output: Path, before: dict[str, Any], about: dict[str, Any], model: SelfSpeculativeModel) -> None:
    """Refuses to continue another base's responses, or those to other prompts."""
    then, now = (Fingerprint.model_validate(one["fingerprint"]) for one in (before, about))
    wrong = differences(then, now, embedding_weight(model.base_model).dtype)
    if wrong:
        raise ValueError(f"output {output}: its responses are another base's: {'; '.join(wrong)}")
    if before["prompts_sha256"] != about["prompts_sha256"]:
        raise ValueError(
            f"output {output}: expected responses to the prompts that {about['recipe']['data']['path']} gives now, "
            "found responses to others; choose another output or remove it"
        )


def begin(
    output: Path, accelerator: Accelerator, about: dict[str, Any], batches: Sequence[Batch], prompts: list[list[int]]
) -> tuple[int, Counter[str]]:
    """Whole batches in the file and their counts; leaves beside the file what it is made by, before its first row."""
    kept: list[Any] = [0, Counter()]
    if accelerator.is_main_process:
        output.parent.mkdir(parents=True, exist_ok=True)
        kept = list(keep_whole_batches(output, batches, prompts))
        write_about(output, about)
    broadcast_object_list(kept)
    return kept[0], kept[1]


def announce(recipe: ResponsesRecipe, accelerator: Accelerator, prompts: list[list[int]], num_kept: int) -> None:
    """How much there is to do."""
    lengths = sorted(map(len, prompts))
    accelerator.print(
        f"{len(prompts):,} prompts of {lengths[0]} to {lengths[-1]} tokens, {len(set(map(tuple, prompts))):,} of them "
        f"different; up to {recipe.max_new_tokens} new tokens each, {recipe.share_of_greedy:.0%} greedy"
    )
    if num_kept:
        accelerator.print(f"continuing {recipe.output} at response {num_kept}")


def respond(
    recipe: ResponsesRecipe, model: SelfSpeculativeModel, batch: Batch, prompts: list[list[int]]
) -> list[dict[str, Any]]:
    """Rows of a batch, which depend on the recipe and the batch's place alone."""
    indices = range(batch.first, batch.first + batch.size)
    responses = model.generate(
        [prompts[index] for index in indices],
        max_new_tokens=recipe.max_new_tokens,
        temperature=0.0 if batch.greedy else recipe.temperature,
        top_k=recipe.top_k,
        top_p=recipe.top_p,
        min_p=recipe.min_p,
        seed=recipe.seed * 2**31 + batch.first,
        mode="plain" if recipe.adapter is None else "fused",
        # never a tuned choice, which may be another when the run is continued
        num_speculative_tokens=None if model.adapter is None else model.adapter.metadata.num_speculative_tokens,
    ).token_ids
    rows = zip(indices, responses, strict=True)
    return [response_row(index, batch.greedy, prompts[index], response) for index, response in rows]


def report(recipe: ResponsesRecipe, accelerator: Accelerator, counts: Counter[str], longest_prompt: int) -> None:
    """What is there now, and how to train on it."""
    held_out = f" data.validation_path={recipe.data.path}" if recipe.data.path in (STDLIB, PACKAGES) else ""
    accelerator.print(
        f"{counts['responses']:,} responses ({counts['greedy']:,} greedy), {counts['response_tokens']:,} tokens of the "
        f"model's own, in {recipe.output}; about them: {about_file(Path(recipe.output))}"
    )
    if counts["short"]:
        accelerator.print(f"{counts['short']:,} have fewer than {SHORT_TOKENS} tokens: they train next to nothing")
    accelerator.print(
        f"try: accelerate launch train/train_adapter.py recipes/quickstart.yaml base={recipe.base} "
        f"data.path={recipe.output} data.max_length={longest_prompt + recipe.max_new_tokens}{held_out}"
    )


if __name__ == "__main__":
    main()
