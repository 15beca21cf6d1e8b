"""Several modes of decoding one prompt side by side, in equal time.

Whichever has used least time of its own makes the next step, so that at any moment each has got as far as it would
have alone in that time. Knows the public model; nothing of terminals.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from pardec.decoding.output import GenerationOutput, StreamChunk
from pardec.decoding.stats import pool
from pardec.model import SelfSpeculativeModel


class Lane:
    """One mode in a race.

    Attributes:
        mode: of decoding.
        seconds: that its own steps have taken so far, prefill included.
        num_tokens: emitted so far.
        out: once it has ended, what `generate` gives, with these seconds.
    """

    def __init__(self, model: SelfSpeculativeModel, prompt: str | list[int], mode: str, options: Mapping[str, Any]):
        """Arguments and errors as in `stream`, of which `options` are the rest; nothing is run yet."""
        self.mode, self.seconds, self.num_tokens = mode, 0.0, 0
        self.out: GenerationOutput | None = None
        self._device = model.target.device
        self._chunks = model.stream(prompt, mode=mode, **options)

    def step(self) -> StreamChunk | None:
        """What the next step emits; None at the end."""
        start = time.perf_counter()
        try:
            chunk = next(self._chunks)
            if self._device.type == "cuda":  # else the step that is launched ahead would run on the other's clock
                torch.cuda.synchronize(self._device)
        except StopIteration as end:
            self.out = replace(end.value, stats=pool(end.value.counts, self.seconds))
            return None
        self.seconds += time.perf_counter() - start
        self.num_tokens += len(chunk.token_ids)
        return chunk

    def close(self) -> None:
        """Gives back what it has lent, also before the end."""
        self._chunks.close()


def race(lanes: Sequence[Lane]) -> Iterator[tuple[Lane, StreamChunk]]:
    """Runs all to their end; yields what each step emits, with the lane that made it."""
    running = list(lanes)
    with ExitStack() as stack:
        for lane in lanes:
            stack.callback(lane.close)
        while running:
            lane = min(running, key=lambda one: one.seconds)
            chunk = lane.step()
            if chunk is None:
                running.remove(lane)
            else:
                yield lane, chunk
