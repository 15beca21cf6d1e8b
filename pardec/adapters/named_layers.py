"""The layers of a base that a LoRA names: linear ones, of whatever class."""

from typing import cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pardec.errors import shown


def named_layer(base: nn.Module, name: str) -> nn.Module:
    """The linear layer of that name, below PEFT's wrapper where there is one.

    Raises:
        ValueError: if the base has none.
    """
    try:
        module = base.get_submodule(name)
    except AttributeError:
        raise ValueError(f"lora: expected modules of the base, found {short_name(name)!r}, which it has not") from None
    # during training PEFT has wrapped the module
    inner = module.base_layer if hasattr(module, "base_layer") else module
    if not isinstance(getattr(inner, "weight", None), Tensor) or not (
        hasattr(inner, "out_features") or isinstance(inner, Conv1D)
    ):
        raise ValueError(f"lora: module {short_name(name)}: expected a linear layer, found {type(inner).__name__}")
    return inner  # type: ignore[return-value]


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Its (out, in) features."""
    if hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    weight = cast(Tensor, module.weight)
    return int(weight.shape[1]), int(weight.shape[0])  # transformers' Conv1D keeps [in, out]


def short_name(name: str) -> str:
    """A tensor's name in one line, whatever somebody has called it."""
    return name if len(name) <= 150 and name.isprintable() else shown(name)
