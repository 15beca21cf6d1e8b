"""Counts what a step does, without a device to do it on: kernel launches, bytes moved, where its tensors lie.

A step is run on tensors that have shapes and no numbers (the device `meta`, or fakes of another device), and every
operation that reaches a backend is looked at. One that is neither a view nor an allocation counts as one launch, so
top-k and sorting, which take several, are counted too low. Bytes are those that each operation reads and writes, as if
nothing stayed in a cache between two. Attention is taken as CUDA's memory-efficient kernel, the one that takes a mask
in every version and head size: what torch chooses for tensors without numbers is a formula of a dozen operations. Its
keys are in as many parts as on a large GPU.
Knows tensors only: no model, no device's speed.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ATTENTION = torch.ops.aten._scaled_dot_product_efficient_attention
# return what they were given, or memory that nobody has written to
_NO_LAUNCH = {
    "_unsafe_view", "_reshape_alias", "lift_fresh", "detach", "device", "empty", "empty_like", "empty_strided",
    "new_empty", "new_empty_strided", "sym_size", "sym_stride", "sym_numel", "sym_storage_offset",
}  # fmt: skip
# the host waits for what they say
_ASKING = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2"}
# numbers of the host become a tensor; without a device to copy them to no operation shows it
_FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, Tensor.new_tensor}
_INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
_READ_NOTHING = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "fill_", "zero_"}
# of what they index, in their first argument, they touch as much as they bring or are given
_READ_SOME = {"embedding", "index_select", "gather", "index"}
_WRITE_SOME = {"index_copy_", "scatter_", "index_put_", "index_fill_"}


@dataclass
class StepCount:
    """What was counted.

    Attributes:
        launches: by the name of the operation.
        num_bytes: read and written.
        asked: operations whose values the host waits for.
        on_host: operations with a tensor that lies on the host, or that move one from it or to it.
        masks: of attention, as its kernel was given them.
        queries: of attention, beside them.
    """

    launches: Counter[str] = field(default_factory=Counter)
    num_bytes: int = 0
    asked: list[str] = field(default_factory=list)
    on_host: list[str] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)

    @property
    def num_launches(self) -> int:
        """All of them."""
        return self.launches.total()


@contextmanager
def counted_step() -> Iterator[StepCount]:
    """Counts the operations on tensors inside."""
    count = StepCount()
    with _Calls(count), _Operations(count):
        yield count


class _Calls(TorchFunctionMode):
    def __init__(self, count: StepCount):
        super().__init__()
        self._count = count

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        if func in _FROM_HOST or (func in _INDEXING and _has_list(args[1])):
            self._count.on_host.append(func.__name__)
        return func(*args, **(kwargs or {}))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask=None, *, scale=None, **options) -> Tensor:
        return _ATTENTION(query, key, value, attn_mask, compute_log_sumexp=False, scale=scale)[0]


def _has_list(index: Any) -> bool:
    return isinstance(index, list) or (isinstance(index, tuple) and any(isinstance(one, list) for one in index))


class _Operations(TorchDispatchMode):
    def __init__(self, count: StepCount):
        super().__init__()
        self._count = count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        count = self._count
        if name in _ASKING:
            count.asked.append(name)
        if name == _ATTENTION.__name__:
            count.queries.append(args[0])
            count.masks.append(args[3])
        out = func(*args, **kwargs)
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if any(x.device.type == "cpu" for x in (*read, *written)):
            count.on_host.append(name)
        if name not in _NO_LAUNCH and not func.is_view:
            count.launches[name] += 1
            count.num_bytes += _bytes_moved(name, read, written)
        return out


def _bytes_moved(name: str, read: list[Tensor], written: list[Tensor]) -> int:
    if name in _READ_SOME:
        return sum(map(_extent, read[1:])) + 2 * sum(map(_extent, written))
    if name in _WRITE_SOME:
        return sum(map(_extent, read[1:])) + _extent(read[-1])
    return sum(map(_extent, () if name in _READ_NOTHING else read)) + sum(map(_extent, written))


def _extent(x: Tensor) -> int:
    """Bytes of a tensor, each once where it is expanded."""
    distinct = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        distinct *= size if stride else min(size, 1)
    return distinct * x.element_size()
