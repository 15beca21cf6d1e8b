"""One step as one CUDA graph: captured once for each batch size and cache bucket, replayed from then on.

Knows that a step reads and writes the tensors of a state; not what it computes.
"""

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pardec.decoding.state import DecodeState
from pardec.decoding.step import Decoder
from pardec.errors import first_line


@dataclass(frozen=True)
class CaptureSite:
    """Where the graphs of one state are captured.

    Attributes:
        stream: work is warmed up and captured here; also names the device.
        pool: memory that they share, as they never run side by side.
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
_one_at_a_time = threading.Lock()
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


def _causes(error: Exception) -> Iterator[Exception]:
    """An error and what was being handled when it came up, the first of all last."""
    cause: BaseException | None = error
    while isinstance(cause, Exception):
        yield cause
        cause = cause.__cause__ or cause.__context__


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; the end of a capture that fails for want of it raises another error."""
    return any(isinstance(one, torch.OutOfMemoryError) for one in _causes(error))


def _forbids_capture(error: Exception) -> bool:
    """Whether steps that are not captured may well run; a device that has broken down, or is full, they would not."""
    codes = [getattr(one, "error_code", None) for one in _causes(error)]
    return not _is_out_of_memory(error) and all(code is None or code in _CAPTURE_ERRORS for code in codes)


class CapturedSteps:
    """Runs a decoder's steps on one state whose tensors stay where they are, by replaying graphs.

    The state's cache and shapes are fixed by the first state that is taken over; `fits` says whether another one can
    be. Where a step cannot be captured, steps run uncaptured, after one warning.
    """

    def __init__(
        self,
        decoder: Decoder,
        recorder: Recorder = record_cuda_graph,
        make_room: Callable[[], None] = lambda: None,
    ):
        """Args: decoder; recorder: makes a graph; make_room: frees what it can where a capture runs out of memory."""
        self.decoder = decoder
        decoder.is_recorded = True
        self._make_room = make_room
        self.state: DecodeState | None = None
        self._recorder = recorder
        self._replays: dict[int, Callable[[], None]] = {}
        self._held: list[object] = []
        self._report: Tensor = torch.empty(0)
        self._site: CaptureSite | None = None
        self._failed = False

    def forget(self) -> None:
        """Frees graphs and state; the next state is taken over whatever its shapes are."""
        self.state = self._site = None
        self._report = torch.empty(0)
        self._replays.clear()
        self._held.clear()

    def fits(self, batch_size: int, num_slots: int, capacity: int) -> bool:
        """Whether a state of that many sequences, cache slots and new tokens can be taken over."""
        state = self.state
        if state is None or state.lengths.shape[0] != batch_size:
            return False
        return state.cache.num_slots >= num_slots and self.capacity >= capacity

    @property
    def capacity(self) -> int:
        """New tokens that the state can hold."""
        return 0 if self.state is None else self.state.output.shape[1] - self.decoder.tokens_per_step

    def take_over(self, state: DecodeState) -> DecodeState:
        """Makes a freshly prefilled state the one that graphs run on, and returns it.

        It must share the cache of the state before, if that is to be kept with its graphs.
        """
        if self.state is None or self.state.cache is not state.cache or not _same_shapes(self.state, state):
            self.state = state
            self._report = state.report()
            self._replays.clear()
            self._held.clear()
            self._site = CaptureSite.on(state.lengths.device)
            return state
        self.state.prompts = state.prompts  # of another width; read by no graph
        _copy(state, self.state)
        return self.state

    def step(self) -> Tensor | None:
        """One step on the state, whose attention sees `state.cache.num_used` slots; returns its report if captured.

        Raises:
            torch.OutOfMemoryError: if there is no room to capture it, also after room was made.
        """
        assert self.state is not None
        if self._failed:
            return self._uncaptured()
        num_used = self.state.cache.num_used
        if num_used not in self._replays:
            try:
                self._replays[num_used] = self._captured(self.state)
            except (RuntimeError, NotImplementedError) as error:
                if not _forbids_capture(error):
                    raise
                B, R = self.state.lengths.shape[0], self.decoder.rows_per_step
                warnings.warn(
                    f"a step of {B} sequences and {R} rows cannot be captured as a CUDA graph "
                    f"({first_line([*_causes(error)][-1])}); steps run uncaptured, which is slower",
                    stacklevel=2,
                )
                self._failed = True
                return self._uncaptured()
        self._replays[num_used]()
        return self._report

    def _uncaptured(self) -> None:
        assert self.state is not None
        with self.decoder.attached():
            self.decoder.step(self.state)

    def _captured(self, state: DecodeState) -> Callable[[], None]:
        """As `_capture`, a second time if memory runs out."""
        try:
            return self._capture(state)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        self._make_room()
        return self._capture(state)

    def _capture(self, state: DecodeState) -> Callable[[], None]:
        """A graph of one step for the cache's present bucket; the state is left as it was."""
        saved = _clone(state)
        generator = self.decoder.law.generator
        drawn = None if generator is None else generator.get_state()

        def run() -> None:
            work = replace(state)
            with self.decoder.attached():
                self.decoder.step(work)
            _copy(work, state)
            self._report.copy_(work.report())

        try:
            # kernels are chosen and compiled before the capture; slots behind the committed tokens are overwritten by
            # the next step, so the cache needs no saving
            with _one_at_a_time:
                _warm_up(run, self._site)
                _copy(saved, state)
                self._held.append(self.decoder.forward.held)
                return self._recorder(run, generator, self._site)
        finally:
            _copy(saved, state)
            if generator is not None and drawn is not None:
                generator.set_state(drawn)


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


def _tensors(state: DecodeState) -> dict[str, Tensor]:
    """What a step may change or read, the cache and the prompts aside."""
    found = {f.name: getattr(state, f.name) for f in fields(DecodeState) if f.name not in ("cache", "prompts")}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _same_shapes(a: DecodeState, b: DecodeState) -> bool:
    return {n: t.shape for n, t in _tensors(a).items()} == {n: t.shape for n, t in _tensors(b).items()}


def _clone(state: DecodeState) -> DecodeState:
    return replace(state, **{name: tensor.clone() for name, tensor in _tensors(state).items()})


def _copy(source: DecodeState, target: DecodeState) -> None:
    old = _tensors(target)
    for name, tensor in _tensors(source).items():
        if tensor is not old[name]:
            old[name].copy_(tensor)
