"""A third way for steps to attend, to be measured beside the engine's own: FlexAttention over the used blocks.

The kernel is told, by numbers on the device, which blocks of keys and values hold anything that rows may see, so that
its cost follows the committed length and not the cache bucket; the host reads nothing. For models without windows.
Query heads of a group are further rows, as in the engine's own route: the kernel that splits the keys takes groups of
a power of two only, and no configuration of it holds more than 128 rows of all heads of a group.
Legend: B batch, H key/value heads, G query heads for each of them, R rows, S slots attended to, D head size.
"""

from typing import cast

import torch
from timing.split_route import num_parts
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions, flex_attention
from transformers import AttentionInterface

from pardec.decoding.rows import RowForward, RowPlan
from pardec.target.attention import STOCK, AttentionRoute, register_route
from pardec.target.cache import SlotCache
from pardec.target.compiling import compiled

ROUTE = "pardec_flex"
BLOCK = 128  # slots, and rows; the kernels' own default


def step_block_mask(plan: RowPlan, lengths: Tensor, num_slots: int, query_group: int) -> BlockMask:
    """What the rows of a step see, as blocks: full ones before the committed length, masked ones up to the last row.

    Args:
        plan: of the step's layout.
        lengths: committed tokens, shape [B].
        num_slots: S; the rows' own slots are among them.
        query_group: G; row g R + r of the mask is row r.
    """
    R, device = plan.layout.num_rows, lengths.device
    num_query_blocks, num_key_blocks = -(-query_group * R // BLOCK), -(-num_slots // BLOCK)
    num_full = lengths // BLOCK
    num_partial = (lengths + R + BLOCK - 1) // BLOCK - num_full
    index = torch.arange(num_key_blocks, device=device)
    after_full = (num_full[:, None] + index).clamp_max(num_key_blocks - 1)

    def for_all_rows(blocks: Tensor) -> Tensor:
        return blocks.to(torch.int32)[:, None, None].expand(-1, 1, num_query_blocks, *blocks.shape[1:]).contiguous()

    visible = plan.visible_by_kind

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        # 0: committed, 1..R: rows of this forward, R + 1: stale
        kind = (kv + 1 - lengths[b]).clamp(0, R + 1)
        return visible[kind, q % R]

    return BlockMask.from_kv_blocks(
        for_all_rows(num_partial),
        for_all_rows(after_full),
        for_all_rows(num_full),
        for_all_rows(index.expand(len(lengths), -1)),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(query_group * R, num_slots),
        compute_q_blocks=False,  # only gradients need them
    )


def _attend(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Attention of a step in transformers' attention interface; any other call is passed on to its sdpa."""
    if not isinstance(attention_mask, BlockMask):
        stock = AttentionInterface._global_mapping[STOCK]
        return stock(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    (B, num_heads, R, D), H = query.shape, key.shape[1]
    # uncompiled it is a plain computation of the whole matrix of scores: right, and good for nothing else
    needs_compiling = query.device.type == "cuda" and not torch.compiler.is_compiling()
    kernel = _compiled_kernel if needs_compiling else _kernel
    out = kernel(query.reshape(B, H, -1, D), key, value, attention_mask, scaling)
    out = out.unflatten(2, (-1, R)).permute(0, 3, 1, 2, 4)  # [B, R, H, G, D]
    return out.reshape(B, R, num_heads, -1), None


register_route(ROUTE, _attend)


def _kernel(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scaling: float | None) -> Tensor:
    options = _options(query, key, value)
    out = flex_attention(query, key, value, block_mask=block_mask, scale=scaling, kernel_options=options)
    assert isinstance(out, Tensor)
    return out


def _options(query: Tensor, key: Tensor, value: Tensor) -> FlexKernelOptions | None:
    """Of the kernel for fewer than 128 rows, which splits the keys; None for the other, whose own are right.

    Its two warps would keep 128 rows of 128 numbers in 256 registers a thread, and its splits follow neither S nor the
    rows, so that sums of splits without keys would be written and read.
    """
    if query.shape[2] >= BLOCK or query.device.type != "cuda":
        return None
    splits = num_parts(query.narrow(2, 0, 1), key, value)  # one block takes all rows, as if they were one
    options = {"num_warps": 8 if query.shape[2] > BLOCK // 2 else 4, "SPLIT_KV": splits}
    return cast(FlexKernelOptions, options)  # which names the splits no more than torch's pages do


_compiled_kernel = compiled(_kernel)


class FlexForward(RowForward):
    """The engine's forward with this route and its mask in place of its own, and without weights packed for a CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.linears = None
        self._route = AttentionRoute(self.target.base, ROUTE)

    def _mask(self, plan: RowPlan, cache: SlotCache, behind: Tensor, positions: Tensor) -> BlockMask:
        assert self.query_group is not None
        return step_block_mask(plan, behind.flatten(), cache.num_used, self.query_group)
