"""Where a base's layers run, which with offloading is not where their weights lie.

accelerate keeps the weights of offloaded layers on the device `meta` and brings them in for the time of their forward;
those of layers that are sharded over processes (`pardec.target.sharding`) are brought in likewise.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from pardec.target.forward import UnsupportedModelError, embedding_weight

META = torch.device("meta")


def execution_devices(base: nn.Module) -> dict[nn.Module, torch.device]:
    """The device on which each module with parameters of its own runs."""
    found = {}
    for module, brought_to in _with_offloading(base, None):
        own = next(module.parameters(recurse=False), None)
        if own is not None:
            found[module] = own.device if own.device != META or brought_to is None else brought_to
    return found


def refuse_by_placement(base: PreTrainedModel) -> None:
    """Refuses bases with weights that are nowhere, layers on several devices, or offloaded input embeddings.

    Raises:
        UnsupportedModelError: naming them.
    """
    found = execution_devices(base)
    for module, device in found.items():
        if device == META:
            raise UnsupportedModelError(
                f"base: expected loaded weights, found those of a {type(module).__name__} on the device meta, with "
                "nothing that brings them in"
            )
    devices = sorted(set(map(str, found.values())))
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"base: expected all layers on one device, found them on {', '.join(devices)} (device_map); a step keeps "
            "its positions, masks and cache on one"
        )
    if embedding_weight(base).device == META:
        raise UnsupportedModelError(
            "base: expected input embeddings in memory, found them offloaded (device_map); offload layers only"
        )


def is_offloaded(base: nn.Module) -> bool:
    """Whether some weights, or parts of them in other processes, are away between the forwards of their layers."""
    return any(parameter.device == META or isinstance(parameter, DTensor) for parameter in base.parameters())


def _with_offloading(
    module: nn.Module, brought_to: torch.device | None
) -> Iterator[tuple[nn.Module, torch.device | None]]:
    """Every module, and the device to which a hook on it or around it brings offloaded weights."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):  # several hooks on a module are one that holds them
        device = getattr(one, "execution_device", None)
        if device is not None and getattr(one, "offload", False):
            brought_to = torch.device(device)
    yield module, brought_to
    for child in module.children():
        yield from _with_offloading(child, brought_to)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Dtypes as they come, on any device; `meta` knows no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
