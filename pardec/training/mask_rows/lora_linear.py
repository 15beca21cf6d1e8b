"""A linear layer and its LoRA as one operation, in training: of the size of its output only the output is made.

PEFT's layer makes what the LoRA adds, scales it and adds it, and in the backward again, and casts the input for each of
its matrices. What is computed here is the same. Layers that are anything but a frozen matrix with a plain LoRA beside
it keep PEFT's forward.
Legend: R rows, I and O features of input and output, r rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pardec.target.own_head import autocast_dtype

_ADAPTER = "default"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_hf_hook")


@contextmanager
def fused_loras(base: nn.Module) -> Iterator[None]:
    """Lets layers of PEFT that are switched on inside run so, where they can."""
    from peft.tuners.lora.layer import Linear

    last = _LastCast()
    layers = [module for module in base.modules() if type(module) is Linear and "forward" not in vars(module)]
    for layer in layers:
        vars(layer)["forward"] = partial(_forward, layer, last)
    try:
        yield
    finally:
        last.forget()
        for layer in layers:
            del vars(layer)["forward"]


class _LastCast:
    """The last input in the dtype of the matrices: layers that read the same input, read the same copy."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._given: Tensor | None = None
        self._rows: Tensor | None = None

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Shape [R, I] of [..., I]."""
        if self._given is not x or self._rows is None or self._rows.dtype != dtype:
            self._given, self._rows = x, x.detach().to(dtype).flatten(0, -2)
        return self._rows


def _forward(layer, last: _LastCast, x: Tensor, *args, **kwargs) -> Tensor:
    dtype = None if args or kwargs else _dtype_of(layer, x)
    if dtype is None:
        return type(layer).forward(layer, x, *args, **kwargs)
    halves = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    base, scaling = layer.base_layer, layer.scaling[_ADAPTER]
    return _LoraLinear.apply(x, last.rows(x, dtype), base.weight, base.bias, *halves, scaling)  # type: ignore[return-value]


def _dtype_of(layer, x: Tensor) -> torch.dtype | None:
    """In which the layer's products are made; None where it is another than those meant here."""
    base = layer.base_layer
    if layer.disable_adapters or layer.merged or layer.active_adapters != [_ADAPTER] or type(base) is not nn.Linear:
        return None
    halves = [layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]]
    is_plain = (
        not layer.lora_variant
        and isinstance(layer.lora_dropout[_ADAPTER], nn.Identity)
        and all(type(half) is nn.Linear and half.bias is None for half in halves)
        and not any(getattr(module, name, None) for module in (base, *halves) for name in _HOOKS)
    )
    if not is_plain or x.dim() < 2:
        return None
    is_one_dtype = all(module.weight.dtype == x.dtype for module in (base, *halves))
    return autocast_dtype(x.device) or (x.dtype if is_one_dtype else None)


class _LoraLinear(torch.autograd.Function):
    """x W^T + bias + scaling x A^T B^T; W and bias are frozen."""

    @staticmethod
    def forward(ctx, x, rows, weight, bias, A, B, scaling: float):  # type: ignore[override]
        W, a, b = (matrix.to(rows.dtype) for matrix in (weight, A, B))
        # no view, which nobody might write to afterwards
        out = rows.new_empty(*x.shape[:-1], len(W))
        flat, low = out.flatten(0, -2), (rows @ a.T).mul_(scaling)
        torch.mm(rows, W.T, out=flat) if bias is None else torch.addmm(bias.to(rows.dtype), rows, W.T, out=flat)
        flat.addmm_(low, b.T)
        ctx.save_for_backward(rows, W, a, b, low)
        ctx.scaling, ctx.dtypes = scaling, (x.dtype, A.dtype, B.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, slope: Tensor):  # type: ignore[override]
        rows, W, a, b, low = ctx.saved_tensors
        of_x, of_A, of_B = ctx.needs_input_grad[0], *ctx.needs_input_grad[4:6]
        of_rows = slope.flatten(0, -2).to(rows.dtype)
        of_low = (of_rows @ b).mul_(ctx.scaling)
        return (
            (of_rows @ W).addmm_(of_low, a).to(ctx.dtypes[0]).unflatten(0, slope.shape[:-1]) if of_x else None,
            None,
            None,
            None,
            (of_low.T @ rows).to(ctx.dtypes[1]) if of_A else None,
            (of_rows.T @ low).to(ctx.dtypes[2]) if of_B else None,
            None,
        )
