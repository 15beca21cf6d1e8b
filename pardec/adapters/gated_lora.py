"""A LoRA that acts on mask rows only, so that the target's own path stays untouched.

No layer is replaced: hooks on the base's own modules add the LoRA to the slice of mask rows, in place. In training
PEFT's layers hold it, see `pardec.training.peft_lora`. Legend: B batch, R rows, r rank, M mask rows.
"""

import math
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pardec.adapters.named_layers import linear_shape, named_layer, short_name
from pardec.adapters.open_rows import (
    OpenRows,
    OpenRowsOfThread,
    add_beside,
    add_cast,
    add_product,
    rows_of,
    sum_to_read,
)
from pardec.arguments import flag, integer, real
from pardec.errors import shown
from pardec.run import dtype_name
from pardec.target.packed_matrix import PackedMatrix
from pardec.target.placement import execution_devices

Returned = TypeVar("Returned")
_PREFIX = "base_model.model."
_UNSUPPORTED = {
    "use_dora": False,
    "use_qalora": False,
    "lora_bias": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "alora_invocation_tokens": None,
}
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA as PEFT writes it.

    Attributes:
        config: content of PEFT's adapter_config.json.
        tensors: content of PEFT's adapter_model.safetensors.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        if self.config.get("peft_type") != "LORA":
            raise ValueError(f"lora: expected peft_type LORA, found {shown(self.config.get('peft_type'))}")
        integer("lora: r", self.config.get("r"), 1, 2**31 - 1)
        if not 0 < real(self.config.get("lora_alpha")) < math.inf:
            found = shown(self.config.get("lora_alpha"))
            raise ValueError(f"lora: expected lora_alpha as a finite number above 0, found {found}")
        if self.config.get("use_rslora") is not None:
            flag("lora: use_rslora", self.config["use_rslora"])
        for key, plain in _UNSUPPORTED.items():
            if self.config.get(key, plain) not in (plain, None):
                raise ValueError(f"lora: expected {key}={plain!r}, found {shown(self.config[key])}")
        for key, tensor in self.tensors.items():
            check_numbers(f"lora: {short_name(key)}", tensor)

    @property
    def rank(self) -> int:
        """r."""
        return int(self.config["r"])

    @property
    def scaling(self) -> float:
        """Factor on B A x: alpha / r, or alpha / sqrt(r) for a rank-stabilised LoRA."""
        root = math.sqrt(self.rank) if self.config.get("use_rslora") else self.rank
        return self.config["lora_alpha"] / root

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A, shape [r, in], and B, shape [out, r], by the name of the module in the base.

        Raises:
            ValueError: if a tensor is not half of such a pair.
        """
        halves: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            name, _, half = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
            if half not in ("lora_A", "lora_B") or not key.startswith(_PREFIX):
                raise ValueError(f"lora: expected names {_PREFIX}*.lora_A|lora_B.weight, found {shown(key)}")
            if tensor.dim() != 2:
                raise ValueError(f"lora: {short_name(key)}: expected a matrix, found shape {list(tensor.shape)}")
            halves.setdefault(name, {})[half] = tensor
        for name, half in halves.items():
            if len(half) != 2:
                raise ValueError(f"lora: {short_name(name)}: expected lora_A and lora_B, found only {next(iter(half))}")
            ranks = (half["lora_A"].shape[0], half["lora_B"].shape[1])
            if ranks != (self.rank, self.rank):
                raise ValueError(
                    f"lora: {short_name(name)}: expected rank {self.rank}, found {ranks} in lora_A and lora_B"
                )
        return {name: (half["lora_A"], half["lora_B"]) for name, half in halves.items()}


def check_numbers(what: str, tensor: Tensor) -> None:
    """Refuses what is learned in a dtype that nothing is computed in, or is not finite.

    Raises:
        ValueError: beginning with `what`.
    """
    if tensor.dtype not in _DTYPES:
        names = ", ".join(dtype_name(dtype) for dtype in _DTYPES)
        raise ValueError(f"{what}: expected one of {names}, found {dtype_name(tensor.dtype)}")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{what}: expected finite numbers, found NaN or infinity")


class LoraGate:
    """Adds a LoRA to the mask rows of decoding forwards.

    Hooks are on the base only inside `attached()`, and the gate is open only inside `open()`.
    """

    def __init__(self, base: nn.Module, weights: LoraWeights):
        # of the thread that runs a step: others that run the base meanwhile find the gate closed
        self._here = OpenRowsOfThread()
        self._traced = OpenRows()
        self._lock = threading.RLock()
        self._num_attached: Counter[nn.Module] = Counter()
        self._handles: dict[nn.Module, RemovableHandle] = {}
        self._targets: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._stacks: dict[tuple[nn.Module, ...], Tensor] = {}  # kept for good: captured steps read them
        devices = execution_devices(base)
        for name, (a, b) in weights.pairs().items():
            module = named_layer(base, name)
            weight = cast(Tensor, module.weight)
            if (b.shape[0], a.shape[1]) != linear_shape(module):
                expected, found = linear_shape(module), (b.shape[0], a.shape[1])
                raise ValueError(f"lora: {short_name(name)}: expected {expected} features, found {found}")
            dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
            halves = (a.to(dtype), (b.to(torch.float32) * weights.scaling).to(dtype))
            if not all(bool(torch.isfinite(half).all()) for half in halves):
                raise ValueError(
                    f"lora: {short_name(name)}: expected numbers that are finite in {dtype}, found some that are not"
                )
            a_t, b_t = (
                half.to(devices.get(module, weight.device)).T.contiguous() for half in halves
            )  # [in, r], [r, out]
            self._targets[module] = (a_t, b_t)

    @contextmanager
    def attached(self, but: Collection[nn.Module] = (), siblings: Sequence[Sequence[nn.Module]] = ()) -> Iterator[None]:
        """Keeps the hooks on the base for the time of the context; contexts may overlap.

        Args:
            but: layers that apply the LoRA themselves, by `add_stacked`.
            siblings: tuples of layers that read the same input tensor, in the order in which they run; the first of
                them multiplies it with the A of all.
        """
        served = set(but)
        modules = [module for module in self._targets if module not in served]
        with self._lock:
            shared = self._shared(siblings, served)
            for module in modules:
                if not self._num_attached[module]:
                    hook = self._make_hook(*self._targets[module], shared.get(module))
                    self._handles[module] = module.register_forward_hook(hook)
            self._num_attached.update(modules)
        try:
            yield
        finally:
            with self._lock:
                self._num_attached.subtract(modules)
                for module in modules:
                    if not self._num_attached[module]:
                        self._handles.pop(module).remove()

    @contextmanager
    def open(self, rows: slice | Tensor, batch_size: int, num_rows: int) -> Iterator[None]:
        """Opens the gate for one forward.

        Args:
            rows: where the mask rows are: a slice of the rows, or an index of shape [B, M], int64.
            batch_size: B.
            num_rows: R.
        """
        self._here.rows, self._here.shape = rows, (batch_size, num_rows)
        try:
            yield
        finally:
            self._here.close()

    def around(self, run: Callable[..., Returned], rows: slice) -> Callable[..., Returned]:
        """`run` with the gate open at `rows`, for torch.compile; its first argument has shape [B, R, D].

        Of what a thread has for itself torch 2.11 sees only the defaults while it compiles, so `open` is of no use.
        """

        def run_open(inputs: Tensor, *args) -> Returned:
            self._traced.rows, self._traced.shape = rows, (inputs.shape[0], inputs.shape[1])
            out = run(inputs, *args)
            self._traced.rows = None
            return out

        return run_open

    @property
    def _open(self) -> OpenRows:
        return self._traced if torch.compiler.is_compiling() else self._here

    @property
    def is_open(self) -> bool:
        """Whether this thread runs a forward with mask rows."""
        return self._open.rows is not None

    def serves(self, module: nn.Module) -> bool:
        """Whether a layer has a LoRA."""
        return module in self._targets

    def stacked(self, modules: Sequence[nn.Module]) -> tuple[Tensor, Tensor] | None:
        """The LoRA of layers that read one input, as one: A, shape [sum r, in], and B, block-diagonal.

        Returns:
            A and B, shape [sum r, sum out]; None if no layer has one.
        """
        pairs = [self._targets.get(module) for module in modules]
        if not any(pairs):
            return None
        some = next(pair for pair in pairs if pair)
        a = torch.cat([pair[0] for pair in pairs if pair], dim=1)
        nothing = [some[1].new_zeros(0, linear_shape(module)[0]) for module in modules]
        b = torch.block_diag(*[pair[1] if pair else none for pair, none in zip(pairs, nothing, strict=True)])
        return a.T.contiguous(), b.contiguous()

    def add_stacked(self, wide: Tensor, b: Tensor | PackedMatrix) -> Tensor:
        """The outputs of layers that read one input, with A x @ b added to their mask rows if the gate is open.

        Args:
            wide: their outputs and A x of every row, side by side, shape [B, R, sum out + sum r] or flattened; written
                to, but by compiled code.
            b: from `stacked`, or that packed.

        Returns:
            shape [B, R, sum out] or flattened.
        """
        rows, num_outputs = self._open.rows, b.num_outputs if isinstance(b, PackedMatrix) else b.shape[1]
        outputs = wide.narrow(-1, 0, num_outputs)
        if rows is None:
            return outputs
        shaped = wide if wide.shape[:-1] == self._open.shape else self._open.unflatten(wide)
        if torch.compiler.is_compiling() and isinstance(b, Tensor) and isinstance(rows, slice):
            low = rows_of(shaped.narrow(-1, num_outputs, b.shape[0]), rows)
            return sum_to_read(shaped.narrow(-1, 0, num_outputs), low, b, rows).view(outputs.shape)
        add_beside(shaped, b, rows)
        return outputs

    def _shared(
        self, siblings: Sequence[Sequence[nn.Module]], served: Collection[nn.Module]
    ) -> dict[nn.Module, tuple[Tensor, slice]]:
        """A of layers that read one input side by side, shape [in, sum r], and each layer's columns of it."""
        found = {}
        for group in siblings:
            mine = tuple(module for module in group if module in self._targets and module not in served)
            halves = [self._targets[module][0] for module in mine]
            if len({(a_t.shape[0], a_t.dtype, a_t.device) for a_t in halves}) != 1 or len(mine) < 2:
                continue
            if mine not in self._stacks:
                with torch.inference_mode(False):  # also used outside of it
                    self._stacks[mine] = torch.cat(halves, dim=1)
            r = halves[0].shape[1]
            found |= {module: (self._stacks[mine], slice(n * r, n * r + r)) for n, module in enumerate(mine)}
        return found

    def _make_hook(self, a_t: Tensor, b_t: Tensor, shared: tuple[Tensor, slice] | None = None):
        def add_to_mask_rows(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            here = self._open
            rows = here.rows
            if rows is None:
                return None
            if not isinstance(output, Tensor):  # as of routers, in some mixtures of experts
                kind = type(module).__name__
                raise ValueError(f"lora: expected layers that give a tensor, found a {kind} that gives more")
            x, as_given = args[0], output.shape
            given = x
            if x.shape[:-1] != here.shape:
                x, output = here.unflatten(x), here.unflatten(output)
            if not x.dtype == output.dtype == a_t.dtype:  # under autocast
                with torch.autocast(x.device.type, enabled=False):
                    add_cast(output, x, a_t, b_t, rows)
            elif torch.compiler.is_compiling() and isinstance(rows, slice):
                return sum_to_read(output, here.low(given, x, a_t, shared), b_t, rows).view(as_given)
            else:
                add_product(output, here.low(given, x, a_t, shared), b_t, rows)
            return None

        return add_to_mask_rows
