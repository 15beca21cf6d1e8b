"""The pass over the real tokens of a training step: keys and values, and what their law is made of, without gradient.

As a whole, or in slices one behind another, which leave the same and keep the rows of one slice alive at a time.
Knows nothing of what is learned. Legend: B sequences, T tokens, N anchors, R rows of a slice, H width of hidden states.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pardec.target.forward import TargetModel
from pardec.target.own_head import OwnHead
from pardec.target.placement import without_autocast
from pardec.target.prefix_cache import PrefixCache
from pardec.target.survey import agree


@dataclass
class Prefix:
    """What the pass leaves behind.

    Attributes:
        cache: keys and values of the real tokens.
        hidden: what their law is made of, shape [B, T, H].
        anchors: of all parts, in the order in which their blocks run, shape [B, N], where the host can read them.
        lengths: of all blocks.
    """

    cache: PrefixCache
    hidden: Tensor
    anchors: Tensor
    lengths: tuple[int, ...]


@torch.no_grad()
def run_prefix(own_head: OwnHead, input_ids: Tensor, num_slices: int = 1) -> tuple[PrefixCache, Tensor]:
    """Runs real tokens.

    Args:
        own_head: of the model.
        input_ids: shape [B, T].
        num_slices: forwards that the pass is cut into, T at most; in each, slices are of one size as far as T allows.

    Returns:
        the cache with their keys and values; their hidden states, shape [B, T, H].
    """
    target, (_, T) = own_head.target, input_ids.shape
    cache, hidden = PrefixCache(target.num_layers), None
    positions = torch.arange(T, device=input_ids.device).expand_as(input_ids)
    if num_slices == 1:
        return cache, own_head.hidden(target.embed(input_ids), positions, None, cache)
    with cache.filled_up_to(T):
        for index in range(num_slices):
            rows = slice(T * index // num_slices, T * (index + 1) // num_slices)
            mask = slice_mask(target, rows) if rows.start else None
            found = own_head.hidden(target.embed(input_ids[:, rows]), positions[:, rows], mask, cache)
            hidden = found.new_empty(found.shape[0], T, found.shape[2]) if hidden is None else hidden
            hidden[:, rows] = found
    assert hidden is not None
    return cache, hidden


def slice_mask(target: TargetModel, rows: slice) -> Tensor | dict[str, Tensor]:
    """The `attention_mask` of a model for real tokens `rows`, each of which sees all before it; for any B."""
    position = torch.arange(rows.stop, device=target.device)[None]
    here = position[:, rows]
    return target.attention.render(position[:, None] <= here[:, :, None], here, position, target.dtype)


@torch.no_grad()
def may_be_sliced(own_head: OwnHead) -> bool:
    """Whether slices leave what the whole leaves, seen on a few tokens of the very model."""
    target = own_head.target
    ids = torch.arange(6, device=target.device)[None] % target.vocab_size
    with without_autocast(target.device):
        _, expected = run_prefix(own_head, ids)
        try:
            _, found = run_prefix(own_head, ids, 3)
        except (ValueError, RuntimeError, TypeError, AttributeError, IndexError, KeyError):
            return False
    return agree(found, expected, target.dtype)
