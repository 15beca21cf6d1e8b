"""Whether training fits into the memory that is free, in how many slices of the real tokens, and what would fit.

Knows what steps take from `memory`, and no recipe but its numbers.
Legend: B sequences, T tokens, N anchors.
"""

from collections.abc import Mapping
from contextlib import suppress

import psutil
import torch

from pardec.target.forward import UnsupportedModelError
from pardec.training.memory import measure_step
from pardec.training.module import MaskTokenTrainer
from pardec.training.prefix_memory import measure_slices
from pardec.training.prefix_pass import may_be_sliced

GIB = 2**30
_LEAST_ROWS = 64  # of a slice: fewer would cost more time than they save memory


def fit_step(
    module: MaskTokenTrainer, mask_rows: Mapping[int, int], *, batch_size: int, num_tokens: int, learned: int, free: int
) -> tuple[int, int]:
    """How the pass over real tokens is cut so that a step fits, and what the step takes so.

    Args:
        module: whose tiny steps are measured.
        mask_rows: of a forward by its anchors, the most first, which is what the run has.
        batch_size: B.
        num_tokens: T.
        learned: bytes that are still to come for what is learned.
        free: bytes.

    Returns:
        slices, as few as fit, 1 for the whole; bytes of a step.

    Raises:
        ValueError: if it does not fit, naming what would.
    """
    step, num_slices = measure_step(module), 1
    of_prefix = step.prefix.bytes_for(batch_size, num_tokens)
    if learned + of_prefix > free and may_be_sliced(module.own_head):
        slices = measure_slices(module.own_head)
        while learned + of_prefix > free and num_tokens >= 2 * num_slices * _LEAST_ROWS:
            num_slices *= 2
            of_prefix = slices.bytes_for(batch_size, num_tokens, num_slices)
    needed = {N: max(of_prefix, step.behind(batch_size, num_tokens, rows)) for N, rows in mask_rows.items()}
    (asked, of_asked), *_ = needed.items()
    checkpointed = None
    if learned + of_asked > free and not module.mask_pass.run_twice:
        with suppress(UnsupportedModelError):
            module.run_layers_twice(1.0)
            checkpointed = max(of_prefix, measure_step(module).behind(batch_size, num_tokens, mask_rows[asked]))
        module.run_layers_twice(0.0)
    check_fits(needed, learned, free, batch_size=batch_size, checkpointed=checkpointed)
    return num_slices, of_asked


def check_fits(
    needed: Mapping[int, int], learned: int, free: int, *, batch_size: int, checkpointed: int | None = None
) -> None:
    """Refuses a run that takes more than is free.

    Args:
        needed: bytes of a step by anchors of a forward, the most first, which is what the run has.
        learned: bytes that are still to come for what is learned.
        free: bytes.
        batch_size: sequences of a forward.
        checkpointed: bytes of a step with as many anchors as the run has and gradient checkpointing in all layers,
            where that is not what the run has and the model allows it.

    Raises:
        ValueError: naming what it takes, what is free, and the setting that would fit.
    """
    asked, *_ = needed
    if learned + needed[asked] <= free:
        return
    fitting = next((anchors for anchors, size in needed.items() if learned + size <= free), None)
    ways = [] if fitting is None else [f"train.anchors_per_forward={fitting}"]
    if checkpointed is not None and learned + checkpointed <= free:
        ways.append("train.gradient_checkpointing=1")
    way_out = f"not even one anchor at a time fits; lower train.batch_size, here {batch_size}, or data.max_length"
    if ways:
        way_out = f"{' or '.join(ways)} would fit"
    raise ValueError(
        f"memory: expected at most {free / GIB:.2f} GiB beside the weights, which are free, found an estimate of "
        f"{(learned + needed[asked]) / GIB:.2f} GiB with {asked} anchors a forward; {way_out}"
    )


def free_bytes(device: torch.device, num_processes: int = 1) -> int:
    """Memory that a device can still give, to each of the processes of this machine if these share it."""
    if device.type != "cuda":
        return psutil.virtual_memory().available // num_processes
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
