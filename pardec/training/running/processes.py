"""The processes of a run of `train/`: how they start, in which precision, what the main one says and logs, and how
they are stopped."""

import atexit
import json
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.tracking import GeneralTracker, on_main_process
from torch import Tensor, nn

from pardec.run import command_line, device_name, git_commit, library_versions, writing_to, written_aside
from pardec.training.running.agreement import failing_together, of_all
from pardec.training.running.launch import refuse_other_number, refuse_other_type, refuse_other_ways
from pardec.training.running.only_run import only_run

# what a scheduler sends some time before it takes the machine away
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
STOPPED = 75  # exit code of a run that was stopped so; of sysexits.h, "try again later"
# Kept until the program ends. Whoever frees a group of processes waits for its thread; the copies of a module that
# average gradients do so without letting go of Python, which that thread may ask for: they would wait for each other.
_groups: list[Any] = []
atexit.register(_groups.clear)


def make_accelerator(
    mixed_precision: str, trackers: Sequence[str | GeneralTracker] = (), folder: Path | None = None
) -> Accelerator:
    """Devices, precision (`auto` is bf16 where the device computes in it), and trackers with the folder they need.

    Raises:
        ValueError: if the launcher distributes in a way that is not supported, or has started other processes than it
            was asked for.
    """
    environment = dict(os.environ)  # accelerate writes to it
    refuse_other_ways(environment)
    if mixed_precision == "auto":
        mixed_precision = "bf16" if bf16_pays() else "no"
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # without this, processes on CPUs would not know of each other
        # the others wait while one process reads data that nobody has read before
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=3))],
        mixed_precision=mixed_precision,
        log_with=list(trackers) or None,
        project_dir=folder,
    )
    refuse_other_type(accelerator.distributed_type)
    refuse_other_number(accelerator.num_processes, environment)
    if accelerator.num_processes > 1:
        _groups.append(torch.distributed.group.WORLD)
    return accelerator


def bf16_pays() -> bool:
    """Whether this machine's GPU, or without one its CPU, multiplies bfloat16 matrices in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


@contextmanager
def run_in(accelerator: Accelerator, output_dir: str, sizes: str, first_step: int) -> Iterator[None]:
    """Makes the run's folder its own while it lasts, says its sizes and where it goes on, and opens the trackers.

    Raises:
        ValueError: in all processes, if another run is in the folder.
        OSError: if it cannot be written to.
    """
    with ExitStack() as held:
        with failing_together(accelerator):
            if accelerator.is_main_process:
                held.enter_context(only_run(Path(output_dir), first_step))
                print(sizes)
                if first_step:
                    print(f"continuing {output_dir} at step {first_step}")
        with failing_together(accelerator):
            accelerator.init_trackers("pardec", config={})
        yield


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Gives a list of the signals of `STOP_SIGNALS` that have come meanwhile, instead of ending the process by them."""
    received: list[signal.Signals] = []
    before = {
        one: signal.signal(one, lambda number, _: received.append(signal.Signals(number))) for one in STOP_SIGNALS
    }
    try:
        yield received
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def refuse_other_state(accelerator: Accelerator, output_dir: Path, step: int) -> None:
    """Refuses processes that would go on from other checkpoints, as where machines have no folder in common.

    Raises:
        ValueError: with the steps that they have found.
    """
    steps = of_all(accelerator, step)
    if len(set(steps)) > 1:
        raise ValueError(
            f"output_dir {output_dir}: expected a folder that all processes share, found checkpoints of steps "
            f"{', '.join(map(str, steps))}"
        )


def as_steps_run_it(
    accelerator: Accelerator, module: nn.Module, parameters: Iterable[Tensor], *, base_is_sharded: bool
) -> nn.Module:
    """The training module in mixed precision, as a copy that averages its gradients with those of other processes.

    Around a sharded base, whose weights come and go, it cannot be such a copy: it stays as it is, begins with the main
    process's numbers as copies do, and `average_gradients` is left to the steps.

    Args:
        accelerator: of the run.
        module: the training module.
        parameters: what is learned.
        base_is_sharded: over several processes.
    """
    if base_is_sharded and accelerator.num_processes > 1:
        for parameter in parameters:
            torch.distributed.broadcast(parameter.detach(), src=0)
    return accelerator.prepare_model(module, device_placement=not base_is_sharded, evaluation_mode=base_is_sharded)


@torch.no_grad()
def average_gradients(accelerator: Accelerator, parameters: Iterable[Tensor]) -> None:
    """Gives the gradients of what is learned their mean over the processes, which nothing has done where a module is
    not wrapped for it; in one message."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if accelerator.num_processes == 1 or not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    mean = cast(Tensor, accelerator.reduce(flat, "mean"))  # type: ignore[arg-type]
    for gradient, part in zip(gradients, mean.split([one.numel() for one in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


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
        with writing_to(self.tracker), self.tracker.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
