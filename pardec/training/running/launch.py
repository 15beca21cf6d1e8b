"""What a launcher has started, and whether it is what was asked for: refused where it would go wrong in silence.

Knows environment variables of launchers; no model and no recipe.
"""

import os
import shlex
import sys
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from pardec.run import device_name

# of accelerate's launcher, where it is told or configured to distribute in another way than by copies of the module
_OTHER_WAYS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
# in which launchers tell how many processes there are, the innermost first
_WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_KNOWN_TYPES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def refuse_other_ways(environment: Mapping[str, str]) -> None:
    """Refuses what wraps or shards the module itself, under which its gradients were seen to be lost.

    Args:
        environment: variables of this process, as the launcher has left them.

    Raises:
        ValueError: with the command that is right.
    """
    for name, what in _OTHER_WAYS.items():
        if environment.get(name, "").lower() in ("true", "1"):
            raise ValueError(_not_this_way(what))


def refuse_other_type(distributed_type: str) -> None:
    """The same, of what accelerate has made of it.

    Raises:
        ValueError: likewise.
    """
    if distributed_type not in _KNOWN_TYPES:
        raise ValueError(_not_this_way(str(getattr(distributed_type, "value", distributed_type))))


def _not_this_way(what: str) -> str:
    return (
        "launcher: expected copies of the training module, one in each process (torchrun, or accelerate launch "
        f"--multi_gpu), found {what}; start it with {right_command('N')}; train_adapter.py shards a base that is too "
        "large for one device by train.shard_base=true"
    )


def refuse_other_number(num_processes: int, environment: Mapping[str, str]) -> None:
    """Refuses processes that do not know of each other, of which each would do all the work, or one for several.

    Args:
        num_processes: that work together.
        environment: as the launcher has left it, before anything else has written to it.

    Raises:
        ValueError: with the command that is right.
    """
    for name in _WORLD_SIZES:
        said = environment.get(name, "")
        if said.isdigit():
            if int(said) != num_processes:
                raise ValueError(
                    f"processes: expected {said} that work together, as {name} says, found {num_processes}; start "
                    f"them with {right_command(said)}"
                )
            return
    # accelerate's launcher, asked for several processes without GPUs, sets the address where they would meet, but
    # starts one
    if "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment and num_processes == 1:
        raise ValueError(
            "processes: expected several, as accelerate launch was asked for (it has set MASTER_ADDR), found one, as "
            f"without GPUs it starts no more; start them with {right_command('N')}"
        )


def right_command(num_processes: str) -> str:
    """The command that starts this program as so many processes of a machine."""
    return f"`torchrun --nproc-per-node {num_processes} {shlex.join(sys.argv)}`"


def launch_told(
    accelerator: Accelerator, *, batch_size: int, accumulation: int, max_length: int, base_is: str = "whole in each"
) -> str:
    """Two lines: the processes, their devices and how the base lies in them; the work of a step.

    Args:
        accelerator: of the run.
        batch_size: sequences per process and forward.
        accumulation: forwards of a step.
        max_length: tokens of a sequence, at most.
        base_is: how it lies in the processes.
    """
    num_processes = accelerator.num_processes
    machines = num_processes // processes_here(accelerator)
    where = f" on {machines} machines" if machines > 1 else ""
    count = f"{num_processes} processes{where}, each on" if num_processes > 1 else "1 process on"
    sequences = batch_size * accumulation * num_processes
    return (
        f"{count} {device_name(accelerator.device)}; the base {base_is if num_processes > 1 else 'whole'}\n"
        f"a step: {sequences:,} sequences ({num_processes} x train.batch_size {batch_size} x "
        f"train.gradient_accumulation_steps {accumulation}), at most {sequences * max_length:,} tokens"
    )


def processes_here(accelerator: Accelerator) -> int:
    """Those on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or accelerator.num_processes)


def idle_processors(accelerator: Accelerator) -> str:
    """A line that says how to use all processors or GPUs, if this run leaves some idle; else nothing."""
    if accelerator.device.type == "cuda":
        used, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        return f"\n{used} of {there} GPUs in use; {right_command(str(there))} uses all" if used < there else ""
    num_threads, num_cpus = torch.get_num_threads(), os.cpu_count() or 1
    local = processes_here(accelerator)
    if accelerator.device.type != "cpu" or local * num_threads >= num_cpus:
        return ""
    if accelerator.num_processes > 1:
        return f"\n{local * num_threads} of {num_cpus} processors in use; OMP_NUM_THREADS={num_cpus // local} uses all"
    command = f"accelerate launch --num_cpu_threads_per_process {num_cpus}"
    return f"\n{num_threads} of {num_cpus} processors in use; {command} uses all"
