"""The loop around the step: memory, cache buckets, captured graphs, and when a step is read.

On CUDA the host launches one graph per step and waits for the step before it; elsewhere steps run as they are.
Legend: B sequences.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Literal

import psutil
import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from pardec.decoding.capture import Recorder, power_of_two, record_cuda_graph
from pardec.decoding.graphs import CapturedSteps
from pardec.decoding.prompt_graphs import PromptGraphs
from pardec.decoding.reports import Progress, Reports
from pardec.decoding.state import DecodeState, LiveRows
from pardec.decoding.step import Decoder
from pardec.target.cache import BufferKind, SlotCache

GIB = 2**30


class Engine:
    """Decodes one batch after another with one decoder, keeping its graphs and its cache.

    Attributes:
        decoder: makes the steps.
        state: of the batch that is running or ran last.
    """

    def __init__(
        self,
        decoder: Decoder,
        bytes_per_slot: int,
        *,
        captured: bool = False,
        recorder: Recorder = record_cuda_graph,
        make_room: Callable[[], None] = lambda: None,
        kinds: Mapping[BufferKind, int] | None = None,
    ):
        """Makes an engine.

        Args:
            decoder: makes the steps.
            bytes_per_slot: of the cache, per token and sequence.
            captured: steps and short prompts run as graphs.
            recorder: makes a graph.
            make_room: frees what it can when a cache, prefill or a capture does not fit.
            kinds: of the cache's buffers, for a decoder whose steps move them; see `SlotCache`.
        """
        self.decoder = decoder
        self.state: DecodeState | None = None
        self._bytes_per_slot = bytes_per_slot
        self._kinds = kinds
        self._free = partial(_free, make_room)  # no method: its engine would be freed by the cycle collector alone
        self._graphs = CapturedSteps(decoder, recorder, self._free) if captured else None
        self._prompt_graphs = PromptGraphs(recorder) if captured else None

    @torch.inference_mode(False)  # whose tensors do not count how often they were written to: packed layers go by that
    def run(
        self,
        prompts: list[list[int]],
        *,
        repeats: int = 1,
        between: Literal["nothing", "reads", "writes"] = "reads",
        kept: SlotCache | None = None,
        num_kept: int = 0,
    ) -> Generator[Progress, None, None]:
        """Decodes until all sequences are done; yields after prefill and for every step.

        The LoRA's hooks and packed weights, where there are any, are on the base only while this runs. On CUDA a step
        is launched before the one before it is read, so that the device never waits; the state may then be a step
        ahead of what was yielded.

        Args:
            prompts: lists of token ids.
            repeats: sequences that continue each prompt.
            between: what the caller does between two steps: `nothing`, so that what a step puts on the base may stay
                there meanwhile, and rows that are done may leave the batch until all are; `reads` what was yielded; or
                `writes` to the state, for which every step is read before the next.
            kept: of one sequence, the keys and values of the first `num_kept` tokens of the one prompt; copied.
            num_kept: fewer than the prompt has.
        """
        decoder = self.decoder
        num_sequences = len(prompts) * repeats
        state = self.state = self._begin(prompts, repeats, kept, num_kept)
        one_behind = between != "writes" and state.lengths.device.type == "cuda"
        # the most tokens that a sequence can have committed when a step begins, known to the host without waiting
        longest = max(len(prompt) for prompt in prompts)
        prompt_lengths = [len(prompt) for prompt in prompts for _ in range(repeats)]
        reports = Reports(num_sequences)
        reports.post(state, None)
        progress = reports.read()
        yield progress
        held = between == "nothing" and self._graphs is None
        # graphs and compiled code are made for a number of rows; what is read late belongs to rows as they were
        live = LiveRows(state) if held and not one_behind and decoder.forward.compile_step is None else None
        with decoder.attached() if held else nullcontext():
            while not all(progress.done):
                if live is not None:
                    live.leave(progress.done)
                    state, reports.sequences = live.state, live.sequences
                unread = int(one_behind and reports.num_posted > 0)
                state.cache.num_used = self._bucket(longest + unread * decoder.tokens_per_step, state.cache)
                with nullcontext() if held or self._graphs is not None else decoder.attached():
                    report = self._step(state)
                reports.post(state, report)
                if one_behind and reports.num_posted < 2:
                    continue
                progress = reports.read()
                each = zip(progress.num_new, progress.done, prompt_lengths, strict=True)
                longest = max((p + n - 1 for n, done, p in each if not done), default=longest)
                yield progress
        if live is not None:
            live.leave(progress.done)

    def _step(self, state: DecodeState) -> Tensor | None:
        """Launches a step; returns its report where the step has made one already."""
        if self._graphs is not None:
            return self._graphs.step()
        self.decoder.step(state)
        return None

    def _begin(self, prompts: list[list[int]], repeats: int, kept: SlotCache | None, num_kept: int) -> DecodeState:
        """The state after prefill, which is begun anew once, with the same random numbers, if memory runs out."""
        generator = self.decoder.law.generator
        drawn = None if generator is None else generator.get_state()
        try:
            return self._begun(prompts, repeats, kept, num_kept)
        except torch.OutOfMemoryError:
            pass  # as long as the error is being handled it keeps what was allocated before
        self.state = None
        self._forget_graphs()
        self._free()
        if generator is not None and drawn is not None:
            generator.set_state(drawn)
        return self._begun(prompts, repeats, kept, num_kept)

    def _forget_graphs(self) -> None:
        """Frees all graphs, with state and cache."""
        if self._graphs is not None and self._prompt_graphs is not None:
            self._graphs.forget()
            self._prompt_graphs.forget()

    def _begun(self, prompts: list[list[int]], repeats: int, kept: SlotCache | None, num_kept: int) -> DecodeState:
        decoder, num_sequences = self.decoder, len(prompts) * repeats
        longest = max(len(prompt) for prompt in prompts)
        if self._graphs is None or self._prompt_graphs is None:
            num_slots = decoder.num_slots(longest)
            if decoder.forward.compile_step is not None:  # code is compiled for the cache's size
                num_slots = self._bucket(num_slots)
            cache = self._new_cache(num_sequences, num_slots, kept, num_kept)
            return decoder.prefill(prompts, repeats=repeats, cache=cache, num_cached=num_kept)
        num_slots = decoder.num_slots(self._prompt_graphs.width(len(prompts), longest))
        B, capacity = power_of_two(num_sequences), decoder.max_new_tokens
        if self._graphs.fits(B, num_slots, capacity):
            assert self._graphs.state is not None
            cache, capacity = self._graphs.state.cache, self._graphs.capacity
            for buffer in cache.buffers:  # infinities of an earlier call would reach even rows that do not see them
                buffer.zero_()
            for buffer, begun in zip(cache.buffers, kept.buffers if kept is not None else (), strict=False):
                buffer[:, :, :num_kept] = begun[:, :, :num_kept]
        else:
            self.state = None  # free what is too small
            self._forget_graphs()
            capacity = self._bucket(capacity)
            cache = self._new_cache(B, self._bucket(num_slots), kept, num_kept)
        state = decoder.prefill(
            prompts,
            repeats=repeats,
            num_unused=B - num_sequences,
            cache=cache,
            capacity=capacity,
            num_cached=num_kept,
            graphs=self._prompt_graphs,
        )
        return self._graphs.take_over(state)

    def _new_cache(self, num_sequences: int, num_slots: int, kept: SlotCache | None, num_kept: int) -> SlotCache:
        target = self.decoder.target
        try:
            check_memory(target.device, self._bytes_per_slot, num_sequences, num_slots)
        except ValueError:
            self._free()
            check_memory(target.device, self._bytes_per_slot, num_sequences, num_slots)
        if kept is not None:
            return kept.stretched(torch.arange(num_kept, device=target.device), num_slots, self._kinds)
        return SlotCache(target.num_layers, num_slots, num_sequences, self._kinds)

    def _bucket(self, num_tokens: int, cache: SlotCache | None = None) -> int:
        """Slots to attend to when `num_tokens` may be committed before a step; without a cache, slots to allocate."""
        if cache is not None:
            num_tokens += self.decoder.num_slots_per_step
        compiled = self.decoder.forward.compile_step is not None
        on_cuda = self.decoder.target.device.type == "cuda"
        slots = bucket(num_tokens, few=compiled, coarse=on_cuda)
        return slots if cache is None else min(slots, cache.num_slots)


def bucket(num_slots: int, *, few: bool, coarse: bool) -> int:
    """Rounds up so that few graphs are captured, or, with `few`, fewer still are compiled.

    Args:
        num_slots: at least this many.
        few: multiples of 256, and of a quarter of the next power of two.
        coarse: multiples of 256, and of an eighth of the next power of two; otherwise multiples of 64.
    """
    step = max(256, power_of_two(num_slots) // (4 if few else 8)) if coarse or few else 64
    return -(-num_slots // step) * step


def check_memory(device: torch.device, bytes_per_slot: int, num_sequences: int, num_slots: int) -> None:
    """Refuses a cache that does not fit.

    Raises:
        ValueError: naming what it takes, what is free, and what would fit.
    """
    needed = bytes_per_slot * num_sequences * num_slots
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if needed > free:
            free += _reusable_bytes(device)
    elif device.type == "cpu":
        free = psutil.virtual_memory().available
    else:
        return
    if needed > free:
        fits = free // bytes_per_slot
        raise ValueError(
            f"cache: expected at most {free / GIB:.2f} GiB, free on {device}, found {needed / GIB:.2f} GiB for "
            f"{num_sequences} sequences of {num_slots} tokens; {fits // num_slots} such sequences or "
            f"{fits // num_sequences} tokens for each would fit"
        )


def _free(make_room: Callable[[], None]) -> None:
    make_room()
    clear_device_cache(garbage_collection=True)


def _reusable_bytes(device: torch.device) -> int:
    """What torch has reserved on a CUDA device and nobody uses, without the pools of graphs, which serve only them."""
    index = torch.cuda.current_device() if device.index is None else device.index
    segments = [one for one in torch.cuda.memory_snapshot() if one["device"] == index]
    common = [one for one in segments if tuple(one["segment_pool_id"]) == (0, 0)]
    return sum(one["total_size"] - one["allocated_size"] for one in common)
