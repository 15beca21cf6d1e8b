"""Weights packed once for prefill and the few rows of a decoding step, on CPUs.

A CPU's matrix product repacks the weight matrix at every call, which for a handful of rows costs more than the product
itself. oneDNN takes weights that were packed before, float32 and, where it has kernels for it, bfloat16. Layers that
read the same input become one product, and where a LoRA is given its A matrices ride along in it. Packed weights are
used inside of prefill and steps only, and only by the thread that runs them; whoever runs the base meanwhile gets its
own arithmetic.
Legend: R rows, r rank.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

from pardec.adapters.gated_lora import LoraGate

# rows that oneDNN packs for; any other number is computed correctly, thousands as fast as if packed for them
_TYPICAL_ROWS = 16


class PackedLinears:
    """Packed copies of the float32 and bfloat16 `nn.Linear` layers of a model on a CPU; empty elsewhere.

    They take as much memory as the layers themselves, and are left out where that is more than half of what is
    free. `refresh` packs weights that have changed anew.

    Attributes:
        siblings: tuples of layers that read the same input, also where none can be packed.
    """

    def __init__(self, siblings: Sequence[Sequence[nn.Module]], gate: LoraGate | None = None):
        """Packs the layers of `siblings`, tuples that read the same input; with `gate`, its LoRA into them."""
        self.siblings = siblings
        self._gate = gate
        self._groups: list[_Group] = []
        self._forwards: dict[nn.Linear, Callable[[Tensor], Tensor]] = {}
        self._checksums: list[Tensor] = []

    @property
    def modules(self) -> list[nn.Module]:
        """The layers that are packed; a LoRA on them is applied by `active`, not by hooks."""
        return [module for group in self._groups for module in group.modules]

    def refresh(self) -> None:
        """Packs the weights if there are none packed or they are no longer what was packed."""
        groups = [group for siblings in self.siblings for group in _packable(siblings)]
        linears = [module for group in groups for module in group]
        needed = sum(module.weight.nbytes for module in linears)
        if linears != self.modules and needed > psutil.virtual_memory().available / 2:
            groups = linears = []
        checksums = [_checksum(t.detach()) for m in linears for t in (m.weight, m.bias) if t is not None]
        unchanged = linears == self.modules and len(checksums) == len(self._checksums)
        unchanged = unchanged and all(map(torch.equal, checksums, self._checksums))
        if not unchanged:
            self._groups = [_Group.pack(group, self._gate) for group in groups]
            pairs = [zip(group.modules, group.forwards, strict=True) for group in self._groups]
            self._forwards = dict(pair for group in pairs for pair in group)
            self._checksums = checksums

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Puts a dispatcher in front of the layers' forward; it runs their own outside of `active`.

        Contexts of several threads, and of several sets of packed weights, may overlap.
        """
        installed = []
        with _lock:
            for module in self._forwards:
                if module in _num_open:
                    _num_open[module] += 1
                elif "forward" not in vars(module):  # someone else's own forward stays
                    vars(module)["forward"] = _Dispatcher(module)  # found before the class's method
                    _num_open[module] = 1
                else:
                    continue
                installed.append(module)
        try:
            yield
        finally:
            with _lock:
                for module in installed:
                    _num_open[module] -= 1
                    if not _num_open[module]:
                        del _num_open[module]
                        if isinstance(vars(module).get("forward"), _Dispatcher):  # not what someone put there since
                            del vars(module)["forward"]

    def active(self) -> "_Active":
        """Context inside which, in this thread, installed layers use the packed weights."""
        # where autocast is on the caller wants another dtype
        return _Active(None if torch.is_autocast_enabled("cpu") else self._forwards)


_lock = threading.RLock()
_num_open: dict[nn.Linear, int] = {}  # contexts that hold each module now


class _Active:
    def __init__(self, forwards: dict[nn.Linear, Callable[[Tensor], Tensor]] | None):
        self._forwards = forwards

    def __enter__(self) -> None:
        _here.forwards = self._forwards

    def __exit__(self, *error: object) -> None:
        _here.forwards = None
        _here.group, _here.input, _here.outputs = None, None, ()


class _Here(threading.local):
    """Of the thread that runs the step: others that run the base meanwhile get its own arithmetic."""

    forwards: dict[nn.Linear, Callable[[Tensor], Tensor]] | None = None
    group: object = None  # whose outputs these are
    input: Tensor | None = None
    version: int = 0
    outputs: Sequence[Tensor] = ()


_here = _Here()


class _Dispatcher:
    """Stands for a layer's forward: packed weights where they are active, else the layer's own arithmetic."""

    def __init__(self, module: nn.Linear):
        self._module = module

    def __call__(self, x: Tensor) -> Tensor:
        module = self._module
        own = None if _here.forwards is None else _here.forwards.get(module)
        return nn.functional.linear(x, module.weight, module.bias) if own is None else own(x)


@dataclass(frozen=True)
class _Group:
    """Linear layers that read one input, and their replacements."""

    modules: list[nn.Linear]
    forwards: list[Callable[[Tensor], Tensor]]

    @classmethod
    def pack(cls, modules: list[nn.Linear], gate: LoraGate | None) -> "_Group":
        product = _packed_product(modules, gate)
        if len(modules) == 1:
            return cls(modules, [product])
        sizes, token = [module.out_features for module in modules], object()
        return cls(modules, [_sibling_forward(token, index, product, sizes) for index in range(len(modules))])


def _sibling_forward(
    group: object, index: int, product: Callable[[Tensor], Tensor], sizes: list[int]
) -> Callable[[Tensor], Tensor]:
    """Whichever of the siblings comes first computes all; the others find their part if their input is the same."""

    def forward(x: Tensor) -> Tensor:
        here = _here
        # tensors of inference mode do not count their versions, so that nobody could tell if one was written to
        version = None if x.is_inference() else x._version
        if here.group is not group or here.input is not x or version is None or here.version != version:
            here.group, here.input, here.version = group, x, version or 0
            here.outputs = product(x).split(sizes, dim=-1)
        return here.outputs[index]

    return forward


def _packed_product(modules: list[nn.Linear], gate: LoraGate | None) -> Callable[[Tensor], Tensor]:
    """x -> the outputs of all `modules` side by side, with the gate's LoRA on its open rows."""
    weight = torch.cat([module.weight.detach() for module in modules])
    bias = None
    if any(module.bias is not None for module in modules):
        bias = torch.cat([m.weight.new_zeros(m.out_features) if m.bias is None else m.bias for m in modules])
    linear, num_outputs = torch.ops.mkldnn._linear_pointwise.default, weight.shape[0]
    pairs = None if gate is None else gate.stacked(modules)
    if gate is None or pairs is None:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
        return lambda x: linear(x, packed, bias, "none", [], "")
    a, b = pairs
    packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat([weight, a]), _TYPICAL_ROWS)
    if bias is not None:
        bias = torch.cat([bias, bias.new_zeros(a.shape[0])])

    def product(x: Tensor) -> Tensor:
        y = linear(x, packed, bias, "none", [], "")
        outputs = y.narrow(-1, 0, num_outputs)
        gate.add_stacked(outputs, y.narrow(-1, num_outputs, a.shape[0]), b)
        return outputs

    return product


def _packable(siblings: Sequence[nn.Module]) -> list[list[nn.Linear]]:
    """The layers of `siblings` that can be packed: together, if all can."""
    linears = [m for m in siblings if isinstance(m, nn.Linear) and _can_be_packed(m)]
    return [linears] if len(linears) == len(siblings) else [[module] for module in linears]


def _can_be_packed(module: nn.Linear) -> bool:
    replaced = "forward" in vars(module) and module not in _num_open
    if type(module) is not nn.Linear or replaced:  # a subclass computes something else
        return False
    if type(module.weight) not in (nn.Parameter, Tensor):  # as do quantised weights
        return False
    return module.weight.device.type == "cpu" and _has_kernels(module.weight.dtype)


def _has_kernels(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there, is switched on and multiplies numbers of this dtype on this CPU."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.no_grad()
def _checksum(tensor: Tensor) -> Tensor:
    """Sums of the bit patterns along rows, each place with a factor of its own: integers, so that nothing is lost."""
    row_bytes = tensor.shape[-1] * tensor.element_size()
    bits = next(word for word in (torch.int64, torch.int32, torch.int16) if row_bytes % word.itemsize == 0)
    words = tensor.contiguous().view(bits)
    factors = _FACTORS[torch.arange(words.shape[-1]) % len(_FACTORS)]
    return (words * factors).sum(dim=-1)


_FACTORS = torch.randint(2**62, (8191,), generator=torch.Generator().manual_seed(0)) * 2 + 1
