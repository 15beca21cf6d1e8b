"""How mask rows attend in training: one product with the real tokens, and each row with its own block only.

With one mask over all keys every mask row is multiplied with the rows of all other blocks, only to be masked. On CPUs,
whose kernels skip nothing, that is most of a training step. The route is on a model only while mask rows run, and only
where `supports` has found it to give what the model's own attention gives.
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
from pardec.target.cache import PrefixCache
from pardec.target.forward import CHUNKED, SLIDING, TargetModel, text_config
from pardec.target.survey import agree

ROUTE = "pardec_blocks"


@dataclass(frozen=True)
class Blocks:
    """Where the rows of each block are.

    Attributes:
        num_tokens: T.
        row_at: row of each block and depth, shape [N, K]; where a block is shorter, any row.
        place: N * K index of each row, shape [M].
        own_bias: added to the scores within a block, shape [K, K].
    """

    num_tokens: int
    row_at: Tensor
    place: Tensor
    own_bias: Tensor

    @classmethod
    def of(cls, layout: TrainingLayout) -> "Blocks":
        """Those of a training layout."""
        blocks, depths = layout.blocks, layout.depths
        N, K = int(blocks.max()) + 1, int(depths.max()) + 1
        place = blocks * K + depths
        row_at = torch.zeros(N * K, dtype=torch.long, device=place.device)
        row_at[place] = torch.arange(len(place), device=place.device)
        ones = torch.ones(K, K, dtype=torch.bool, device=place.device)
        bias = torch.zeros(K, K, device=place.device).masked_fill(~ones.tril(), float("-inf"))
        return cls(layout.sees_real.shape[2], row_at.view(N, K), place, bias)

    def spread(self, rows: Tensor) -> Tensor:
        """Rows, shape [..., M, D], by block and depth, shape [..., N, K, D]."""
        if self.row_at.numel() == rows.shape[-2]:
            return rows.unflatten(-2, self.row_at.shape)
        return rows.index_select(-2, self.row_at.flatten()).unflatten(-2, self.row_at.shape)

    def gather(self, spread: Tensor) -> Tensor:
        """The reverse of `spread`."""
        flat = spread.flatten(-3, -2)
        return flat if self.row_at.numel() == len(self.place) else flat.index_select(-2, self.place)


class _Here(threading.local):
    def __init__(self) -> None:
        self.blocks: Blocks | None = None
        self.calls: list[torch.nn.Module] = []


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
        key: shape [B, H, T + M, D], real tokens first.
        value: shape [B, H, T + M, D'].
        attention_mask: added to the scores of real tokens, shape [B, 1, M, T].
        dropout: 0 in a frozen model.
        scaling: of the scores.
        kwargs: what transformers passes to every attention function.
    """
    blocks = _here.blocks
    if blocks is None or attention_mask is None or attention_mask.shape[3] != blocks.num_tokens:
        stock = AttentionInterface._global_mapping[STOCK]
        return stock(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    _here.calls.append(module)
    (B, num_heads, M, D), H, T = query.shape, key.shape[1], blocks.num_tokens
    G = num_heads // H
    rows = (query * (D**-0.5 if scaling is None else scaling)).view(B, H, G, M, D)
    with_real = rows.flatten(2, 3) @ key[:, :, :T].transpose(2, 3)  # [B, H, G M, T]
    with_real = with_real.unflatten(2, (G, M)) + attention_mask[:, :, None].to(query.dtype)
    own_keys, own_values = (blocks.spread(x[:, :, T:])[:, :, None] for x in (key, value))  # [B, H, 1, N, K, D]
    with_own = blocks.spread(rows) @ own_keys.transpose(-1, -2) + blocks.own_bias.to(query.dtype)
    weights = torch.cat([with_real, blocks.gather(with_own)], dim=-1).softmax(dim=-1)
    out = (weights[..., :T].flatten(2, 3) @ value[:, :, :T]).unflatten(2, (G, M))
    out = out + blocks.gather(blocks.spread(weights[..., T:]) @ own_values)
    return out.flatten(1, 2).transpose(1, 2), None


register_route(ROUTE, block_attention)


@contextmanager
def block_route(target: TargetModel, layout: TrainingLayout) -> Iterator[list[torch.nn.Module]]:
    """Lets the layers of a model with sdpa attention take the route in this thread, and collects those that do."""
    _here.blocks, _here.calls = Blocks.of(layout), []
    try:
        with AttentionRoute(target.base, ROUTE):
            yield _here.calls
    finally:
        _here.blocks = None


def real_bias(target: TargetModel, layout: TrainingLayout, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """What the route takes as attention mask: shape [B, 1, M, T], one for each kind of layer where they are mixed."""
    B, _, T = layout.sees_real.shape
    real = torch.arange(T, device=layout.positions.device).expand(B, -1)
    masks = target.attention.render(layout.sees_real, layout.positions, real, dtype)
    zero = torch.zeros((), dtype=dtype, device=real.device)
    if isinstance(masks, Tensor):
        return torch.where(masks, zero, float("-inf"))
    return {kind: torch.where(mask, zero, float("-inf")) for kind, mask in masks.items()}


@torch.no_grad()
def supports(target: TargetModel, num_speculative_tokens: int) -> bool:
    """Whether mask rows may take the route: on a CPU, with sdpa, and with the same logits as without it."""
    form, K = target.attention, num_speculative_tokens
    # windows that end inside of a block are left to the model's own attention
    cuts_blocks = CHUNKED in form.layer_types or (SLIDING in form.layer_types and (form.window or 0) <= K)
    limit = target.max_positions
    if target.device.type != "cpu" or text_config(target.base)._attn_implementation != STOCK or cuts_blocks:
        return False
    if limit is not None and limit < 6 + K:
        return False
    with torch.autocast("cpu", enabled=False):
        return _gives_the_same(target, K)


def _gives_the_same(target: TargetModel, K: int) -> bool:
    layout = training_layout(torch.tensor([[3, 1]]), (K, max(1, K - 1)), num_tokens=6)
    ids = torch.arange(6)[None] % target.vocab_size
    cache = PrefixCache(target.num_layers)
    target.run(target.embed(ids), torch.arange(6)[None], None, cache)
    embeds = target.embed(layout.positions % target.vocab_size)
    keys = torch.cat([torch.arange(6)[None], layout.positions], dim=1)
    mask = target.attention.render(layout.visible, layout.positions, keys, target.dtype)
    expected = target.run(embeds, layout.positions, mask, cache)
    try:
        with block_route(target, layout) as calls:
            found = target.run(embeds, layout.positions, real_bias(target, layout, target.dtype), cache)
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError, KeyError):
        return False  # its own attention serves it as well
    return len(calls) == target.num_layers and agree(found, expected, target.dtype)
