"""How mask rows attend in training: to the real tokens as they lie in the cache, and each row to its own block.

With one mask over all keys every mask row is multiplied with the rows of all other blocks and with real tokens behind
its anchor, only to be masked, and every layer copies the prefix, for each query head of a group where heads share keys.
Here rows go a slice at a time against those real tokens that one of them sees (`prefix_attention`). The route is on a
model only while mask rows run, and only where `supports` has found it to give what the model's own attention gives.
Legend: B sequences, H key/value heads, G query heads for each of them, M mask rows, T real tokens, N blocks of up to
K mask rows, D head size.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface

from pardec.layout import TrainingLayout, training_layout
from pardec.target.attention import STOCK, AttentionRoute, register_route
from pardec.target.forward import CHUNKED, SLIDING, TargetModel, text_config
from pardec.target.own_head import OwnHead
from pardec.target.placement import without_autocast
from pardec.target.prefix_cache import PrefixCache
from pardec.target.survey import agree
from pardec.training.mask_rows.prefix_attention import Seen, prefix_attention

ROUTE = "pardec_blocks"


@dataclass(frozen=True)
class Blocks:
    """Where the rows of each block are.

    Attributes:
        row_at: row of each block and depth, shape [N, K]; where a block is shorter, any row.
        place: N * K index of each row, shape [M].
        own_bias: added to the scores within a block, shape [K, K].
    """

    row_at: Tensor
    place: Tensor
    own_bias: Tensor

    @classmethod
    def of(cls, layout: TrainingLayout) -> "Blocks":
        """Those of a training layout."""
        N, K = len(layout.block_lengths), max(layout.block_lengths)
        place = layout.blocks * K + layout.depths
        row_at = torch.zeros(N * K, dtype=torch.long, device=place.device)
        row_at[place] = torch.arange(len(place), device=place.device)
        ones = torch.ones(K, K, dtype=torch.bool, device=place.device)
        bias = torch.zeros(K, K, device=place.device).masked_fill(~ones.tril(), float("-inf"))
        return cls(row_at.view(N, K), place, bias)

    def spread(self, rows: Tensor) -> Tensor:
        """Rows, shape [..., M, D], by block and depth, shape [..., N, K, D]."""
        if self.row_at.numel() == rows.shape[-2]:
            return rows.unflatten(-2, self.row_at.shape)
        return rows.index_select(-2, self.row_at.flatten()).unflatten(-2, self.row_at.shape)

    def gather(self, spread: Tensor) -> Tensor:
        """The reverse of `spread`."""
        flat = spread.flatten(-3, -2)
        return flat if self.row_at.numel() == len(self.place) else flat.index_select(-2, self.place)


@dataclass(frozen=True)
class BlockRoute:
    """The rows that are on the route, and what becomes of them.

    Attributes:
        blocks: of the rows.
        seen: the real tokens that they see, for each kind of layer.
        mask: what the model takes as attention mask: `Seen.bounds`, one for each kind where they are mixed.
        cache: with the prefix.
        calls: layers that have taken the route.
    """

    blocks: Blocks
    seen: dict[str, Seen]
    mask: Tensor | dict[str, Tensor]
    cache: PrefixCache
    calls: list[torch.nn.Module]

    @classmethod
    def of(
        cls, target: TargetModel, layout: TrainingLayout, on_host: TrainingLayout, cache: PrefixCache
    ) -> "BlockRoute":
        """Of rows.

        Args:
            target: the model.
            layout: of the mask rows, on its device.
            on_host: the same where the host can read it.
            cache: with the prefix.
        """
        form = target.attention
        windows = {kind: form.window if kind == SLIDING else None for kind in form.layer_types}
        seen = {kind: Seen.of(layout, on_host, window) for kind, window in windows.items()}
        masks = {kind: one.bounds for kind, one in seen.items()}
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        return cls(Blocks.of(layout), seen, mask, cache, [])

    @contextmanager
    def on(self, target: TargetModel) -> Iterator[None]:
        """Lets the layers of a model with sdpa attention take the route in this thread."""
        _here.route = self
        try:
            with AttentionRoute(target.base, ROUTE), self.cache.apart():
                yield
        finally:
            _here.route = None

    def seen_under(self, mask: Tensor | None) -> Seen | None:
        """Of the kind of layer whose mask this is; None if it is another's."""
        if mask is None or mask.dtype != torch.long:
            return None
        return next((seen for seen in self.seen.values() if seen.bounds is mask), None)


class _Here(threading.local):
    route: BlockRoute | None = None


_here = _Here()


def block_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of mask rows in transformers' attention interface; any other call is passed on to its sdpa.

    Args:
        module: the attention layer.
        query: shape [B, H G, M, D].
        key: of the mask rows, shape [B, H, M, D].
        value: likewise, shape [B, H, M, D'].
        attention_mask: of the route, see `BlockRoute`.
        dropout: 0 in a frozen model.
        scaling: of the scores.
        kwargs: what transformers passes to every attention function.
    """
    route = _here.route
    seen = None if route is None else route.seen_under(attention_mask)
    if route is None or seen is None:
        stock = AttentionInterface._global_mapping[STOCK]
        return stock(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    route.calls.append(module)
    real_keys, real_values = route.cache.prefix_of_layer()
    (B, num_heads, M, D), H, blocks = query.shape, key.shape[1], route.blocks
    rows = (query * (D**-0.5 if scaling is None else scaling)).to(real_keys.dtype).view(B, H, num_heads // H, M, D)
    own_keys, own_values = (blocks.spread(x)[:, :, None] for x in (key, value))  # [B, H, 1, N, K, D]
    own_scores = blocks.gather(blocks.spread(rows) @ own_keys.transpose(-1, -2) + blocks.own_bias.to(query.dtype))
    out, own_weights = prefix_attention(rows, own_scores, real_keys, real_values, seen)
    out = out + blocks.gather(blocks.spread(own_weights.to(own_values.dtype)) @ own_values)
    return out.to(query.dtype).flatten(1, 2).transpose(1, 2), None


register_route(ROUTE, block_attention)


@torch.no_grad()
def supports(own_head: OwnHead, num_speculative_tokens: int) -> bool:
    """Whether mask rows may take the route: with sdpa, and with the same hidden states as without it."""
    target, K = own_head.target, num_speculative_tokens
    form, limit = target.attention, target.max_positions
    # windows that end inside of a block are left to the model's own attention
    cuts_blocks = CHUNKED in form.layer_types or (SLIDING in form.layer_types and (form.window or 0) <= K)
    if text_config(target.base)._attn_implementation != STOCK or cuts_blocks:
        return False
    if limit is not None and limit < 6 + K:
        return False
    with without_autocast(target.device):
        return _gives_the_same(own_head, K)


def _gives_the_same(own_head: OwnHead, K: int) -> bool:
    target, device = own_head.target, own_head.target.device
    on_host = training_layout(torch.tensor([[3, 1]]), (K, max(1, K - 1)), num_tokens=6)
    layout = on_host.to(device)
    real = torch.arange(6, device=device)[None]
    cache = PrefixCache(target.num_layers)
    own_head.hidden(target.embed(real % target.vocab_size), real, None, cache)
    embeds = target.embed(layout.positions % target.vocab_size)
    keys = torch.cat([real, layout.positions], dim=1)
    mask = target.attention.render(layout.visible, layout.positions, keys, target.dtype)
    expected = own_head.hidden(embeds, layout.positions, mask, cache)
    try:
        route = BlockRoute.of(target, layout, on_host, cache)
        with route.on(target):
            found = own_head.hidden(embeds, layout.positions, route.mask, cache)
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError, KeyError):
        return False  # its own attention serves it as well
    return len(route.calls) == target.num_layers and agree(found, expected, target.dtype)
