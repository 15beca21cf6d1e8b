"""A third way for steps to attend, to be measured beside the engine's own: FlexAttention over the used blocks.

The kernel is told, by numbers on the device, which blocks of keys and values hold anything that rows may see, so that
its cost follows the committed length and not the cache bucket; the host reads nothing. For models without windows.
Legend: B batch, H key/value heads, G query heads for each of them, R rows, S slots attended to, D head size.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface

from pardec.decoding.rows import RowForward, RowPlan
from pardec.target.attention import STOCK, AttentionRoute
from pardec.target.cache import SlotCache
from pardec.target.compiling import compiled

ROUTE = "pardec_flex"
BLOCK = 128  # slots, and rows; the kernels' own default


def step_block_mask(plan: RowPlan, lengths: Tensor, num_slots: int) -> BlockMask:
    """What the rows of a step see, as blocks: full ones before the committed length, masked ones up to the last row.

    Args:
        plan: of the step's layout.
        lengths: committed tokens, shape [B].
        num_slots: S; the rows' own slots are among them.
    """
    R, device = plan.layout.num_rows, lengths.device
    num_query_blocks, num_key_blocks = -(-R // BLOCK), -(-num_slots // BLOCK)
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
        return visible[kind, q.clamp(max=R - 1)]

    return BlockMask.from_kv_blocks(
        for_all_rows(num_partial),
        for_all_rows(after_full),
        for_all_rows(num_full),
        for_all_rows(index.expand(len(lengths), -1)),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(R, num_slots),
        compute_q_blocks=False,  # only gradients need them
    )


def _attend(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Attention of a step in transformers' attention interface; any other call is passed on to its sdpa."""
    if not isinstance(attention_mask, BlockMask):
        stock = AttentionInterface._global_mapping[STOCK]
        return stock(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    # uncompiled it is a plain computation of the whole matrix of scores: right, and good for nothing else
    needs_compiling = query.device.type == "cuda" and not torch.compiler.is_compiling()
    kernel = _compiled_kernel if needs_compiling else _kernel
    return kernel(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(ROUTE, _attend)


def _kernel(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scaling: float | None) -> Tensor:
    is_grouped = query.shape[1] != key.shape[1]
    out = flex_attention(query, key, value, block_mask=block_mask, scale=scaling, enable_gqa=is_grouped)
    assert isinstance(out, Tensor)
    return out


_compiled_kernel = compiled(_kernel)


class FlexForward(RowForward):
    """The engine's forward with this route and its mask in place of its own, and without weights packed for a CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.linears = None
        self._route = AttentionRoute(self.target.base, ROUTE)

    def _mask(self, plan: RowPlan, cache: SlotCache, behind: Tensor, positions: Tensor) -> BlockMask:
        return step_block_mask(plan, behind.flatten(), cache.num_used)
