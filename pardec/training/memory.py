"""How much memory training takes, found on a few rows of the very model, before anything large is allocated.

What a row and a real token leave alive differs between families, dtypes and layers with a LoRA; so a tiny step is run
in several sizes, every allocation counted, and what grows is carried on to the sizes of a recipe.
Legend: B sequences, T tokens, N anchors, K num_speculative_tokens, M mask rows of a sequence, V vocabulary.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from pardec.target.cache import PrefixCache
from pardec.target.forward import config_value, text_config
from pardec.training.module import MaskTokenTrainer
from pardec.training.prefix_attention import scores_at_once

GIB = 2**30
_SCORES_ALIVE = 3  # of a slice of attention: scores, those beside the ones of a row's own block, their softmax
_TOKENS, _ANCHORS = (48, 96), (4, 8)  # of the tiny steps


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside and still alive; on any device, `meta` too.

    Attributes:
        live: now.
        peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def leave_out(self, tensors: Sequence[Tensor]) -> None:
        """These were there before."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.live -= size


@dataclass(frozen=True)
class StepMemory:
    """What is alive in a step, in bytes: of the pass over real tokens, and of what follows it.

    Attributes:
        prefix: most in the first pass: constant, for each real token.
        step: likewise in the rest: constant, for each real token, for each mask row, for each pair of a mask row
            and a token of either kind in its sequence, where attention makes all scores at once.
        logits: of a part of the loss, for each of its rows.
        rows_of_part: the most there are.
        scores: of a slice of attention, for each pair of a mask row and a real token.
        most_scores: of all that are made at a time.
    """

    prefix: tuple[float, ...]
    step: tuple[float, ...]
    logits: float
    rows_of_part: int
    scores: int
    most_scores: int

    def bytes_for(self, batch_size: int, num_tokens: int, mask_rows: int) -> int:
        """Of a forward and its backward, beside weights, learned numbers, their gradients and moments.

        Args:
            batch_size: B.
            num_tokens: T.
            mask_rows: of all sequences, those that run together.
        """
        real = batch_size * num_tokens
        constant, of_real, of_mask, of_pair = self.step
        kept = constant + of_real * real + of_mask * mask_rows + of_pair * _pairs(batch_size, num_tokens, mask_rows)
        part = self.logits * min(self.rows_of_part, mask_rows)
        scores = min(self.most_scores, self.scores * num_tokens * mask_rows)
        return int(max(self.prefix[0] + self.prefix[1] * real, kept + max(part, scores)))

    def carried_on(self, other: "StepMemory", share: float) -> "StepMemory":
        """What grows along with layers, as from here to another of more layers, `share` times as far."""

        def line(here: tuple[float, ...], there: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(a + share * (b - a) for a, b in zip(here, there, strict=True))

        prefix, step = line(self.prefix, other.prefix), line(self.step, other.step)
        return replace(self, prefix=prefix, step=step)


def learned_bytes(num_learned: int) -> int:
    """Numbers in float32, gradients and the two moments of AdamW."""
    return num_learned * 4 * 4


def _pairs(batch_size: int, num_tokens: int, mask_rows: int) -> float:
    return mask_rows * (num_tokens + mask_rows / batch_size)


def measure_step(module: MaskTokenTrainer) -> StepMemory:
    """Runs tiny steps of the module, in the autocast that is on; leaves no gradient, and no number changed."""
    target, K = module.target, module.drafter.num_speculative_tokens
    limit = min(_TOKENS[1], target.max_positions or _TOKENS[1])
    T0, T1 = limit // 2, limit
    N0, N1 = _ANCHORS
    M0, M1 = N0 * K, N1 * K
    (of_prefix, f00), (_, f01), (of_longer, f10), (_, f11) = (_peaks(module, T, N) for T in (T0, T1) for N in (N0, N1))
    of_pair = (f11 - f10 - f01 + f00) / ((T1 - T0) * (M1 - M0))
    # what each size adds once pairs are taken away; the route of blocks makes no scores between blocks
    pairs = {(T, M): T * M if module.takes_blocks else _pairs(1, T, M) for T in (T0, T1) for M in (M0, M1)}
    of_real = (f10 - f00 - of_pair * (pairs[T1, M0] - pairs[T0, M0])) / (T1 - T0)
    of_mask = (f01 - f00 - of_pair * (pairs[T0, M1] - pairs[T0, M0])) / (M1 - M0)
    constant = f00 - of_real * T0 - of_mask * M0 - of_pair * pairs[T0, M0]
    of_token = (of_longer - of_prefix) / (T1 - T0)
    heads = config_value(text_config(target.base), "num_attention_heads") or 1
    return StepMemory(
        (of_prefix - of_token * T0, of_token),
        (constant, of_real, of_mask, 0.0 if module.takes_blocks else max(0.0, of_pair)),
        _of_logits(module, T0, N1),
        module.most_rows,
        _SCORES_ALIVE * heads * 4 if module.takes_blocks else 0,
        _SCORES_ALIVE * scores_at_once(target.device) * 4,
    )


def _peaks(module: MaskTokenTrainer, T: int, N: int) -> tuple[int, int]:
    """Most bytes alive in the pass over T real tokens, and in what follows it with N anchors, one block a part."""
    target, ids = module.target, torch.zeros(1, T, dtype=torch.long, device=module.target.device)
    positions = torch.arange(T, device=ids.device)[None]
    with _counted(module, most_rows=1) as counted:
        with torch.no_grad():
            hidden = module.own_head.hidden(target.embed(ids), positions, None, PrefixCache(target.num_layers))
        of_prefix = counted.peak
        del hidden
        loss = _loss_behind_a_prefix(module, ids, N, counted)
        loss.backward()
        return of_prefix, counted.peak


def _of_logits(module: MaskTokenTrainer, T: int, N: int) -> float:
    """Bytes for each row of a part of the loss that are alive while it is made, beside what is kept."""
    ids = torch.zeros(1, T, dtype=torch.long, device=module.target.device)
    num_rows = N * module.drafter.num_speculative_tokens
    with _counted(module, most_rows=num_rows) as counted:
        loss = _loss_behind_a_prefix(module, ids, N, counted)
        found = (counted.peak - counted.live) / num_rows
        del loss
        return found


def _loss_behind_a_prefix(module: MaskTokenTrainer, ids: Tensor, N: int, counted: LiveBytes) -> Tensor:
    """Loss of N anchors behind real tokens that have run before; the peak begins with what these leave."""
    anchors = torch.linspace(0, ids.shape[1] - 2, 2 * N).long()[None]
    with torch.no_grad():
        module(ids, ids == 0, anchors, num_anchors=N)  # the first half only makes the prefix
    counted.peak = counted.live
    return module(ids, ids == 0, anchors, first_anchor=N, num_anchors=N)[0]


@contextmanager
def _counted(module: MaskTokenTrainer, *, most_rows: int) -> Iterator[LiveBytes]:
    """Counts what is made beside learned numbers and their gradients; the module is as it was afterwards."""
    learned = [p for p in module.parameters() if p.requires_grad]
    before = module.most_rows, [p.grad for p in learned]
    for parameter in learned:
        parameter.grad = torch.zeros_like(parameter)
    counted, device = LiveBytes(), module.target.device
    counted.leave_out([*module.parameters(), *module.buffers(), *(p.grad for p in learned if p.grad is not None)])
    module.most_rows = most_rows
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), counted:
            yield counted
    finally:
        module.forget_prefix()
        module.most_rows, gradients = before
        for parameter, gradient in zip(learned, gradients, strict=True):
            parameter.grad = gradient


def check_fits(needed: Mapping[int, int], learned: int, free: int, *, batch_size: int) -> None:
    """Refuses a run that takes more than is free.

    Args:
        needed: bytes of a step by anchors of a forward, the most first, which is what the run has.
        learned: bytes that are still to come for what is learned.
        free: bytes.
        batch_size: sequences of a forward.

    Raises:
        ValueError: naming what it takes, what is free, and the setting that would fit.
    """
    asked, *_ = needed
    if learned + needed[asked] <= free:
        return
    fitting = next((anchors for anchors, size in needed.items() if learned + size <= free), None)
    way_out = f"train.anchors_per_forward={fitting} would fit"
    if fitting is None:
        way_out = f"not even one anchor at a time fits; lower train.batch_size, here {batch_size}, or data.max_length"
    raise ValueError(
        f"memory: expected at most {free / GIB:.2f} GiB beside the weights, which are free, found an estimate of "
        f"{(learned + needed[asked]) / GIB:.2f} GiB with {asked} anchors a forward; {way_out}"
    )


def free_bytes(device: torch.device) -> int:
    """Memory that a device can still give."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def pretraining_bytes(num_parameters: int, num_rows: int, vocab_size: int) -> int:
    """What a process holds for weights, optimisers and the logits of a forward's rows."""
    # float32 weights, gradients and at most two moments; logits in float32 with their softmax and gradient
    return num_parameters * 4 * 4 + num_rows * vocab_size * 4 * 3
