"""Weights packed once for the few rows of a decoding step, on CPUs.

A CPU's float32 matrix product repacks the weight matrix at every call, which for a handful of rows costs more than
the product itself. oneDNN takes weights that were packed before. The base's modules are switched over for the time
of one forward only, and only for the thread that runs it, so that outside of it the base is untouched.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor, nn

# rows that oneDNN packs for; any other number is computed correctly
_TYPICAL_ROWS = 16


class PackedLinears:
    """Packed copies of the float32 `nn.Linear` layers of a model on a CPU; empty elsewhere.

    They take as much memory as the layers themselves, and are left out where that is more than half of what is
    free. `refresh` packs weights that have changed anew.
    """

    def __init__(self, base: nn.Module):
        self._base = base
        self._modules: list[nn.Linear] = []
        self._forwards: list[Callable[[Tensor], Tensor]] = []
        self._checksums: list[Tensor] = []

    def refresh(self) -> None:
        """Packs the weights if there are none packed or they are no longer what was packed."""
        modules = [m for m in self._base.modules() if isinstance(m, nn.Linear) and _can_be_packed(m)]
        needed = sum(module.weight.nbytes for module in modules)
        if modules != self._modules and needed > psutil.virtual_memory().available / 2:
            modules = []
        checksums = [_checksum(module.weight) for module in modules]
        unchanged = modules == self._modules and all(map(torch.equal, checksums, self._checksums))
        if not unchanged:
            self._forwards = [_packed_forward(module) for module in modules]
            self._modules, self._checksums = modules, checksums

    @contextmanager
    def active(self) -> Iterator[None]:
        """Lets the model's linear layers use the packed weights inside the context."""
        if torch.is_autocast_enabled("cpu"):  # the caller wants another dtype
            yield
            return
        switched = []
        for module, forward in zip(self._modules, self._forwards, strict=True):
            if "forward" not in module.__dict__:  # someone else's own forward stays
                module.__dict__["forward"] = forward  # found before the class's method
                switched.append(module)
        _here.is_active = True
        try:
            yield
        finally:
            _here.is_active = False
            for module in switched:
                module.__dict__.pop("forward", None)


# of the thread that runs the step: others that run the base meanwhile get its own arithmetic
_here = threading.local()


def _can_be_packed(module: nn.Linear) -> bool:
    if type(module) is not nn.Linear or "forward" in module.__dict__:  # a subclass computes something else
        return False
    on_cpu = module.weight.device.type == "cpu" and module.weight.dtype == torch.float32
    return on_cpu and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


@torch.no_grad()
def _checksum(weight: Tensor) -> Tensor:
    """Sums of the bit patterns along rows: integers, so that no change is too small to be seen."""
    bits = torch.int64 if weight.shape[1] % 2 == 0 else torch.int32
    return weight.detach().contiguous().view(bits).sum(dim=1)


def _packed_forward(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), _TYPICAL_ROWS)
    linear, bias = torch.ops.mkldnn._linear_pointwise.default, module.bias

    def forward(x: Tensor) -> Tensor:
        if not getattr(_here, "is_active", False):
            return nn.functional.linear(x, module.weight, module.bias)
        return linear(x, packed, bias, "none", [], "")

    return forward
