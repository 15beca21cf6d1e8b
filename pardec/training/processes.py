"""The processes of a run of `train/`: how they start, in which precision, what the main one says and logs."""

import json
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.tracking import GeneralTracker, on_main_process

from pardec.run import command_line, device_name, git_commit, library_versions, written_aside


def make_accelerator(
    mixed_precision: str, trackers: Sequence[str | GeneralTracker] = (), folder: Path | None = None
) -> Accelerator:
    """Devices, precision (`auto` is bf16 where the device computes in it), and trackers with the folder they need."""
    if mixed_precision == "auto":
        mixed_precision = "bf16" if bf16_pays() else "no"
    return Accelerator(
        cpu=not torch.cuda.is_available(),  # without this, processes on CPUs would not know of each other
        # the others wait while one process reads data that nobody has read before, or measures
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=3))],
        mixed_precision=mixed_precision,
        log_with=list(trackers) or None,
        project_dir=folder,
    )


def bf16_pays() -> bool:
    """Whether this machine's GPU, or without one its CPU, multiplies bfloat16 matrices in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def begin_run(accelerator: Accelerator, output_dir: str, sizes: str, first_step: int) -> None:
    """Makes the run's folder, says its sizes and where it goes on, and opens the trackers."""
    if accelerator.is_main_process:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        print(sizes)
        if first_step:
            print(f"continuing {output_dir} at step {first_step}")
    accelerator.wait_for_everyone()
    accelerator.init_trackers("pardec", config={})


def idle_processors(accelerator: Accelerator) -> str:
    """A line that says how to use all processors, if this run leaves some idle; else nothing."""
    num_threads, num_cpus = torch.get_num_threads(), os.cpu_count() or 1
    if accelerator.device.type != "cpu" or accelerator.num_processes * num_threads >= num_cpus:
        return ""
    command = f"accelerate launch --num_cpu_threads_per_process {num_cpus}"
    return f"\n{num_threads} of {num_cpus} processors in use; {command} uses all"


def made_by(accelerator: Accelerator) -> dict[str, Any]:
    """What the results of a run are made by."""
    return {
        "command": command_line(),
        "git_commit": git_commit(),
        "versions": library_versions(),
        "device": device_name(accelerator.device),
        "num_processes": accelerator.num_processes,
    }


class JsonlTracker(GeneralTracker):
    """Appends every logged dict as one line of JSON; the tracker that needs nothing installed."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path, keep_until_step: int = 0):
        """`path` is appended to; lines of steps after `keep_until_step`, which will be run again, are dropped.

        Touches no file and asks nothing of accelerate, whose Accelerator may not exist yet.
        """
        self.tracker = path
        self.keep_until_step = keep_until_step
        super().__init__()

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Drops what will be logged again; the configuration itself is kept elsewhere."""
        if self.tracker.exists():
            kept = [line for line in self.tracker.read_text().splitlines(keepends=True) if self._is_kept(line)]
            with written_aside(self.tracker) as aside:
                aside.write_text("".join(kept))

    def _is_kept(self, line: str) -> bool:
        try:
            return 0 < self.keep_until_step >= json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):  # the end of a file whose writer was killed
            return False

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        """One line: the step and the values."""
        with self.tracker.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
