"""One function over many items by all cores of this machine, through `datasets` where that is installed.

Knows nothing of what is done.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item", int, str)


def num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_all_cores(
    function: Callable[[Item], object], items: Sequence[Item], *, title: str, show_progress: bool = False
) -> None:
    """Calls the function with each item, in processes of their own where there are several items and cores.

    Args:
        function: what it leaves behind must be files, since another process calls it.
        items: of it, integers or text.
        title: of the progress bar.
        show_progress: a bar.

    Raises:
        Exception: the first that the function raises.
    """
    cores = min(num_cores(), len(items))
    if cores < 2 or importlib.util.find_spec("datasets") is None:
        for item in tqdm(items, title, disable=not show_progress, leave=False):
            function(item)
        return
    from datasets import Dataset

    with _one_thread_each(), _bars(show_progress):
        Dataset.from_dict({"item": list(items)}).map(
            partial(_call, function),
            num_proc=cores,
            desc=title,
            keep_in_memory=True,
            new_fingerprint=f"pardec-{os.getpid()}",  # else all that the function holds would be hashed
        )


def _call(function: Callable[[Any], object], row: dict[str, Any]) -> dict[str, Any]:
    function(row["item"])
    return row


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Tokenizers of forked processes use one thread, and say nothing about it."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """The progress bars of `datasets` as asked for, afterwards as before."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    before = is_progress_bar_enabled()
    (enable_progress_bar if shown else disable_progress_bar)()
    try:
        yield
    finally:
        (enable_progress_bar if before else disable_progress_bar)()
