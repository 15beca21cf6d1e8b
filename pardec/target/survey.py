"""What one forward of a model shows about it: bytes of its cache, layers that share an input, its attention route.

None of this can be read from configurations in general, so it is observed, once for each model.
Legend: R rows, G query heads for each key/value head.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pardec.target.attention import (
    STOCK,
    AttentionRoute,
    group_rows,
    grouped_attention_calls,
    query_group,
    split_heads,
)
from pardec.target.cache import BufferKind, SlotCache
from pardec.target.forward import TargetModel, text_config
from pardec.target.split_keys import LEAST_SLOTS, worth_splitting

_ROWS = 2
# largest difference of the route from sdpa, in units of the spread of the logits
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


@dataclass(frozen=True)
class Survey:
    """Facts about a model.

    Attributes:
        bytes_per_slot: keys and values of one token of one sequence, all layers.
        siblings: linear layers in the order in which they run; those of a tuple read the same input tensor.
        query_group: G of the attention route that steps take; None where they keep the model's own attention.
        kinds: of the cache's buffers, see `SlotCache.kinds`.
    """

    bytes_per_slot: int
    siblings: tuple[tuple[nn.Module, ...], ...]
    query_group: int | None
    kinds: Counter[BufferKind]


@torch.no_grad()
def survey(target: TargetModel) -> Survey:
    """Runs two tokens through `target`."""
    with _observed_inputs(target.base) as inputs:
        logits, cache = _run(target, group=None)
    bytes_per_slot = sum(buffer.nbytes for buffer in cache.buffers)
    group = query_group(target.base) if text_config(target.base)._attn_implementation == STOCK else None
    if group is not None and not _takes_route(target, group, logits):
        group = None
    return Survey(bytes_per_slot // cache.num_slots, _siblings(inputs), group, cache.kinds)


@torch.no_grad()
def siblings_of(target: TargetModel) -> tuple[tuple[nn.Module, ...], ...]:
    """`Survey.siblings` alone, which shapes are enough for: of a model on the device `meta` too."""
    with _observed_inputs(target.base) as inputs:
        _run(target, group=None)
    return _siblings(inputs)


def _run(target: TargetModel, group: int | None) -> tuple[Tensor, SlotCache]:
    ids = torch.arange(_ROWS, device=target.device)[None] % target.vocab_size
    # enough for two parts, where keys are split: a device may lack the kernel for them
    num_slots = 2 * LEAST_SLOTS if worth_splitting(target.device) else _ROWS
    cache = SlotCache(target.num_layers, num_slots)
    cache.slots = torch.arange(_ROWS, device=target.device)[None]
    visible = torch.ones(1, _ROWS, num_slots, dtype=torch.bool, device=target.device).tril()
    key_positions = torch.arange(num_slots, device=target.device)[None]
    mask = target.attention.render(visible, cache.slots, key_positions, target.dtype)
    if group is not None:
        mask = group_rows(mask, group, target.dtype, split_heads(target.base, target.device))
    return target.run(target.embed(ids), cache.slots, mask, cache), cache


def _takes_route(target: TargetModel, group: int, expected: Tensor) -> bool:
    """Whether every attention layer goes through the route, and with the same result."""
    try:
        with AttentionRoute(target.base), grouped_attention_calls() as calls:
            found, _ = _run(target, group)
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError, KeyError):
        return False  # its own attention serves it as well
    return len(calls) == target.num_layers and agree(found, expected, target.dtype)


def agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits by another route are those of the model's own attention, within what its dtype rounds."""
    if found.is_meta:
        return True  # shapes alone, where there are no numbers
    worst = float((found.float() - expected.float()).abs().max() / expected.float().std().clamp_min(1e-6))
    return worst <= _TOLERANCE.get(dtype, _TOLERANCE[torch.bfloat16])


@contextmanager
def _observed_inputs(base: PreTrainedModel) -> Iterator[list[tuple[nn.Module, Tensor, int | None]]]:
    """Collects (linear layer, its input, how often that was written to) of the forwards of this thread inside."""
    inputs: list[tuple[nn.Module, Tensor, int | None]] = []
    thread = threading.get_ident()

    def observe(module: nn.Module, args: tuple) -> None:
        if threading.get_ident() == thread and len(args) == 1:
            inputs.append((module, args[0], None if args[0].is_inference() else args[0]._version))

    weighted = [m for m in base.modules() if isinstance(getattr(m, "weight", None), Tensor)]
    handles = [module.register_forward_pre_hook(observe) for module in weighted if module.weight.dim() == 2]  # type: ignore[union-attr]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _siblings(inputs: list[tuple[nn.Module, Tensor, int | None]]) -> tuple[tuple[nn.Module, ...], ...]:
    runs = [module for module, _, _ in inputs]
    groups: list[list[nn.Module]] = []
    previous: tuple[Tensor | None, int | None] = (None, None)
    for module, x, version in inputs:
        if runs.count(module) > 1:  # a layer that runs twice in a forward belongs to no group
            previous = (None, None)
            groups += [] if [module] in groups else [[module]]
        elif x is previous[0] and version == previous[1]:
            groups[-1].append(module)
        else:
            groups.append([module])
            previous = (x, version)
    return tuple(tuple(group) for group in groups)
