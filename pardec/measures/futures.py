"""Contexts, and rows behind each of them for many futures at once, as the decoder runs rows.

Knows no floor. Legend: B contexts, N futures of each, P leaves, R rows of a forward, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pardec.decoding.prefill import prefill_prompts
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw
from pardec.layout import RowLayout
from pardec.target.cache import SlotCache


@dataclass
class Places:
    """Contexts whose last token is run again, with whatever hangs behind it, into slots behind the rest."""

    forward: RowForward
    law: TokenLaw
    cache: SlotCache
    lengths: Tensor  # of what is before the last token, [B]
    last: Tensor  # the last token, [B, 1]

    @classmethod
    def behind(cls, forward: RowForward, law: TokenLaw, contexts: Sequence[list[int]], rows: int) -> "Places":
        """Runs the contexts; there is room for so many rows."""
        target, longest = forward.target, max(map(len, contexts))
        padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in contexts], device=target.device)
        lengths = torch.tensor([len(ids) for ids in contexts], device=target.device)
        cache = SlotCache(target.num_layers, longest + rows)
        with torch.no_grad():
            prefill_prompts(target, padded, lengths, cache, None, None)
        return cls(forward, law, cache, lengths - 1, padded.gather(1, lengths[:, None] - 1))

    def run(self, layout: RowLayout, ids: Tensor) -> Tensor:
        """Logits [B, R, V] of a layout whose real rows are the last token and `ids`, shape [B, num_real - 1]."""
        return self.forward.run(self.forward.plan(layout), self.cache, self.lengths, torch.cat([self.last, ids], dim=1))


def futures_layout(num_futures: int, length: int, num_predecessors: int = 0) -> RowLayout:
    """Rows of the last token, of N futures of `length` tokens one after another, and behind each of them P leaves."""
    N, P, t = num_futures, num_predecessors, length
    future = torch.cat([torch.arange(N).repeat_interleave(t), torch.arange(N).repeat_interleave(P)])
    depth = torch.cat([torch.arange(1, t + 1).repeat(N), torch.full((N * P,), t + 1)])
    before = (future[:, None] == future) & (depth > 0) & (depth[:, None] > depth)
    visible = torch.ones(1 + len(depth), 1 + len(depth), dtype=torch.bool).tril()
    visible[1:, 1:] = before | torch.eye(len(depth), dtype=torch.bool)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), depth])
    return RowLayout(len(offsets), offsets, visible, torch.empty(0, dtype=torch.long))
