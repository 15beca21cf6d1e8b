"""What every script needs around its work: one-line errors, provenance, JSONL metrics, resumable state.

Knows nothing of models or decoding.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import GeneralTracker, on_main_process
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

STATE_FILE = "state.json"


@contextmanager
def exit_on_unusable_input() -> Iterator[None]:
    """Turns errors about input into one line on standard error and exit code 2; set PARDEC_TRACEBACK=1 to see all."""
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("PARDEC_TRACEBACK") == "1":
            raise
        message = " ".join((str(error) or type(error).__name__).split())
        tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, also below a progress bar
        sys.exit(2)


def library_versions() -> dict[str, str]:
    """Versions of what results depend on."""
    names = ("torch", "transformers", "peft", "accelerate", "safetensors")
    return {"python": platform.python_version(), "pardec": version("pardec")} | {n: version(n) for n in names}


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return f"{model}, {torch.get_num_threads()} threads"


def bf16_pays() -> bool:
    """Whether this machine's GPU, or without one its CPU, multiplies bfloat16 matrices in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def resolve_precision(mixed_precision: str) -> str:
    """What a recipe's `mixed_precision` means on this machine: `no` or `bf16`."""
    if mixed_precision == "auto":
        return "bf16" if bf16_pays() else "no"
    return mixed_precision


def command_line() -> str:
    """The command as it was typed, without the interpreter's path."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def git_commit() -> str | None:
    """Commit of the working tree that the script lies in, with -dirty for local changes; None outside of one."""
    folder = Path(sys.argv[0]).resolve().parent
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder, capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None if out.returncode == 0 else None


class JsonlTracker(GeneralTracker):
    """Appends every logged dict as one line of JSON; the tracker that needs nothing installed."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path, keep_until_step: int = 0):
        """`path` is appended to; lines of steps after `keep_until_step`, which will be run again, are dropped.

        Touches no file and asks nothing of accelerate, whose Accelerator may not exist yet.
        """
        super().__init__()
        self.path = path
        self.keep_until_step = keep_until_step

    @property
    def tracker(self) -> Path:
        """The file."""
        return self.path

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Drops what will be logged again; the configuration itself is kept elsewhere."""
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines(keepends=True) if self._is_kept(line)]
            aside = self.path.with_suffix(".new")
            aside.write_text("".join(kept))
            os.replace(aside, self.path)

    def _is_kept(self, line: str) -> bool:
        try:
            return 0 < self.keep_until_step >= json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):  # the end of a file whose writer was killed
            return False

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        """One line: the step and the values."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def save_state(
    folder: Path,
    step: int,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    extra: dict[str, Any],
) -> None:
    """Writes `folder/step-N` aside and renames it, then removes older ones: a kill at any moment leaves one whole.

    Args:
        folder: of the checkpoints.
        step: optimiser steps done.
        parameters: the trainable ones, by name, in the order of the optimiser's groups.
        optimizer: over them, or several, each over some of them; their state must be tensors.
        extra: JSON values to be given back.
    """
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".writing-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        names = {parameter: name for name, parameter in parameters.items()}
        moments = {
            f"{names[parameter]}.{key}": value.detach().cpu().contiguous()
            for one in _as_list(optimizer)
            for parameter, state in one.state.items()
            for key, value in state.items()
        }
        save_file({n: p.detach().cpu().contiguous() for n, p in parameters.items()}, aside / "parameters.safetensors")
        save_file(moments, aside / "optimizer.safetensors")
        (aside / STATE_FILE).write_text(json.dumps({"step": step, **extra}))
        target = folder / f"step-{step:09d}"
        shutil.rmtree(target, ignore_errors=True)
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for older in sorted(folder.glob("step-*"))[:-1]:
        shutil.rmtree(older)


def read_progress(folder: Path) -> dict[str, Any] | None:
    """The JSON values of the newest state in `folder` with its `step`, None if there is none."""
    states = sorted(folder.glob("step-*"))
    if not states:
        return None
    try:
        return json.loads((states[-1] / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{states[-1] / STATE_FILE}: expected JSON, found {error}; remove {states[-1]}") from None


def steps_done_before(output: Path, recipe: dict[str, Any], result_file: str, result: str) -> int:
    """Steps in the newest state of a run's folder, 0 for a new one.

    Args:
        output: of the run.
        recipe: the parts that a state depends on, as they were saved with it under `recipe`.
        result_file: shows that the folder holds a result.
        result: what that is called.

    Raises:
        ValueError: if the folder holds something other than a run of this recipe.
    """
    progress = read_progress(output / "checkpoints")
    if progress is None:
        is_file = output.exists() and not output.is_dir()
        if is_file or (output / result_file).exists():
            found = "a file" if is_file else result
            raise ValueError(f"output_dir {output}: expected an empty folder or a run to continue, found {found}")
        return 0
    then = progress["recipe"]
    for section in recipe:
        if then.get(section) != recipe[section]:
            raise ValueError(
                f"output_dir {output}: expected a run of the same recipe to continue, found one with {section} = "
                f"{then.get(section)}; choose another output_dir or remove it"
            )
    return progress["step"]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: expected safetensors, found {error}; remove {path.parent}") from None


def load_state(
    folder: Path,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
) -> dict[str, Any] | None:
    """Restores the newest state in `folder`; returns its JSON values with `step`, None if there is none.

    Raises:
        ValueError: if it belongs to other parameters.
    """
    states = sorted(folder.glob("step-*"))
    if not states:
        return None
    saved = _read_tensors(states[-1] / "parameters.safetensors")
    if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in parameters.items()}:
        raise ValueError(
            f"{states[-1]}: expected the parameters of this recipe ({len(parameters)}), found others ({len(saved)})"
        )
    moments: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for entry, tensor in _read_tensors(states[-1] / "optimizer.safetensors").items():
        name, _, key = entry.rpartition(".")
        # AdamW keeps its step counter on the CPU
        moments[name][key] = tensor.to("cpu" if key == "step" else parameters[name].device)
    names = {parameter: name for name, parameter in parameters.items()}
    for one in _as_list(optimizer):
        for group in one.param_groups:
            one.state.update({parameter: moments[names[parameter]] for parameter in group["params"]})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    return read_progress(folder)


def _as_list(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
) -> Sequence[torch.optim.Optimizer]:
    return optimizer if isinstance(optimizer, Sequence) else [optimizer]
