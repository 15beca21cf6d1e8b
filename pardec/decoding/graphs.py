"""One step as one CUDA graph: captured once for each batch size and cache bucket, replayed from then on.

Knows that a step reads and writes the tensors of a state; not what it computes.
"""

import warnings
from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from pardec.decoding.capture import (
    CaptureSite,
    Recorder,
    cause_of,
    forbids_capture,
    is_out_of_memory,
    record_cuda_graph,
    recorded,
)
from pardec.decoding.state import DecodeState
from pardec.decoding.step import Decoder


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
                if not forbids_capture(error):
                    raise
                B, R = self.state.lengths.shape[0], self.decoder.rows_per_step
                warnings.warn(
                    f"a step of {B} sequences and {R} rows cannot be captured as a CUDA graph "
                    f"({cause_of(error)}); steps run uncaptured, which is slower",
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
            if not is_out_of_memory(error):
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
            replay = recorded(run, generator, self._site, self._recorder, between=lambda: _copy(saved, state))
            self._held.append(self.decoder.forward.held)
            return replay
        finally:
            _copy(saved, state)
            if generator is not None and drawn is not None:
                generator.set_state(drawn)


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
