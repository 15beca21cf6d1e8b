"""Trains and evaluates one variant of a study, and keeps what came out beside it, so that nothing is done twice.

A variant has a record, `<key>.json`, beside its folder and its log. It is written aside and renamed, and names the
settings of everything in it; what was made with other settings is made again. Knows no tables.
"""

import fcntl
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils.memory import clear_device_cache
from reporting.result_files import write_json
from studies.study import Evaluation, Variant, View, settings_of

import pardec
from pardec.adapters.adapter import Adapter, AdapterError
from pardec.adapters.files import METADATA_FILE, load_adapter
from pardec.measures.acceptance import digest, measure_acceptance
from pardec.model import SelfSpeculativeModel
from pardec.run import device_name, git_commit, library_versions

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 2.0
CUT_OFF = "cut off; run again to continue"


def read_record(variant: Variant, work: Path) -> dict[str, Any]:
    """What is known of a variant: `name`, `settings`, `training` once it was begun, `views` that were measured."""
    path = work / f"{variant.key}.json"
    if not path.exists():
        return {"name": variant.name, "settings": variant.settings, "views": []}
    return json.loads(path.read_text())


@contextmanager
def alone(variant: Variant, work: Path) -> Iterator[int]:
    """Keeps others from the variant's files; gives the lock, to be handed on to what works there.

    A trainer that outlives a runner that was killed holds on to it.

    Raises:
        ValueError: if another run is at it.
    """
    work.mkdir(parents=True, exist_ok=True)
    lock = os.open(work / f"{variant.key}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{work / variant.key}: expected to be alone, found another run at it") from None
        yield lock
    finally:
        os.close(lock)


# ---------------------------------------------------------------------- training


def is_trained(record: dict[str, Any], variant: Variant, work: Path) -> bool:
    """Whether the adapter is there and whole."""
    if variant.adapter is not None:
        return True
    done = "training" in record and record["training"]["reason"] is None
    return done and (variant.directory(work) / METADATA_FILE).exists()


def train(variant: Variant, work: Path, lock: int, show: Callable[[str], None]) -> dict[str, Any]:
    """Runs the trainer, which continues where it was cut off; returns the record with what came of it.

    Args:
        variant: with a recipe.
        work: of the study.
        lock: given by `alone`.
        show: told the last line of the log now and then.
    """
    record, log = read_record(variant, work), work / f"{variant.key}.log"
    before = record.get("training", {"seconds": 0.0, "cpu_seconds": 0.0})
    command, size = variant.command(work), log.stat().st_size if log.exists() else 0

    def note(reason: str | None, cpu_seconds: float, facts: dict[str, Any]) -> None:
        spent = {"seconds": time.monotonic() - start, "cpu_seconds": cpu_seconds}
        # attempts that were cut off count too
        spent = {name: round(before[name] + value, 3) for name, value in spent.items()}
        record["training"] = {"command": command, "reason": reason, **spent, **facts}
        write_json(record, work / f"{variant.key}.json")

    start, children = time.monotonic(), _children_cpu_seconds()
    with log.open("a") as file:
        script = [sys.executable, str(ROOT / command[0]), *command[1:]]
        process = subprocess.Popen(script, stdout=file, stderr=subprocess.STDOUT, pass_fds=[lock])
    try:
        while True:
            try:
                code = process.wait(POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                times = psutil.Process(process.pid).cpu_times()
                note(CUT_OFF, times.user + times.system, {})
                show(lines_behind(log, size)[-1])
    finally:
        process.kill()
        process.wait()
    reason, facts = reason_of(code, lines_behind(log, size)), {}
    if reason is None:
        reason, facts = what_was_trained(variant, work)
    note(reason, _children_cpu_seconds() - children, facts)
    return record


def _children_cpu_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def lines_behind(log: Path, start: int, limit_bytes: int = 20_000) -> list[str]:
    """Lines of a log from byte `start` on, of its end if that is much; progress bars end lines too."""
    with log.open("rb") as file:
        file.seek(max(start, log.stat().st_size - limit_bytes))
        text = file.read().decode(errors="replace")
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()] or ["nothing"]


def reason_of(code: int, lines: Sequence[str]) -> str | None:
    """Why a trainer failed, None if it did not."""
    if code == 0:
        return None
    if code < 0:
        return f"killed by signal {-code}"
    return ([line for line in lines if line.startswith("error: ")] or lines)[-1]


def what_was_trained(variant: Variant, work: Path) -> tuple[str | None, dict[str, Any]]:
    """Why the adapter that was left is not this variant's, None if it is; and facts about it."""
    assert variant.recipe is not None
    directory = variant.directory(work)
    try:
        found = load_adapter(directory).metadata.training
    except AdapterError as error:
        return f"error: {error}", {}
    if settings_of(found["recipe"]) != variant.settings:
        return f"error: {variant.recipe_path}: expected no change while it is trained by, found one", {}
    logged = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in logged if "loss" in line]
    facts = {"steps": variant.recipe.train.steps, "best_step": found["step"], "final_loss": losses[-1]}
    train, anchors = variant.recipe.train, variant.recipe.anchors()
    rows = [variant.recipe.mask_rows(anchors, K) for K in train.grow_speculative_tokens or [None]]
    return None, {**facts, "mask_rows_per_step": train.gradient_accumulation_steps * sum(rows) // len(rows)}


# ---------------------------------------------------------------------- evaluation


def base_of(variant: Variant) -> str:
    """Name of the variant's base."""
    if variant.recipe is not None:
        return variant.recipe.base
    assert variant.adapter is not None
    return load_adapter(variant.adapter).metadata.base.name


def view_settings(
    variant: Variant, view: View, work: Path, evaluation: Evaluation, prompts: Sequence[list[int]], device: torch.device
) -> dict[str, Any]:
    """All that a view's figures depend on."""
    # records that were written before views had a shortlist know no such key
    asked = view.model_dump(exclude={"shortlist"} if view.shortlist is None else None)
    return {
        "evaluation": evaluation.model_dump(),
        "view": asked,
        "prompts": digest(prompts),
        "weights": load_adapter(variant.directory(work)).metadata.files,
        "device": device.type,
    }


def measured(record: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any] | None:
    """The figures that were measured with these settings, if any."""
    return next((one for one in record["views"] if one["settings"] == settings), None)


def evaluate(
    variant: Variant,
    work: Path,
    evaluation: Evaluation,
    prompts: Sequence[list[int]],
    device: torch.device,
    show: Callable[[str], None],
) -> None:
    """Measures the views that have not been measured with these settings, and leaves them in the record.

    Raises:
        ValueError: for an adapter that cannot be decoded with.
    """
    record, model = read_record(variant, work), None
    for view in variant.views:
        settings = view_settings(variant, view, work, evaluation, prompts, device)
        if measured(record, settings) is not None:
            continue
        model = model or pardec.load(variant.directory(work), device=device)
        show(f"decoding {len(prompts)} prompts {view.label()}")
        figures = measure(model, prompts, evaluation, view)
        made_by = {"device": device_name(device), "versions": library_versions(), "git_commit": git_commit()}
        record["views"].append({"settings": settings, **figures, **made_by})
        write_json(record, work / f"{variant.key}.json")
    del model
    clear_device_cache(garbage_collection=True)  # what it holds on the device is for the next trainer to use


def measure(
    model: SelfSpeculativeModel, prompts: Sequence[list[int]], evaluation: Evaluation, view: View
) -> dict[str, Any]:
    """Acceptance, sampled and greedy, pooled and as (accepted tokens, drafts) of each prompt."""
    assert model.adapter is not None
    # given always: without it, `generate` would go by what was tuned for some of the adapters
    K = view.num_speculative_tokens or model.adapter.metadata.num_speculative_tokens
    options: dict[str, Any] = {"max_new_tokens": evaluation.max_new_tokens, "seed": evaluation.seed}
    options |= {"num_speculative_tokens": K, "use_head": view.use_head}
    if view.shortlist is not None:
        adapter = with_shortlist(model.adapter, view.shortlist)
        model = SelfSpeculativeModel(model.base_model, model.tokenizer, adapter)
    sampled = measure_acceptance(model, prompts, temperature=evaluation.temperature, top_k=evaluation.top_k, **options)
    greedy = measure_acceptance(model, prompts, **options)
    return {
        "num_speculative_tokens": K,
        "sampled": {**sampled.to_dict(), "pairs": sampled.pairs},
        "greedy": {**greedy.to_dict(), "pairs": greedy.pairs, "outside_pairs": greedy.outside_pairs},
    }


def with_shortlist(adapter: Adapter, shortlist: int) -> Adapter:
    """The adapter, its sampler head scoring so many tokens of each mask row."""
    head = adapter.metadata.head
    assert head is not None
    metadata = adapter.metadata.model_copy(update={"head": head.model_copy(update={"shortlist": shortlist})})
    return replace(adapter, metadata=metadata)
