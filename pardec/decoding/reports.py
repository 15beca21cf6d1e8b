"""What steps report, on its way from the device to the host.

Knows states, no steps. On CUDA a report is read when its copy to pinned memory has arrived, elsewhere at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pardec.decoding.state import DecodeState


@dataclass(frozen=True)
class Progress:
    """What a step, or prefill, has brought; one entry per sequence.

    Attributes:
        num_new: emitted tokens so far.
        done: whether EOS or the length limit was met.
        num_accepted: drafts that the step accepted; 0 after prefill.
        num_copied: copied tokens that it accepted behind them.
        tokens: ids that the step emitted.
    """

    num_new: list[int]
    done: list[bool]
    num_accepted: list[int]
    num_copied: list[int]
    tokens: list[list[int]]


class Reports:
    """What steps report, on its way from the device to the host; at most two at a time.

    Attributes:
        num_posted: reports on their way.
        sequences: that the rows decode, in their order; more rows report nothing.
    """

    def __init__(self, num_sequences: int):
        """Args: num_sequences: of the batch, before any of them leaves it."""
        self.num_posted = 0
        self.sequences = list(range(num_sequences))
        self._num_new = [0] * num_sequences
        self._done = [False] * num_sequences
        self._waiting: list[list[list[int]] | tuple[Tensor, torch.cuda.Event]] = []
        self._buffers: list[Tensor] = []

    def post(self, state: DecodeState, report: Tensor | None) -> None:
        """Starts on its way what the last step did."""
        self.num_posted += 1
        if state.lengths.device.type != "cuda":
            n = len(self.sequences)
            columns = (state.num_new, state.done, state.num_accepted, state.num_copied, state.tokens)
            rows = zip(*(column.tolist()[:n] for column in columns), strict=True)
            self._waiting.append([[*counts, *tokens] for *counts, tokens in rows])
            return
        report = state.report() if report is None else report
        if len(self._buffers) < 2:
            self._buffers.append(torch.empty(report.shape, dtype=report.dtype, pin_memory=True))
        self._buffers.reverse()  # the two take turns
        self._buffers[0].copy_(report, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(report.device))
        self._waiting.append((self._buffers[0], event))

    def read(self) -> Progress:
        """Waits for the oldest report."""
        oldest = self._waiting.pop(0)
        self.num_posted -= 1
        if isinstance(oldest, tuple):
            buffer, event = oldest
            event.synchronize()
            oldest = buffer[: len(self.sequences)].tolist()
        before, self._num_new, self._done = self._num_new, self._num_new.copy(), self._done.copy()
        num_accepted, num_copied, tokens = [0] * len(before), [0] * len(before), [[] for _ in before]
        for sequence, row in zip(self.sequences, oldest, strict=True):
            self._num_new[sequence], self._done[sequence] = row[0], bool(row[1])
            num_accepted[sequence], num_copied[sequence] = row[2:4]
            tokens[sequence] = row[4 : 4 + row[0] - before[sequence]]
        return Progress(self._num_new, self._done, num_accepted, num_copied, tokens)
