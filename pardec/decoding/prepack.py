"""Weights packed once for prefill and the few rows of a decoding step.

A CPU's matrix product repacks the weight matrix at every call, which for a handful of rows costs more than the product
itself; oneDNN takes weights that were packed before, float32 and, where it has kernels for it, bfloat16. On a GPU a
step of few rows is mostly launches. So layers that read the same input become one product, and where a LoRA is given
its A matrices ride along in it. Packed weights are used inside of prefill and steps only, and only by the thread that
runs them; whoever runs the base meanwhile gets its own arithmetic.
Legend: R rows, r rank.
"""

import math
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import psutil
import torch
from torch import Tensor, nn

from pardec.adapters.gated_lora import LoraGate
from pardec.decoding.weight_watch import WeightWatch
from pardec.target.hidden import is_tap
from pardec.target.packed_matrix import PackedMatrix

Returned = TypeVar("Returned")
# of the memory that is free: what packed weights may take
_SHARE = {"cpu": 1 / 2, "cuda": 1 / 4, "meta": 1.0}


class PackedLinears:
    """Packed copies of the `nn.Linear` layers of a model on a CPU, float32 and bfloat16, or on CUDA.

    On CUDA only layers that share an input or have a LoRA are packed. They take as much memory as the layers
    themselves, and are left out where that is more than a share of what is free. `refresh` packs weights that have
    changed anew.

    Attributes:
        siblings: tuples of layers that read the same input, also where none are packed.
        num_packed: how often weights were packed; what was captured before the last time holds on to `forwards` of
            then.
        forwards: of the packed layers, by layer; replaced, never changed.
    """

    def __init__(self, siblings: Sequence[Sequence[nn.Module]], gate: LoraGate | None = None):
        """Packs the layers of `siblings`, tuples that read the same input; with `gate`, its LoRA into them."""
        self.siblings = siblings
        self._gate = gate
        self.num_packed = 0
        self.forwards: dict[nn.Linear, Callable[[Tensor], Tensor]] = {}
        self._dispatchers: dict[nn.Linear, _Dispatcher] = {}
        self._kinds: set[str] = set()  # of the devices of packed layers
        self._groups: list[_Group] = []
        self._watch: WeightWatch | None = None
        self._refreshing = threading.RLock()

    @property
    def modules(self) -> list[nn.Module]:
        """The layers that are packed."""
        return [module for group in self._groups for module in group.modules]

    @property
    def replaced(self) -> Collection[nn.Module]:
        """The layers that `active` replaces now; a LoRA on them is applied there, not by hooks."""
        # where autocast is on the caller wants another dtype
        return () if any(map(torch.is_autocast_enabled, self._kinds)) else self.forwards.keys()

    def refresh(self) -> None:
        """Packs the weights if there are none packed or they are no longer what was packed."""
        with self._refreshing:  # nobody may find the new weights remembered and the old ones packed
            self._refresh()

    def free(self) -> None:
        """Lets go of what makes the next `refresh` quick, but not of what is packed."""
        with self._refreshing:
            if self._watch is not None:
                self._watch.free()

    def _refresh(self) -> None:
        groups = [group for siblings in self.siblings for group in _packable(siblings) if self._is_worth_it(group)]
        linears = [module for group in groups for module in group]
        if linears != self.modules and not _fits(linears):
            groups = linears = []
        weights = [t for m in linears for t in (m.weight, m.bias) if t is not None]
        if linears != self.modules or not (self._watch is None or self._watch.holds(weights)):
            watch = WeightWatch(weights)  # before they are read: what is written meanwhile will be noticed
            self._groups = [_Group.pack(group, self._gate) for group in groups]
            pairs = [zip(group.modules, group.forwards, strict=True) for group in self._groups]
            self.forwards = dict(pair for group in pairs for pair in group)
            self._kinds = {module.weight.device.type for module in linears} - {"meta"}
            self.num_packed += 1
            self._watch = watch if self._watch is None else self._watch.renewed(watch)

    def _is_worth_it(self, group: Sequence[nn.Linear]) -> bool:
        """Whether packing saves something: on CUDA a launch."""
        has_lora = self._gate is not None and any(map(self._gate.serves, group))
        return group[0].weight.device.type == "cpu" or len(group) > 1 or has_lora

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Puts a dispatcher in front of the layers' forward; it runs their own outside of `active`.

        Contexts of several threads, and of several sets of packed weights, may overlap.
        """
        installed = []
        with _lock:
            for module in self.forwards:
                if module in _num_open:
                    _num_open[module] += 1
                elif "forward" not in vars(module):  # someone else's own forward stays
                    # found before the class's method; always the same, which compiled code looks at
                    vars(module)["forward"] = self._dispatchers.setdefault(module, _Dispatcher(module))
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

    def around(self, run: Callable[..., Returned]) -> Callable[..., Returned]:
        """`run` inside of `active`, for torch.compile: see `LoraGate.around`."""

        def run_packed(*args) -> Returned:
            _traced.forwards = self.forwards
            out = run(*args)
            _traced.forwards = _traced.group = _traced.input = None
            _traced.outputs = ()
            return out

        return run_packed

    def active(self) -> "_Active":
        """Context inside which, in this thread, installed layers use the packed weights."""
        return _Active(self.forwards if self.replaced else None)


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


class _Packed:
    def __init__(self) -> None:
        self.forwards: dict[nn.Linear, Callable[[Tensor], Tensor]] | None = None
        self.group: object = None  # whose outputs these are
        self.input: Tensor | None = None
        self.version = 0
        self.outputs: Sequence[Tensor] = ()


class _PackedOfThread(_Packed, threading.local):
    """Of the thread that runs the step: others that run the base meanwhile get its own arithmetic."""


_here = _PackedOfThread()
_traced = _Packed()


class _Dispatcher:
    """Stands for a layer's forward: packed weights where they are active, else the layer's own arithmetic."""

    def __init__(self, module: nn.Linear):
        self._module = module

    def __call__(self, x: Tensor) -> Tensor:
        module, here = self._module, _traced if torch.compiler.is_compiling() else _here
        own = None if here.forwards is None else here.forwards.get(module)
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

    def traced(x: Tensor) -> Tensor:
        here = _traced  # versions are not known while code is traced; `survey` has seen that nobody writes to the input
        if here.group is not group or here.input is not x:
            here.group, here.input = group, x
            here.outputs = product(x).split(sizes, dim=-1)
        return here.outputs[index]

    def forward(x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return traced(x)
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
    num_outputs = weight.shape[0]
    pairs = None if gate is None else gate.stacked(modules)
    if gate is None or pairs is None:
        return _linear(weight, bias)
    a, b = (half.to(weight) for half in pairs)  # the base may have been converted since
    # as it lies a CPU is fast with it in float32 alone
    added = PackedMatrix(b.T.contiguous(), None) if b.dtype == torch.bfloat16 and not _keeps_form(weight) else b
    wide = torch.cat([weight, a])
    wide_bias = None if bias is None else torch.cat([bias, bias.new_zeros(a.shape[0])])
    wide_linear = _linear(wide, wide_bias)
    # a CPU packs them into another form, of which a part is none
    closed = _linear(wide[:num_outputs], bias) if _keeps_form(weight) else None

    def product(x: Tensor) -> Tensor:
        if closed is not None and not gate.is_open:
            return closed(x)
        return gate.add_stacked(wide_linear(x), added)

    return product


def _linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """x -> x W^T + bias, by what the device does for weights that stay."""
    if _keeps_form(weight):
        return partial(nn.functional.linear, weight=weight, bias=bias)
    return PackedMatrix(weight, bias)


def _keeps_form(weight: Tensor) -> bool:
    """Whether the device multiplies with a matrix as it lies."""
    return not weight.is_cpu


def _fits(modules: Sequence[nn.Linear]) -> bool:
    """Whether copies of these layers take no more of the memory of any device than they may."""
    needed: dict[torch.device, int] = {}
    for module in modules:
        needed[module.weight.device] = needed.get(module.weight.device, 0) + module.weight.nbytes
    return all(size <= _free_bytes(device) * _SHARE[device.type] for device, size in needed.items())


def _free_bytes(device: torch.device) -> float:
    if device.type == "meta":
        return math.inf
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


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
    if module.weight.layout != torch.strided:
        return False
    if not all(map(is_tap, module._forward_pre_hooks.values())):  # others may make the weight, as pruning does
        return False
    kind, dtype = module.weight.device.type, module.weight.dtype
    # steps are counted on the device `meta` as they run on CUDA
    return (kind in ("cuda", "meta") and dtype.is_floating_point) or (kind == "cpu" and _has_kernels(dtype))


def _has_kernels(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there, is switched on and multiplies numbers of this dtype on this CPU."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
