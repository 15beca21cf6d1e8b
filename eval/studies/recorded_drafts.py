"""Hidden states of a frozen adapter's mask rows behind many places of texts, and of the texts' own rows, seen once.

What learns from them, or is judged by them, needs no forward of the model. The rows run as in the decoder.
Legend: S texts, B of them at once, T tokens of each, N anchors of each, K num_speculative_tokens, H width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pardec.decoding.sampling import TokenLaw
from pardec.layout import RowLayout
from pardec.measures.futures import Places
from pardec.model import SelfSpeculativeModel
from pardec.target.hidden import HiddenTap

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class RecordedDrafts:
    """What was seen; mask row j of an anchor at s, j = 0..K - 1, predicts token s + 2 + j, behind token s + 1 + j.

    Attributes:
        ids: shape [S, T].
        text: hidden states of the texts' rows, as the output head reads them, shape [S, T, H].
        anchors: shape [S, N], each from 0 to T - K - 2.
        drafts: hidden states of the mask rows, shape [S, N, K, H].
    """

    ids: Tensor
    text: Tensor
    anchors: Tensor
    drafts: Tensor

    @property
    def behind(self) -> Tensor:
        """Places of the tokens before those that the mask rows predict, shape [S, N, K]."""
        return self.anchors[:, :, None] + 1 + torch.arange(self.drafts.shape[2])

    def part(self, which: Tensor) -> "RecordedDrafts":
        """Some of the texts."""
        return RecordedDrafts(self.ids[which], self.text[which], self.anchors[which], self.drafts[which])


def record(
    model: SelfSpeculativeModel,
    ids: Tensor,
    first_anchor: int,
    num_anchors: int,
    *,
    seed: int = 0,
    on_batch: Callable[[int], object] = lambda num_texts: None,
) -> RecordedDrafts:
    """Runs every text once, with a block of mask tokens behind each of N places that are drawn.

    Args:
        model: with an adapter, on a CPU.
        ids: shape [S, T].
        first_anchor: from here on blocks may hang.
        num_anchors: N.
        seed: of the places, which texts of a batch share.
        on_batch: told the number of texts that are done.

    Raises:
        ValueError: if there are not so many places.
    """
    assert model.adapter is not None
    K, T = model.adapter.metadata.num_speculative_tokens, ids.shape[1]
    places = torch.arange(first_anchor, T - K - 1)
    if len(places) < num_anchors:
        raise ValueError(f"num_anchors: expected at most {len(places)}, the places of these texts, found {num_anchors}")
    draw = torch.Generator().manual_seed(seed)
    forward = replace(model.engines.row_forward(K, None), tap=HiddenTap(model.target.base))
    rows, law, found = T + num_anchors * K, TokenLaw(True), []
    for some in ids.split(max(1, _ROWS_AT_ONCE // rows)):
        anchors = places[torch.randperm(len(places), generator=draw)[:num_anchors]].sort().values
        with forward.attached(), torch.no_grad():
            begun = Places.behind(forward, law, some[:, :1].tolist(), rows)
            begun.run(text_layout(T, anchors, K), some[:, 1:])
        assert forward.hidden is not None
        text, drafts = forward.hidden[:, :T].clone(), forward.hidden[:, T:].unflatten(1, (num_anchors, K)).clone()
        found.append(RecordedDrafts(some, text, anchors.expand(len(some), -1), drafts))
        on_batch(len(some))
    parts = zip(*((one.ids, one.text, one.anchors, one.drafts) for one in found), strict=True)
    return RecordedDrafts(*(torch.cat(some) for some in parts))


def text_layout(num_tokens: int, anchors: Tensor, num_speculative_tokens: int) -> RowLayout:
    """Rows of T tokens of a text, and behind each of N of them, shape [N], a block of K mask tokens."""
    T, N, K = num_tokens, len(anchors), num_speculative_tokens
    anchor, depth = anchors.repeat_interleave(K), torch.arange(K).repeat(N)
    block = torch.arange(N).repeat_interleave(K)
    visible = torch.zeros(T + N * K, T + N * K, dtype=torch.bool)
    visible[:T, :T] = torch.ones(T, T, dtype=torch.bool).tril()
    visible[T:, :T] = torch.arange(T) <= anchor[:, None]
    visible[T:, T:] = (block[:, None] == block) & (depth[:, None] >= depth)
    return RowLayout(T, torch.cat([torch.arange(T), anchor + 1 + depth]), visible, depth)
