"""Attention of mask rows to the real tokens in front of them, a slice of rows at a time, scores of own blocks beside.

A slice is multiplied with those real tokens alone that one of its rows sees, in the key/value heads as they lie in the
cache; scores are made again for the gradient instead of being kept. Real tokens are frozen and get none.
Legend: B sequences, H key/value heads, G query heads for each of them, M mask rows, T real tokens, K scores of a row
within its own block, D head size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pardec.layout import TrainingLayout
from pardec.target.placement import without_autocast

# scores at a time: 1 MiB in float32 on a CPU, which its cache holds, on a device 128 MiB; but so many rows that reading
# keys and values for them pays
_ENTRIES_ON_CPU, _ENTRIES, _LEAST_ROWS = 2**18, 2**25, 16


@dataclass(frozen=True)
class Slice:
    """Neighbouring rows and the real tokens that they look at.

    Attributes:
        rows: of the M.
        tokens: those that one of the rows sees.
        all_see: the first so many of `tokens` are seen by every row.
        number: of the slice, for what is kept of it.
    """

    rows: slice
    tokens: slice
    all_see: int
    number: tuple[int, int]


@dataclass(frozen=True)
class Seen:
    """The real tokens that mask rows see in layers of a kind: neighbours in a text.

    Attributes:
        bounds: first and last of each row, shape [B, 1, M, 2], int64.
        first: by row the least and the largest of the sequences' first ones.
        last: likewise of their last ones.
        hidden: what slices add to scores, 0 or -inf, shape [B, 1, 1, R, tokens], by their number; all layers share it.
    """

    bounds: Tensor
    first: list[tuple[int, int]]
    last: list[tuple[int, int]]
    hidden: dict[tuple[int, int], Tensor]

    @classmethod
    def of(cls, layout: TrainingLayout, on_host: TrainingLayout, window: int | None) -> "Seen":
        """Those of a layout that lies on the device and where the host reads it; a row's window counts positions."""
        bounds, of_host = (
            torch.stack([_first_seen(one, window), one.behind], dim=2)[:, None] for one in (layout, on_host)
        )
        least, most = of_host.amin(0)[0].tolist(), of_host.amax(0)[0].tolist()
        first, last = ([(a[i], b[i]) for a, b in zip(least, most, strict=True)] for i in (0, 1))
        return cls(bounds, first, last, {})

    def slices(self, num_rows: int) -> Iterator[Slice]:
        """Slices of so many rows, and one of the rest."""
        for start in range(0, len(self.first), num_rows):
            rows = slice(start, min(start + num_rows, len(self.first)))
            begin = min(least for least, _ in self.first[rows])
            end = max(most for _, most in self.last[rows]) + 1
            starts_alike = all(most == begin for _, most in self.first[rows])
            all_see = min(least for least, _ in self.last[rows]) + 1 - begin if starts_alike else 0
            yield Slice(rows, slice(begin, end), max(0, all_see), (start, num_rows))

    def hide(self, scores: Tensor, part: Slice) -> None:
        """Sets scores, shape [B, H, G, R, tokens], of tokens that a row does not see to -inf, in place."""
        if part.number not in self.hidden:
            token = torch.arange(part.tokens.start + part.all_see, part.tokens.stop, device=scores.device)
            first, last = self.bounds[:, 0, part.rows, None].unbind(3)
            is_hidden = ((token < first) | (token > last))[:, None, None]
            zeros = torch.zeros(is_hidden.shape, dtype=scores.dtype, device=scores.device)
            self.hidden[part.number] = zeros.masked_fill_(is_hidden, float("-inf"))
        scores[..., part.all_see :] += self.hidden[part.number]  # filling by a mask takes a CPU six times as long


def _first_seen(layout: TrainingLayout, window: int | None) -> Tensor:
    if window is None:
        return torch.zeros_like(layout.behind)
    # a row beyond its window looks at its anchor's neighbour, hidden by the bound behind it
    return (layout.positions - window + 1).clamp_min(0)


def prefix_attention(
    rows: Tensor, own_scores: Tensor, keys: Tensor, values: Tensor, seen: Seen
) -> tuple[Tensor, Tensor]:
    """Attention's sum over the real tokens, and the weights that are left for a row's own block.

    One softmax goes over both. Gradients go to the first two arguments.

    Args:
        rows: queries, scaled, shape [B, H, G, M, D].
        own_scores: shape [B, H, G, M, K].
        keys: of real tokens, shape [B, H, T, D].
        values: likewise, shape [B, H, T, D'].
        seen: by which row.

    Returns:
        shapes [B, H, G, M, D'] and [B, H, G, M, K].
    """
    with without_autocast(rows.device):
        return _PrefixAttention.apply(rows, own_scores, keys, values, seen)  # type: ignore[return-value]


class _PrefixAttention(torch.autograd.Function):
    """Both, keeping neither scores nor weights of real tokens."""

    @staticmethod
    def forward(ctx, rows: Tensor, own_scores: Tensor, keys: Tensor, values: Tensor, seen: Seen):  # type: ignore[override]
        out = values.new_empty(*rows.shape[:4], values.shape[3])
        own_weights = own_scores.new_empty(own_scores.shape, dtype=_exact(own_scores.dtype))
        for part in seen.slices(_rows_at_once(rows, keys)):
            weights = _weights(rows, own_scores, keys, seen, part)
            n = part.tokens.stop - part.tokens.start
            own_weights[:, :, :, part.rows] = weights[..., n:]
            found = weights[..., :n].to(values.dtype).flatten(2, 3) @ values[:, :, part.tokens]
            out[:, :, :, part.rows] = found.unflatten(2, weights.shape[2:4])
        ctx.save_for_backward(rows, own_scores, keys, values, out, own_weights)
        ctx.seen = seen
        return out, own_weights

    @staticmethod
    @once_differentiable
    def backward(ctx, of_out: Tensor, of_own: Tensor):  # type: ignore[override]
        rows, own_scores, keys, values, out, own_weights = ctx.saved_tensors
        of_rows, exact = torch.empty_like(rows), own_weights.dtype
        # what a softmax takes from every slope: their mean under the weights
        mean = (of_out * out).sum(-1, dtype=exact) + (of_own * own_weights).sum(-1)
        of_own_scores = (own_weights * (of_own - mean[..., None])).to(own_scores.dtype)
        of_out = of_out.to(values.dtype)
        with without_autocast(rows.device):
            for part in ctx.seen.slices(_rows_at_once(rows, keys)):
                n = part.tokens.stop - part.tokens.start
                weights = _weights(rows, own_scores, keys, ctx.seen, part)
                slopes = of_out[:, :, :, part.rows].flatten(2, 3) @ values[:, :, part.tokens].transpose(2, 3)
                slopes = slopes.unflatten(2, weights.shape[2:4]).to(exact)
                slopes = slopes.sub_(mean[:, :, :, part.rows, None]).mul_(weights[..., :n])
                found = slopes.to(keys.dtype).flatten(2, 3) @ keys[:, :, part.tokens]
                of_rows[:, :, :, part.rows] = found.unflatten(2, weights.shape[2:4])
        return of_rows, of_own_scores, None, None, None


def _weights(rows: Tensor, own_scores: Tensor, keys: Tensor, seen: Seen, part: Slice) -> Tensor:
    """Softmax over the slice's real tokens and each row's own block, shape [B, H, G, R, tokens + K]."""
    mine = rows[:, :, :, part.rows]
    scores = mine.flatten(2, 3) @ keys[:, :, part.tokens].transpose(2, 3)
    scores = scores.unflatten(2, mine.shape[2:4]).to(_exact(rows.dtype))
    seen.hide(scores, part)
    return torch.cat([scores, own_scores[:, :, :, part.rows].to(scores.dtype)], dim=-1).softmax(dim=-1)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def scores_at_once(device: torch.device) -> int:
    """Scores that are made at a time, unless `_LEAST_ROWS` rows have more."""
    return _ENTRIES_ON_CPU if device.type == "cpu" else _ENTRIES


def _rows_at_once(rows: Tensor, keys: Tensor) -> int:
    B, H, G, _, _ = rows.shape
    return max(_LEAST_ROWS, scores_at_once(rows.device) // (B * H * G * keys.shape[2]))
