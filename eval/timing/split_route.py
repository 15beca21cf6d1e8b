"""A way for steps to attend that is measured beside the engine's own: grouped rows over keys split into parts.

One sequence has as many thread blocks as key/value heads, which leaves most of a GPU idle. Parts of the keys become
further entries of one attention's batch, and their outputs are weighted by what the softmax of all keys would give
each part. Nothing is copied but masks of several sequences, once a step; the host reads nothing.
Legend: B batch, H key/value heads, G query heads for each of them, R rows, S slots, n parts of s = S / n, D head size.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pardec.decoding.rows import RowForward, RowPlan
from pardec.target.attention import AttentionRoute, grouped_attention, register_route
from pardec.target.cache import SlotCache
from pardec.target.forward import config_value, text_config

ROUTE = "pardec_split"
BLOCK_ROWS = 64  # grouped rows of one thread block, in the kernels for half precision and heads of up to 128
BLOCKS_PER_MULTIPROCESSOR = 1  # one wave: the output of every further part is written and read once more
LEAST_SLOTS = 64  # of a part: kernels take up to 128 at a time, and less than half of that would be waste
ALIGNMENT = 16  # parts begin at multiples of so many slots: kernels load masks by up to 32 bytes
# added to hidden scores: -inf would make NaN of a part in which a row sees nothing; of this its weight is exactly 0
HIDDEN = -1e30


def split_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """`grouped_attention` with the same arguments, by parts where that fills the device.

    The mask may also be of shape [B, H, G R, S], which several sequences need if it is not to be copied in every layer,
    and must be finite: `finite_mask` makes it so.
    """
    (B, num_heads, R, D), H = query.shape, key.shape[1]
    n, rows_of_step = num_parts(query, key, value), num_heads // H * R
    if (
        n == 1
        or attention_mask is None
        or attention_mask.dtype == torch.bool
        or attention_mask.shape[2] != rows_of_step
    ):
        return grouped_attention(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    # all [n, B H, ., .]: sequences and heads of a cache lie one stride apart, parts another
    rows = query.reshape(1, B * H, -1, D).expand(n, -1, -1, -1)
    keys, values = (one.flatten(0, 1).unflatten(1, (n, -1)).transpose(0, 1) for one in (key, value))
    bias = attention_mask.to(query.dtype).expand(B, H, -1, -1).flatten(0, 1).unflatten(2, (n, -1)).permute(2, 0, 1, 3)
    if query.device.type == "cuda":
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        out, log_sum, *_ = attend(rows, keys, values, bias, True, scale=scaling)
    else:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sum = attend(rows, keys, values, attn_mask=bias, scale=scaling)
    # float32; rows are cut afterwards, as CUDA pads them to a multiple of 32, which softmax would make contiguous
    weights = log_sum.softmax(0).narrow(2, 0, rows.shape[2]).unsqueeze(3)
    out = (out * weights).sum(0).unflatten(1, (-1, R)).unflatten(0, (B, H)).permute(0, 3, 1, 2, 4)
    out = out.to(query.dtype, memory_format=torch.contiguous_format)  # [B, R, H, G, D] by one kernel
    return out.reshape(B, R, num_heads, -1), None


def num_parts(query: Tensor, key: Tensor, value: Tensor) -> int:
    """n, a power of two that divides S into aligned parts, as large as the device has use for.

    1 where the kernels that give the logarithm of their sum do not serve: float64, heads that are not aligned, devices
    other than CUDA and CPUs.
    """
    (B, num_heads, R, D), (_, H, S, _) = query.shape, key.shape
    is_served = query.dtype != torch.float64 and D % 8 == 0 and value.shape[3] == D
    if not is_served or query.device.type not in ("cuda", "cpu"):
        return 1
    blocks = B * H * -(-num_heads // H * R // BLOCK_ROWS)
    most = BLOCKS_PER_MULTIPROCESSOR * num_multiprocessors(query.device) // blocks
    n = 1
    while 2 * n <= most and S // (2 * n) >= LEAST_SLOTS and S % (2 * n * ALIGNMENT) == 0:
        n *= 2
    return n


@torch.compiler.assume_constant_result
def num_multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; on a CPU the threads that torch uses, which take blocks as multiprocessors do."""
    if device.type == "cuda":  # torch keeps what it has once asked the driver for
        return torch.cuda.get_device_properties(device).multi_processor_count
    return torch.get_num_threads()


register_route(ROUTE, split_attention)


def finite_mask(mask: Tensor, num_kv_heads: int | None) -> Tensor:
    """An additive mask of grouped rows, shape [B, 1, G R, S], as `split_attention` wants it.

    Args:
        mask: with -inf for what is hidden.
        num_kv_heads: H, if all layers have as many; None leaves the mask of several sequences to be copied by layers.
    """
    mask = mask.clamp(min=max(HIDDEN, torch.finfo(mask.dtype).min))
    return mask if num_kv_heads is None or mask.shape[0] == 1 else mask.repeat(1, num_kv_heads, 1, 1)


class SplitForward(RowForward):
    """The engine's forward with this route and its mask in place of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._route = AttentionRoute(self.target.base, ROUTE)
        heads = config_value(text_config(self.target.base), "num_key_value_heads")
        self._num_kv_heads = heads if isinstance(heads, int) else None

    def _mask(self, plan: RowPlan, cache: SlotCache, behind: Tensor, positions: Tensor):
        mask = super()._mask(plan, cache, behind, positions)
        if isinstance(mask, Mapping):
            return {kind: finite_mask(one, self._num_kv_heads) for kind, one in mask.items()}
        return finite_mask(mask, self._num_kv_heads)
