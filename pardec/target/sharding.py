"""A base whose layers are shared out over processes, each of which brings them in one by one for their forward.

What lies outside of the decoder's layers, embeddings, final norm and output head among it, stays whole in every
process: it is read in many places, and small beside the layers. Nothing of a sharded base can be learned; what is
injected into it afterwards, as a LoRA is, stays whole too. Every forward must be run by all processes that hold a part.
"""

import os
from collections import Counter
from collections.abc import Iterable
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from pardec.target.base import load_base
from pardec.target.forward import UnsupportedModelError
from pardec.target.layers import decoder_layers

Group = Literal["all", "machine"]


def load_sharded_base(name: str, device: torch.device, group: Group = "all") -> PreTrainedModel:
    """Loads a base as `load_base` does, with its layers sharded over processes; torch.distributed must be running.

    Files are mapped into memory, which the processes of a machine share, and go to the device layer by layer, so that
    none ever holds the whole base on its device.

    Args:
        name: see `load_base`.
        device: of this process.
        group: the processes that hold the base together: `all`, or those of each `machine`.

    Raises:
        ValueError: see `load_base`.
        UnsupportedModelError: likewise, and for bases that cannot be sharded.
    """
    base = load_base(name, device="cpu", dtype="auto" if device.type == "cuda" else None)
    return shard(base, device, group)


def shard(base: PreTrainedModel, device: torch.device, group: Group = "all") -> PreTrainedModel:
    """Keeps this process's part of the base's layers, and the rest of it, on the device; arguments as above.

    Source: FSDP2, https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
    """
    if getattr(base, "hf_quantizer", None) is not None or hasattr(base, "hf_device_map"):
        raise UnsupportedModelError(
            "train.shard_base: expected a base in floating point, found one that is quantised or placed by a device_map"
        )
    mesh, layers = mesh_of(device, group), decoder_layers(base, "train.shard_base")
    # a layer with parts of another one's is brought in by itself alone, and a number by itself cannot be cut
    holders = Counter(id(parameter) for layer in layers for parameter in set(layer.parameters()))
    whole = {p for layer in layers for p in layer.parameters() if holders[id(p)] > 1 or p.dim() == 0}
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    whole |= {p for p in base.parameters() if not isinstance(p, DTensor)}
    fully_shard(base, mesh=mesh, ignored_params=whole)
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    with torch.no_grad():  # what weights are brought into is made now: made by decoding, no gradient could pass through
        base(torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    return base


def mesh_of(device: torch.device, group: Group) -> DeviceMesh:
    """All processes in a row, or machines by the processes of each.

    Raises:
        ValueError: if machines have different numbers of them.
    """
    num_processes = dist.get_world_size()
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or num_processes)
    if group == "all" or local == num_processes:
        return init_device_mesh(device.type, (num_processes,))
    if num_processes % local:
        raise ValueError(
            f"train.shard_base: expected as many processes on every machine for 'machine', found {num_processes} in "
            f"all, {local} of them here"
        )
    return init_device_mesh(device.type, (num_processes // local, local), mesh_dim_names=("machines", "processes"))


def held_bytes(module: nn.Module) -> int:
    """Bytes of the parameters that this process holds between forwards."""
    return _bytes(p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())


def running_bytes(base: nn.Module) -> int:
    """The same while a forward runs: a layer that is sharded is there as a whole, and the next is being brought in."""
    layers = (module for module in base.modules() if isinstance(module, FSDPModule) and module is not base)
    sharded = (_bytes(p for p in layer.parameters() if isinstance(p, DTensor)) for layer in layers)
    return held_bytes(base) + 2 * max(sharded, default=0)


def _bytes(parameters: Iterable[torch.Tensor]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
