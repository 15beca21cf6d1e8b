"""The resumable state of a training run in its folder: parameters and optimisers by step, and what else is told of it.

Knows no model and no recipe but their numbers and values.
"""

import json
import os
import shlex
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer

from pardec.errors import shown
from pardec.run import save_tensors, to_disk, writing_to, written_aside

STATE_FILE = "state.json"
# what values that a run must go on with are called
_CALLED = {
    "num_processes": "number of processes",
    "global_batch": "global batch (train.batch_size x train.gradient_accumulation_steps x processes)",
    "data_sha256": "data (sha256)",
    "base_sha256": "base (sha256 of its sizes, tokenizer and input embeddings)",
    "digest": "text, tokenizer and number of processes (sha256)",
}


def save_state(
    folder: Path,
    step: int,
    parameters: Mapping[str, Tensor],
    optimizers: Sequence[Optimizer],
    extra: dict[str, Any],
    *,
    keep: int = 1,
) -> None:
    """Writes `folder/step-N` aside and renames it, then removes older ones: a kill at any moment leaves one whole.

    It is on the disk for good before an older one goes, so that power cuts do not leave less.

    Args:
        folder: of the checkpoints.
        step: optimiser steps done.
        parameters: the trainable ones, by name, in the order of the optimisers' groups.
        optimizers: each over some of them; their state must be tensors.
        extra: JSON values to be given back.
        keep: so many of the newest stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".writing-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    target = folder / f"step-{step:09d}"
    names = {parameter: name for name, parameter in parameters.items()}
    moments = {
        f"{names[parameter]}.{key}": value.detach().cpu().contiguous()
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    with TemporaryDirectory(prefix=".writing-", dir=folder) as outer:
        aside = Path(outer) / target.name
        aside.mkdir()
        plain = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
        save_tensors(plain, aside / "parameters.safetensors")
        save_tensors(moments, aside / "optimizer.safetensors")
        with writing_to(target / STATE_FILE):
            (aside / STATE_FILE).write_text(json.dumps({"step": step, **extra}))
        for path in (*sorted(aside.iterdir()), aside):
            to_disk(path)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
        to_disk(folder)
    for older in sorted(folder.glob("step-*"))[:-keep]:
        # renamed first: one that is removed half is never taken for whole
        removed = older.with_name(f".writing-{os.getpid()}-{older.name}")
        os.replace(older, removed)
        shutil.rmtree(removed)


def add_to_state(folder: Path, values: Mapping[str, Any]) -> None:
    """Changes JSON values of the newest state in `folder`, all of them or, where a kill comes in between, none."""
    file = max(folder.glob("step-*")) / STATE_FILE
    with written_aside(file) as aside:
        aside.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def read_progress(folder: Path) -> dict[str, Any] | None:
    """The JSON values of the newest state in `folder` with its `step`, None if there is none."""
    states = sorted(folder.glob("step-*"))
    if not states:
        return None
    file = states[-1] / STATE_FILE
    try:
        progress = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: expected JSON, found {_read_error(error)}; {_way_out(states)}") from None
    is_state = isinstance(progress, dict) and type(progress.get("step")) is int
    recipe = progress.get("recipe", {}) if is_state else None
    train = recipe.get("train", {}) if isinstance(recipe, dict) else None
    if not isinstance(train, dict):
        raise ValueError(f"{file}: expected step and recipe of a run, found {shown(progress)}; {_way_out(states)}")
    if "num_processes" in progress and "gradient_accumulation_steps" in train:  # of a version that did not multiply
        of_each = train["batch_size"] * train["gradient_accumulation_steps"]
        progress.setdefault("global_batch", of_each * progress["num_processes"])
    return progress


def steps_done_before(
    output: Path, recipe: dict[str, Any], result_file: str, result: str, defaults: Mapping[str, Any] | None = None
) -> int:
    """Steps in the newest state of a run's folder, 0 for a new one.

    Args:
        output: of the run.
        recipe: the parts that a state depends on, as they were saved with it under `recipe`.
        result_file: shows that the folder holds a result.
        result: what that is called.
        defaults: of keys that recipes did not have when the state was saved; default they are None.

    Raises:
        ValueError: if the folder holds something other than a run of this recipe.
    """
    progress = read_progress(output / "checkpoints")
    if progress is None:
        is_file = output.exists() and not output.is_dir()
        if is_file or (output / result_file).exists():
            found = "a file" if is_file else result
            raise ValueError(
                f"output_dir {output}: expected a new folder or a run to continue, found {found}; choose another"
            )
        return 0
    then = progress.get("recipe", {})
    differs = _first_difference(then, recipe, defaults or {})
    if differs is not None:
        key, before, now = differs
        # the rates of a run fall towards its last step, so it is not made longer
        goes_further = key == "train.steps" and "adapter" in recipe and (output / result_file).exists()
        further = f", with {shlex.quote(f'adapter.start_from={output}')} to train it further" * goes_further
        raise ValueError(
            f"output_dir {output}: expected {key} = {shown(now)} as in this recipe to continue, found a run with "
            f"{shown(before)}; choose another output_dir{further}"
        )
    return progress["step"]


def _first_difference(
    then: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]
) -> tuple[str, Any, Any] | None:
    """(dotted key, value then, value now) of the first that differs of what `now` names."""
    for key, value in now.items():
        default = defaults.get(key)
        before = then.get(key, default)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            inner = _first_difference(before, value, default if isinstance(default, Mapping) else {})
            if inner is not None:
                return f"{key}.{inner[0]}", *inner[1:]
        elif before != value:
            return key, before, value
    return None


def check_same(output: Path, now: Mapping[str, Any]) -> None:
    """Refuses to go on with other values than those that the newest state was saved with, by name.

    Args:
        output: of the run.
        now: values by the names under which they were saved; what an older state does not have is not compared.

    Raises:
        ValueError: with the value of then and that of now.
    """
    then = read_progress(output / "checkpoints") or {}
    for name, value in now.items():
        if then.get(name, value) != value:
            raise ValueError(
                f"output_dir {output}: expected the {_CALLED.get(name, name)} that it was begun with, "
                f"{str(then[name])[:16]}, found {str(value)[:16]}; choose another output_dir or remove it"
            )


def load_state(
    folder: Path, parameters: Mapping[str, Tensor], optimizers: Sequence[Optimizer]
) -> dict[str, Any] | None:
    """Restores the newest state in `folder`; returns its JSON values with `step`, None if there is none.

    Raises:
        ValueError: if it belongs to other parameters.
    """
    states = sorted(folder.glob("step-*"))
    if not states:
        return None
    saved = _read_tensors(states, "parameters.safetensors")
    if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in parameters.items()}:
        raise ValueError(
            f"{states[-1]}: expected the parameters of this recipe ({len(parameters)}), found others ({len(saved)})"
        )
    moments: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for entry, tensor in _read_tensors(states, "optimizer.safetensors").items():
        name, _, key = entry.rpartition(".")
        # AdamW keeps its step counter on the CPU
        moments[name][key] = tensor.to("cpu" if key == "step" else parameters[name].device)
    names = {parameter: name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            optimizer.state.update({parameter: moments[names[parameter]] for parameter in group["params"]})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    return read_progress(folder)


def _read_tensors(states: Sequence[Path], name: str) -> dict[str, Tensor]:
    path = states[-1] / name
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: expected safetensors, found {_read_error(error)}; {_way_out(states)}") from None


def _read_error(error: Exception) -> str:
    return "no such file" if isinstance(error, FileNotFoundError) else str(error)


def _way_out(states: Sequence[Path]) -> str:
    """What to do about a newest state that cannot be read: of a run's states, oldest first."""
    if len(states) > 1:
        return f"remove {states[-1]} to go on from {states[-2].name}"
    return "no older one is kept: choose another output_dir"
