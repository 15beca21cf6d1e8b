"""What the processes of a run agree on: what one of them has found, and to end together where one cannot go on.

A process that ends by itself leaves the others waiting for it, on a device for hours. Knows nothing of what they do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from pardec.errors import told
from pardec.run import UNUSABLE_INPUT

Value = TypeVar("Value")


def of_all(accelerator: Accelerator, value: Value) -> list[Value]:
    """The values of all processes, in their order; all of them must ask."""
    return gather_object([value]) if accelerator.num_processes > 1 else [value]


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether it is so in one of the processes at least; all of them must ask."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum"))  # type: ignore[arg-type]


@contextmanager
def failing_together(accelerator: Accelerator) -> Iterator[None]:
    """What is wrong with the input or the machine of one process is raised in all of them, behind what is done here.

    To be entered by all; what is done inside must not wait for other processes, which may have failed before.

    Raises:
        ValueError: in processes where nothing is wrong, what is in the first where something is.
    """
    wrong: Exception | None = None
    try:
        yield
    except UNUSABLE_INPUT as error:
        wrong = error
    if not any_process(accelerator, wrong is not None):
        return
    found = of_all(accelerator, None if wrong is None else told(wrong))
    if wrong is not None:
        raise wrong
    raise ValueError(next(one for one in found if one is not None))


@contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """What is done here the main process has done, and well, before others begin; what fails in one fails in all.

    Raises:
        ValueError: see `failing_together`.
    """
    is_main = accelerator.is_main_process
    with failing_together(accelerator):
        if is_main:
            yield
    with failing_together(accelerator):
        if not is_main:
            yield
