"""Work on a GPU captured as a CUDA graph, one launch from then on, and which failures of that leave a device usable.

Knows no decoding. What is captured reads and writes memory that must stay where it is.
"""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pardec.errors import first_line


@dataclass(frozen=True)
class CaptureSite:
    """Where graphs that never run side by side are captured.

    Attributes:
        stream: work is warmed up and captured here; also names the device.
        pool: memory that they share.
    """

    stream: torch.cuda.Stream
    pool: Any

    @classmethod
    def on(cls, device: torch.device) -> "CaptureSite | None":
        """A new site; None on devices without graphs."""
        if device.type != "cuda":
            return None
        return cls(torch.cuda.Stream(device), torch.cuda.graph_pool_handle())


Recorder = Callable[[Callable[[], None], torch.Generator | None, CaptureSite | None], Callable[[], None]]


# torch has 32 streams, which it gives out in turn: two threads may have got the same
_ONE_AT_A_TIME = threading.Lock()
# from here on torch finds by itself the generators that a graph draws from
_FINDS_GENERATORS = "2.14"  # compared as a version
# cudaErrorStreamCapture...: what is not allowed while a stream is being captured, and what follows from it
_CAPTURE_ERRORS = range(900, 910)


def record_cuda_graph(
    run: Callable[[], None], generator: torch.Generator | None, site: CaptureSite | None
) -> Callable[[], None]:
    """Captures the kernels that `run` launches and returns what launches them again.

    Args:
        run: launches work on the current device; nothing on the host may depend on its results.
        generator: that `run` draws from, if any; its state advances with every replay.
        site: where.
    """
    if site is None:
        raise RuntimeError("expected a CUDA device")
    device = site.stream.device
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        if generator is not None and torch.__version__ < _FINDS_GENERATORS:
            graph.register_generator_state(generator)
        # a capture that fails must not leave this thread on its stream; other threads may use the device meanwhile
        with (
            _usable_after_failure(generator, device),
            torch.cuda.stream(torch.cuda.current_stream(device)),
            _own_workspaces(),
            _no_collection(),
            torch.cuda.graph(graph, pool=site.pool, stream=site.stream, capture_error_mode="thread_local"),
        ):
            run()
    return graph.replay


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """Lets a graph take the workspaces of its matrix products from its own pool, where they live as long as it does.

    torch keeps one for each stream in a map that anybody may clear, as its own graph trees do before and behind each
    capture; a graph that was captured with one of these would go on writing to memory that is somebody else's by then.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keeps Python's cycle collector from freeing graphs, events and pinned memory, which would end a capture."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def _usable_after_failure(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Gives generators that a capture could have drawn from a fresh state if it fails: theirs may stay in capture."""
    used = [torch.cuda.default_generators[device.index], *([] if generator is None else [generator])]
    states = [one.clone_state() for one in used]
    try:
        yield
    except BaseException:
        for one, state in zip(used, states, strict=True):
            one.graphsafe_set_state(state)
        raise


def cause_of(error: Exception) -> str:
    """The first line of what came up first."""
    return first_line([*_causes(error)][-1])


def _causes(error: Exception) -> Iterator[Exception]:
    """An error and what was being handled when it came up, the first of all last."""
    cause: BaseException | None = error
    while isinstance(cause, Exception):
        yield cause
        cause = cause.__cause__ or cause.__context__


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; the end of a capture that fails for want of it raises another error."""
    return any(isinstance(one, torch.OutOfMemoryError) for one in _causes(error))


def forbids_capture(error: Exception) -> bool:
    """Whether what is not captured may well run; on a device that has broken down, or is full, it would not."""
    codes = [getattr(one, "error_code", None) for one in _causes(error)]
    return not is_out_of_memory(error) and all(code is None or code in _CAPTURE_ERRORS for code in codes)


def recorded(
    run: Callable[[], None],
    generator: torch.Generator | None,
    site: CaptureSite | None,
    recorder: Recorder,
    between: Callable[[], None] = lambda: None,
) -> Callable[[], None]:
    """What `recorder` makes of `run`, which has run before: its kernels are chosen and compiled by then.

    Args:
        run: as of `record_cuda_graph`.
        generator: likewise.
        site: likewise.
        recorder: makes a graph.
        between: takes back what running has changed.
    """
    with _ONE_AT_A_TIME:
        _warm_up(run, site)
        between()
        return recorder(run, generator, site)


def _warm_up(run: Callable[[], None], site: CaptureSite | None) -> None:
    if site is None:
        run()
        return
    current = torch.cuda.current_stream(site.stream.device)
    site.stream.wait_stream(current)
    with torch.cuda.stream(site.stream):
        for _ in range(2):
            run()
    current.wait_stream(site.stream)


def power_of_two(n: int) -> int:
    """The smallest one that is at least `n`: sizes are rounded up so that little is captured."""
    return 1 << (n - 1).bit_length()
