"""What an attention layer is given in a step, with parts of the keys that rows see nothing of."""

import torch

from pardec.target.split_keys import hidden_score


def attention_inputs(B, H, G, R, S, D, dtype=torch.float32, device=None):
    """Query, key and value as layers give them, from a cache of more sequences and slots; a step's random mask."""
    cache = torch.randn(2, B + 1, H, 2 * S, D, device=device).to(dtype)
    query = torch.randn(B, R, H * G, D, device=device).to(dtype).transpose(1, 2)
    visible = torch.rand(B, 1, R, S, device=device) < 0.5
    visible[..., S // 2 :] = False  # stale slots, which fill whole parts
    visible[:, :, 0] = False  # a row with one part that it sees at all, and one slot of that
    visible[:, :, 0, S // 4 + 1] = True
    mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(~visible, float("-inf"))
    return query, cache[0, :B, :, :S], cache[1, :B, :, :S], mask.repeat(1, 1, G, 1)


def for_parts(mask, num_kv_heads):
    """The mask as `group_rows` makes it where keys may be split."""
    mask = mask.clamp(min=hidden_score(mask.dtype))
    return mask.repeat(1, num_kv_heads, 1, 1) if mask.shape[0] > 1 else mask.expand(-1, num_kv_heads, -1, -1)
