"""Counts what is alive while something runs, on shapes alone as well. Knows nothing of what that is."""

import weakref
from collections.abc import Sequence

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside and still alive; on any device, `meta` too.

    Attributes:
        live: now.
        peak: the most there were.
        attending: the most there were when an attention that makes no scores was called, 0 if none was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.attending = 0
        self._known = WeakIdKeyDictionary()

    def leave_out(self, tensors: Sequence[Tensor]) -> None:
        """These were there before."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in func.name():
            self.attending = max(self.attending, self.live)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.live -= size
