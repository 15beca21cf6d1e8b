"""Prompts run as CUDA graphs, one for each number of them and range of lengths.

The forward of a short prompt takes a GPU less time than a host takes to launch it. Knows that it reads ids and lengths
and writes to a cache; not what it computes. Legend: B prompts, P padded prompt length, V vocabulary, K mask tokens.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pardec.decoding.capture import (
    CaptureSite,
    Recorder,
    cause_of,
    forbids_capture,
    is_out_of_memory,
    power_of_two,
    record_cuda_graph,
    recorded,
)
from pardec.target.cache import SlotCache

MAX_TOKENS = 1024  # of all prompts together: more of them keep a GPU longer than their launches keep the host
_LEAST_WIDTH = 32
_MAX_GRAPHS = 16  # each keeps a few MiB; the one that was used least recently goes first

# logits of each prompt's last token and of the block behind it, shape [B, 1 (+ K), V], and what the output head read
# at these rows, None where nobody asks
Computed = tuple[Tensor, Tensor | None]
Compute = Callable[[Tensor, Tensor], Computed]


class PromptGraphs:
    """Runs prompts by graphs, made when so many of about that length come for the first time.

    That first time too the graph gives the result, so that a call's numbers do not depend on those before it. Graphs
    write to one cache; with another they are made anew. Where prompts cannot be captured, they run uncaptured, after
    one warning; where there is no memory for it, without.
    """

    def __init__(self, recorder: Recorder = record_cuda_graph):
        """Args: recorder: makes a graph."""
        self._recorder = recorder
        self._graphs: OrderedDict[tuple[int, int], _Graph] = OrderedDict()
        self._cache: SlotCache | None = None
        self._site: CaptureSite | None = None
        self._captures = True

    def width(self, num_prompts: int, num_tokens: int) -> int:
        """What so many prompts of up to so many tokens are padded to."""
        width = _padded_width(num_tokens)
        return width if num_prompts * width <= MAX_TOKENS else num_tokens

    def forget(self) -> None:
        """Frees the graphs and lets go of their cache."""
        self._graphs.clear()
        self._cache = self._site = None

    def run(self, compute: Compute, padded: Tensor, lengths: Tensor, cache: SlotCache, held: object) -> Computed | None:
        """What `compute` gives, valid until the next run; None where prompts are to be run as they are.

        Args:
            compute: for prompts, shape [B, P], padded to any width, and their lengths, shape [B]; writes to `cache`.
            padded: such prompts.
            lengths: theirs.
            cache: with slots for `width` tokens and the mask tokens behind them.
            held: what else is read and must stay alive.
        """
        if self._cache is not cache:
            self.forget()
            self._cache = cache
        B, P = padded.shape
        if not self._captures or B * _padded_width(P) > MAX_TOKENS:
            return None
        key = B, self.width(B, P)
        graph = self._graphs.pop(key, None) or self._captured(compute, padded, lengths, held)
        if graph is None:
            return None
        self._graphs[key] = graph
        while len(self._graphs) > _MAX_GRAPHS:
            self._graphs.popitem(last=False)
        _fill(graph.ids, graph.lengths, padded, lengths)
        graph.replay()
        return graph.logits, graph.hidden

    def _captured(self, compute: Compute, padded: Tensor, lengths: Tensor, held: object) -> "_Graph | None":
        """A graph for such prompts; None where there can be none."""
        B, P = padded.shape
        ids, own_lengths = padded.new_empty(B, self.width(B, P)), torch.empty_like(lengths)
        _fill(ids, own_lengths, padded, lengths)
        logits, hidden = compute(ids, own_lengths)  # also allocates the cache's buffers, where a graph must find them

        def run() -> None:
            new_logits, new_hidden = compute(ids, own_lengths)
            logits.copy_(new_logits)
            if hidden is not None and new_hidden is not None:
                hidden.copy_(new_hidden)

        if self._site is None:
            self._site = CaptureSite.on(padded.device)
        try:
            replay = recorded(run, None, self._site, self._recorder)
        except (RuntimeError, NotImplementedError) as error:
            if not is_out_of_memory(error) and not forbids_capture(error):
                raise
            self._captures = False
            if not is_out_of_memory(error):
                warnings.warn(
                    f"prompts cannot be captured as a CUDA graph ({cause_of(error)}); calls begin more slowly",
                    stacklevel=2,
                )
            return None
        return _Graph(ids, own_lengths, logits, hidden, replay, held)


@dataclass(frozen=True)
class _Graph:
    """A forward of prompts on tensors that stay where they are."""

    ids: Tensor
    lengths: Tensor
    logits: Tensor
    hidden: Tensor | None
    replay: Callable[[], None]
    held: object


def _fill(ids: Tensor, own_lengths: Tensor, padded: Tensor, lengths: Tensor) -> None:
    """Makes these the prompts that are run next; what stands behind them goes on."""
    P = padded.shape[1]
    ids[:, :P] = padded
    ids[:, P:] = padded[:, -1:]
    own_lengths.copy_(lengths)


def _padded_width(num_tokens: int) -> int:
    """At most a quarter of the next power of two more, so that there are few graphs and little padding."""
    step = max(_LEAST_WIDTH, power_of_two(num_tokens) // 4)
    return -(-num_tokens // step) * step
