"""One function over many items by all cores of this machine, in processes that end with the one that started them.

Knows nothing of what is done.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item", int, str)

_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux
_function: Callable[[Any], object] | None = None


def num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_all_cores(
    function: Callable[[Item], object], items: Sequence[Item], *, title: str, show_progress: bool = False
) -> None:
    """Calls the function with each item, in processes of their own where there are several items and cores.

    Not through `Dataset.map`, whose processes stay behind where this one is killed.

    Args:
        function: what it leaves behind must be files, since another process calls it.
        items: of it, integers or text.
        title: of the progress bar.
        show_progress: a bar.

    Raises:
        Exception: the first that the function raises.
        OSError: if one of the processes is killed.
    """
    cores = min(num_cores(), len(items))
    bar = tqdm(total=len(items), desc=title, disable=not show_progress, leave=False)
    with bar:
        if cores < 2:
            for item in items:
                function(item)
                bar.update()
            return
        # forked, where that is possible, processes have what the function holds without a copy
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        with (
            _one_thread_each(),
            ProcessPoolExecutor(cores, context, initializer=_begin, initargs=(function, os.getpid())) as pool,
        ):
            try:
                for one in as_completed([pool.submit(_call, item) for item in items]):
                    one.result()
                    bar.update()
            except BrokenProcessPool:
                raise OSError(
                    f"{title}: expected {cores} processes to end, found one killed, as memory may be short"
                ) from None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def _begin(function: Callable[[Any], object], parent: int) -> None:
    """What a process of the pool does first."""
    global _function
    _function = function
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)  # handlers of a run are not for its helpers
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _call(item: Any) -> None:
    assert _function is not None
    _function(item)


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
