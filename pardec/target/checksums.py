"""Checksums of weights, by which one sees whether they are still those of before, whoever has written to them.

On a CPU XXH3 in 128 bits, as fast as memory is read; elsewhere sums that the device itself makes, as tensors that
nobody waits for. Knows tensors alone.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def differ(some: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Whether any checksum is not that of its place, all of one device: a bool there, not waited for."""
    return (torch.cat(list(some)) != torch.cat(list(others))).any()


def checksums(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of each: integers on its device."""
    on_host = [tensor for tensor in tensors if tensor.is_cpu]
    hashed = iter(_hashed(on_host))
    return [next(hashed) if tensor.is_cpu else launched_checksum(tensor) for tensor in tensors]


@torch.no_grad()
def _hashed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The hashes of each tensor's bytes, 8 MiB at a time, by as many threads as torch has."""
    from xxhash import xxh3_128_digest  # here alone: a machine whose weights are on a GPU may lack it

    # bytes of one dimension, none of them copied where a tensor is contiguous
    flat = [tensor.detach().resolve_neg().contiguous().view(-1).view(torch.uint8).numpy().data for tensor in tensors]
    pieces = [one[start : start + _PIECE_BYTES] for one in flat for start in range(0, max(len(one), 1), _PIECE_BYTES)]
    num_threads = torch.get_num_threads() if len(pieces) > 1 else 1
    try:
        if num_threads == 1:
            digests = map(xxh3_128_digest, pieces)
        else:
            with ThreadPoolExecutor(num_threads) as pool:
                digests = iter(list(pool.map(xxh3_128_digest, pieces)))
    except RuntimeError:  # an interpreter that ends starts no more threads, and runs what was left for its end
        digests = map(xxh3_128_digest, pieces)
    joined = [b"".join(next(digests) for _ in range(0, max(len(one), 1), _PIECE_BYTES)) for one in flat]
    return [torch.frombuffer(bytearray(one), dtype=torch.int64) for one in joined]


@torch.no_grad()
def launched_checksum(tensor: Tensor) -> Tensor:
    """Sums of the bit patterns, each place with a factor of its own: integers, so that nothing is lost.

    Rows far enough apart share a sum: what is written stays in the processor's cache and the weights are read once,
    where products of all of them would go through memory thrice.
    """
    tensor = tensor.detach()
    if not tensor.numel():
        return tensor.new_zeros(1, dtype=torch.int64)
    if not tensor.dim():
        tensor = tensor[None]
    row_bytes = tensor.shape[-1] * tensor.element_size()
    bits = next(word for word in _WORDS if row_bytes % word.itemsize == 0)
    tensor = tensor.resolve_neg().contiguous()
    if tensor.storage_offset() * tensor.element_size() % bits.itemsize:  # a part of a buffer that begins within a word
        tensor = tensor.clone()
    words = tensor.view(bits)
    factors = _factors(words.shape[-1], words.device)
    if bits == torch.int64:
        words = _folded(words.reshape(-1, words.shape[-1]))
    return (words * factors).sum(dim=-1).reshape(-1)


def _folded(words: Tensor) -> Tensor:
    """Blocks of rows in one, [rows of a block, words]: each is added to an odd multiple of those before."""
    first, *blocks = words.split(max(1, _BLOCK_WORDS // words.shape[-1]))
    shifted = torch.bitwise_right_shift(first, 29).bitwise_and_(_SHIFTED_BITS)
    folded = first ^ shifted
    for block in blocks:
        part = folded[: block.shape[0]]
        torch.add(block, part, alpha=_RADIX, out=part)
        # odd multiples leave the uppermost bit alone, so two changed signs would cancel if it stayed where it is; what
        # is shifted in are zeros, or a word and its complement would give the same
        part ^= torch.bitwise_right_shift(part, 29, out=shifted[: block.shape[0]]).bitwise_and_(_SHIFTED_BITS)
    return folded


_PIECE_BYTES = 2**23
_BLOCK_WORDS = 2**21  # 16 MiB, which a GPU's cache keeps; more launches would cost more than the memory's way


def _factors(num_words: int, device: torch.device) -> Tensor:
    """Odd numbers, of each place of a row its own; kept for good, as graphs that were captured read them."""
    known = _known_factors.get((num_words, device))
    if known is None:
        made = torch.randint(2**62, (num_words,), generator=torch.Generator().manual_seed(0)) * 2 + 1
        known = _known_factors.setdefault((num_words, device), made.to(device))  # of several threads the first one's
    return known


_WORDS = (torch.int64, torch.int32, torch.int16, torch.int8)
_RADIX = 0x5851F42D4C957F2D  # of Knuth's linear congruential generator: odd, and its bits are well mixed
_SHIFTED_BITS = 2 ** (64 - 29) - 1
_known_factors: dict[tuple[int, torch.device], Tensor] = {}
