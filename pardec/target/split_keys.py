"""Attention of a step by parts of the keys, for GPUs that one sequence's few thread blocks would leave mostly idle.

A sequence has as many blocks as key/value heads. Parts of the keys become further entries of one attention's batch, and
their outputs are weighted by what the softmax of all keys would give each part. No key, value or mask is copied, and
the host reads nothing. Knows tensors only: no layer and no route.
Legend: B batch, H key/value heads, R rows (of a group of query heads, side by side), S slots, D head size, n parts of
s = S / n.
"""

import torch
from torch import Tensor

BLOCK_ROWS = 64  # of one thread block, in the kernels for half precision and heads of up to 128
BLOCKS_PER_MULTIPROCESSOR = 1  # one wave: the output of every further part is written and read once more
LEAST_SLOTS = 64  # of a part: kernels take up to 128 at a time, and less than half of that would be waste
ALIGNMENT = 16  # parts begin at multiples of so many slots: kernels load masks by up to 32 bytes
# added to hidden scores: -inf would make NaN of a part in which a row sees nothing; of this its weight is exactly 0
HIDDEN = -1e30
# of an H100 and an H200; the device `meta` has none to ask, and steps are counted there as a GPU would run them
MULTIPROCESSORS_ON_PAPER = 132


def attention_by_parts(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, n: int, scaling: float | None = None
) -> Tensor:
    """Attention, shape [B, H, R, D], in float32, as parts are summed.

    Args:
        query: shape [B, H, R, D].
        key: shape [B, H, S, D].
        value: shape [B, H, S, D].
        mask: additive and finite, shape [B, H, R, S]; heads that one stride holds apart, or none, are not copied.
        n: a divisor of S, as `num_parts` gives it.
        scaling: of the scores; default 1 / sqrt(D).
    """
    B, H, R, _ = query.shape
    # all [n, B H, ., .]: sequences and heads of a cache lie one stride apart, parts another
    rows = query.flatten(0, 1).expand(n, -1, -1, -1)
    keys, values = (one.flatten(0, 1).unflatten(1, (n, -1)).transpose(0, 1) for one in (key, value))
    bias = mask.flatten(0, 1).unflatten(2, (n, -1)).permute(2, 0, 1, 3)
    if query.device.type == "cpu":  # never by itself: what proves the arithmetic without a GPU
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sum = attend(rows, keys, values, attn_mask=bias, scale=scaling)
    else:
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        out, log_sum, *_ = attend(rows, keys, values, bias, True, scale=scaling)
    # float32; rows are cut afterwards, as CUDA pads them to a multiple of 32, which softmax would make contiguous
    weights = log_sum.softmax(0).narrow(2, 0, R).unsqueeze(3)
    return (out * weights).sum(0).unflatten(0, (B, H))


def num_parts(query: Tensor, key: Tensor, value: Tensor) -> int:
    """n, a power of two that divides S into aligned parts, as large as the device has use for.

    1 where the kernels that give the logarithm of their sum do not serve (float64, heads that are not aligned), and on
    devices that are not `worth_splitting`.

    Args:
        query: shape [B, H, R, D].
        key: shape [B, H, S, D].
        value: shape [B, H, S, D'].
    """
    (B, H, R, D), S = query.shape, key.shape[2]
    if query.dtype == torch.float64 or D % 8 or value.shape[3] != D:
        return 1
    most = BLOCKS_PER_MULTIPROCESSOR * num_multiprocessors(query.device) // (B * H * -(-R // BLOCK_ROWS))
    n = 1
    while 2 * n <= most and S // (2 * n) >= LEAST_SLOTS and S % (2 * n * ALIGNMENT) == 0:
        n *= 2
    return n


@torch.compiler.assume_constant_result
def num_multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; 1 on a CPU, whose kernels share out rows, and on others that have not been measured."""
    if device.type == "cuda":  # torch keeps what it has once asked the driver for
        return torch.cuda.get_device_properties(device).multi_processor_count
    return MULTIPROCESSORS_ON_PAPER if device.type == "meta" else 1


def worth_splitting(device: torch.device) -> bool:
    """Whether parts may be more than one on this device, so that masks must be made for them."""
    return num_multiprocessors(device) > 1


def hidden_score(dtype: torch.dtype) -> float:
    """What a mask for parts adds to hidden scores."""
    return max(HIDDEN, torch.finfo(dtype).min)
