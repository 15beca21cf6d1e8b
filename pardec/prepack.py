"""Weights packed once for the few rows of a decoding step, on CPUs.

A CPU's float32 matrix product repacks the weight matrix at every call, which for a handful of rows costs more than
the product itself. oneDNN takes weights that were packed before. The base's modules are switched over for the time
of one forward only, so that outside of it the base is untouched.
"""

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
    free. Weights that change are packed anew by `refresh`.
    """

    def __init__(self, base: nn.Module):
        linears = [module for module in base.modules() if isinstance(module, nn.Linear)]
        self._modules = [module for module in linears if _can_be_packed(module)]
        needed = sum(module.weight.nbytes for module in self._modules)
        if needed > psutil.virtual_memory().available / 2:
            self._modules = []
        self._versions: list[tuple[int, int]] = []
        self._forwards: list[Callable[[Tensor], Tensor]] = []

    def refresh(self) -> None:
        """Packs the weights if they have changed since they were packed."""
        versions = [(_version(m.weight), m.weight.data_ptr()) for m in self._modules]
        if versions != self._versions:
            self._forwards = [_packed_forward(module) for module in self._modules]
            self._versions = versions

    @contextmanager
    def active(self) -> Iterator[None]:
        """Lets the model's linear layers use the packed weights inside the context."""
        for module, forward in zip(self._modules, self._forwards, strict=True):
            module.__dict__["forward"] = forward  # an attribute of the instance, found before the class's method
        try:
            yield
        finally:
            for module in self._modules:
                module.__dict__.pop("forward", None)


def _can_be_packed(module: nn.Linear) -> bool:
    if type(module) is not nn.Linear or "forward" in module.__dict__:  # someone else's own forward stays
        return False
    on_cpu = module.weight.device.type == "cpu" and module.weight.dtype == torch.float32
    return on_cpu and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _version(weight: Tensor) -> int:
    """Grows with every change in place; tensors of inference mode cannot be changed and have none."""
    return 0 if weight.is_inference() else weight._version


def _packed_forward(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), _TYPICAL_ROWS)
    linear, bias = torch.ops.mkldnn._linear_pointwise.default, module.bias

    def forward(x: Tensor) -> Tensor:
        return linear(x, packed, bias, "none", [], "")

    return forward
