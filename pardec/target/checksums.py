"""Checksums of weights, by which one sees whether they are still those of before, whoever has written to them.

Knows tensors alone.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def all_equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether all tensors are the same, told by each device at once."""
    if [one.shape for one in some] != [one.shape for one in others]:
        return False
    differ: dict[torch.device, list[Tensor]] = {}
    for one, other in zip(some, others, strict=True):
        differ.setdefault(one.device, []).append((one != other).any())
    return not any(bool(torch.stack(flags).any()) for flags in differ.values())


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Sums of the bit patterns along rows, each place with a factor of its own: integers, so that nothing is lost."""
    row_bytes = tensor.shape[-1] * tensor.element_size()
    bits = next(word for word in (torch.int64, torch.int32, torch.int16) if row_bytes % word.itemsize == 0)
    words = tensor.contiguous().view(bits)
    return (words * _factors(words.shape[-1], words.device)).sum(dim=-1)


@lru_cache(maxsize=32)
def _factors(num_words: int, device: torch.device) -> Tensor:
    return _FACTORS[torch.arange(num_words) % len(_FACTORS)].to(device)


_FACTORS = torch.randint(2**62, (8191,), generator=torch.Generator().manual_seed(0)) * 2 + 1
