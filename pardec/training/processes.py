"""The processes of a run of `train/`: how they start, in which precision they compute, what the main one logs."""

import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.tracking import GeneralTracker, on_main_process

from pardec.run import written_aside


def make_accelerator(
    mixed_precision: str, trackers: Sequence[str | GeneralTracker] = (), folder: Path | None = None
) -> Accelerator:
    """Devices, precision and trackers of the run.

    Args:
        mixed_precision: `no`, `bf16`, or `auto` for bf16 where the device computes in it.
        trackers: what is logged to.
        folder: of those that write files of their own.
    """
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
