"""Between adapters and the training module: starts from one that exists, and copies out what is learned.

Training goes on with an adapter, or adds a part to it and leaves the rest. Knows no recipe.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from pardec.adapters.adapter import Adapter, AdapterMetadata
from pardec.adapters.gated_lora import LoraWeights
from pardec.target.fingerprint import Fingerprint, differences, shape_difference
from pardec.training.module import MaskTokenTrainer, part_of
from pardec.training.peft_lora import load_lora_weights, lora_weights


@torch.no_grad()
def warm_start(
    module: MaskTokenTrainer,
    peft_model,
    adapter: Adapter,
    identity: Fingerprint,
    frozen: Collection[str] = (),
    *,
    transfer: bool = False,
) -> dict[str, Any] | None:
    """Gives every part of the training module that the adapter has the adapter's numbers.

    Args:
        module: with its first numbers.
        peft_model: PEFT's view of the base if there is a LoRA, else None.
        adapter: to start from.
        identity: of the module's base.
        frozen: `mask_embeddings`, `lora` or `head`: these are not trained.
        transfer: the adapter may belong to another base of the same shape, such as what this one was tuned from.

    Returns:
        what it was moved from, for its provenance; None for an adapter of this base.

    Raises:
        ValueError: if the adapter belongs to another base, with `transfer` to one of another shape, has parts of
            other shapes or parts that the module lacks, or lacks a frozen one or more of it than the module has.
    """
    wrong = differences(adapter.metadata.fingerprint, identity, module.target.dtype)
    if wrong:
        misfit = shape_difference(adapter.metadata.fingerprint, identity)
        if transfer and misfit is not None:
            raise ValueError(f"adapter.transfer: expected another base of the same shape: {misfit}")
        if not transfer:
            hint = "" if misfit else "; adapter.transfer=true starts from it nevertheless"
            raise ValueError(f"adapter.start_from: the adapter belongs to another base: {'; '.join(wrong)}{hint}")
    has = {
        "mask_embeddings": (adapter.mask_embeddings is not None, module.mask_embeddings is not None),
        "lora": (adapter.lora is not None, peft_model is not None),
        "head": (adapter.head is not None, module.head is not None),
    }
    for part, (in_adapter, in_module) in has.items():
        if in_adapter and not in_module:
            raise ValueError(f"adapter.start_from: expected a recipe with the adapter's parts, found none of {part}")
        if part in frozen and not in_adapter:
            raise ValueError(f"train.frozen: expected parts that adapter.start_from has, found {part}")
    if adapter.mask_embeddings is not None and module.mask_embeddings is not None:
        _copy("mask_embeddings", adapter.mask_embeddings, module.mask_embeddings)
    if adapter.lora is not None:
        if "lora" in frozen:
            _check_whole(adapter.lora, lora_weights(peft_model))
        load_lora_weights(peft_model, adapter.lora)
    if adapter.head is not None and module.head is not None:
        for name, tensor in adapter.head.items():
            _copy(f"head.{name}", tensor, module.head.get_parameter(name))
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and part_of(name) in frozen:
            parameter.requires_grad_(False)
    return _provenance(adapter) if wrong else None


def _check_whole(theirs: LoraWeights, ours: LoraWeights) -> None:
    """What stays as it is cannot be made smaller: it would never learn what was cut off."""
    expected, found = (f"r {one.rank} on {len(one.tensors) // 2} layers" for one in (theirs, ours))
    if expected != found:
        raise ValueError(f"train.frozen: expected the LoRA of adapter.start_from, {expected}, found {found}")


def _provenance(adapter: Adapter) -> dict[str, Any]:
    """The base that an adapter was trained for, and what its drafts had there."""
    base, measured = adapter.metadata.base, adapter.metadata.measured
    found = {way: measured[way] for way in ("sampled", "greedy") if isinstance(measured.get(way), dict)}
    lengths = {way: one.get("mean_acceptance_length") for way, one in found.items()}
    return {"base": base.public_name, "revision": base.revision, "mean_acceptance_length": lengths}


def check_source(start_from: str | None, began_with: dict[str, str] | None, found: dict[str, str] | None) -> None:
    """Refuses to continue a run on another adapter than it began with: its frozen parts are read from there.

    Raises:
        ValueError: if the sha256 of its files are not those of then.
    """
    if began_with != found:
        raise ValueError(
            f"adapter.start_from {start_from}: expected the adapter that this run began with, found "
            "another; choose another output_dir or remove it"
        )


def learned_adapter(module: MaskTokenTrainer, peft_model, metadata: AdapterMetadata) -> Adapter:
    """A copy of what is learned so far, float32, on the CPU; `peft_model` as in `warm_start`."""
    masks, head = module.mask_embeddings, module.head
    return Adapter(
        None if masks is None else _copied(masks),
        metadata,
        None if peft_model is None else lora_weights(peft_model, metadata.base.public_name),
        None if head is None else {name: _copied(parameter) for name, parameter in head.named_parameters()},
    )


def _copied(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)


def _copy(name: str, source: Tensor, target: Tensor) -> None:
    if source.shape != target.shape:
        expected, found = list(target.shape), list(source.shape)
        raise ValueError(f"adapter.start_from: {name}: expected shape {expected} as in the recipe, found {found}")
    target.copy_(source)
