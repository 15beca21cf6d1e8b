"""Prefill: a prompt's keys and values into the cache, without an explicit mask where that can be.

Knows rows, no modes and no verification. Legend: B prompts, or sequences that continue them, P padded prompt length,
K mask tokens, V vocabulary, H width of a hidden state.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from pardec.adapters.gated_lora import LoraGate
from pardec.decoding.prompt_graphs import PromptGraphs
from pardec.decoding.rows import RowForward, RowPlan
from pardec.layout import real_layout
from pardec.target.cache import SlotCache, aligned
from pardec.target.forward import TargetModel
from pardec.target.hidden import HiddenTap
from pardec.target.placement import is_offloaded

# tokens of all prompts together in one forward; bounds the memory of activations
_TOKENS_PER_FORWARD = 8192
_MIN_CHUNK_TOKENS = 256
# of padding that cost as much as a forward of its own, on a CPU
_PADDING_OF_A_GROUP = 64


@dataclass(frozen=True)
class Prefilled:
    """What prefill leaves for B sequences.

    Attributes:
        prompts: ids, padded on the right, shape [B, P].
        lengths: shape [B].
        logits: of each prompt's last token and of the block behind it, shape [B, 1 (+ K), V].
        hidden: what the output head read at the block, shape [B, K, H]; None where nobody asks.
    """

    prompts: Tensor
    lengths: Tensor
    logits: Tensor
    hidden: Tensor | None


@dataclass(frozen=True)
class Prefill:
    """Runs prompts by the rows of a decoder.

    Attributes:
        forward: of its rows; its `hidden` is that of the rows whose logits are returned.
        block: plan of a prompt's last token and the block of mask tokens behind it; None where no block is wanted.
        num_spare_slots: of a cache, behind the prompts.
    """

    forward: RowForward
    block: RowPlan | None
    num_spare_slots: int

    def run(
        self,
        prompts: list[list[int]],
        cache: SlotCache,
        graphs: PromptGraphs | None,
        *,
        repeats: int,
        num_unused: int,
        num_cached: int,
    ) -> Prefilled:
        """Runs each prompt once.

        Args:
            prompts: lists of token ids, none empty.
            cache: for all sequences; written to.
            graphs: that short prompts are run by; None where they run as they are.
            repeats: sequences that continue each prompt, next to each other.
            num_unused: further sequences, which continue the first.
            num_cached: tokens at the beginning of every prompt that it holds already.
        """
        device, P = self.forward.target.device, max(len(prompt) for prompt in prompts)
        source = [prompt for prompt in range(len(prompts)) for _ in range(repeats)] + [0] * num_unused
        # all that the device is told, it is told before it has anything to do that the host would wait for
        rows = torch.tensor(source, device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        padded = torch.tensor([prompt + [0] * (P - len(prompt)) for prompt in prompts], device=device)
        # token 0 may be one that no text has, of which a model makes no numbers
        fed = torch.tensor([prompt + prompt[-1:] * (P - len(prompt)) for prompt in prompts], device=device)
        logits = None if graphs is None or num_cached else self._by(graphs, fed, lengths, cache)
        if logits is None:
            logits = self.logits(fed, lengths, cache, num_cached)
        hidden = None if self.forward.hidden is None else self.forward.hidden[:, 1:]
        if len(prompts) < len(source):
            cache.spread(source, P + logits.shape[1] - 1)
            padded, lengths, logits = padded[rows], lengths[rows], logits[rows]
            hidden = None if hidden is None else hidden[rows]
        return Prefilled(padded, lengths, logits, hidden)

    def logits(self, padded: Tensor, lengths: Tensor, cache: SlotCache, num_cached: int = 0) -> Tensor:
        """Logits of each prompt's last token and of the block behind it, shape [B, 1 (+ K), V].

        Args:
            padded: prompt ids, shape [B, P], padded on the right.
            lengths: shape [B].
            cache: empty but for what `num_cached` says; written to.
            num_cached: tokens at the beginning of every prompt that the cache holds.
        """
        target, forward = self.forward.target, self.forward
        # on a CPU padding costs time; weights that every forward has to bring in cost more
        apart = padded.is_cpu and not is_offloaded(target.base)
        groups = [torch.tensor(group) for group in prompt_groups(lengths.tolist())] if apart else []
        if len(groups) < 2:
            return self._of_group(padded, lengths, cache, num_cached)
        logits, hidden = [], []
        for group in groups:
            longest = int(lengths[group].max())
            num_slots = aligned(longest + self.num_spare_slots, target.dtype, target.device)
            own = SlotCache(target.num_layers, min(num_slots, cache.num_slots), len(group))
            logits.append(self._of_group(padded[group, :longest], lengths[group], own))
            hidden.append(forward.hidden)
            cache.take(own, group)
        place = torch.cat(groups).argsort()
        forward.hidden = None if forward.tap is None else torch.cat(hidden)[place]
        return torch.cat(logits)[place]

    def _by(self, graphs: PromptGraphs, padded: Tensor, lengths: Tensor, cache: SlotCache) -> Tensor | None:
        """As `logits`; None where these prompts are not run by graphs."""
        forward = self.forward

        def compute(padded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
            return self._of_group(padded, lengths, cache, is_recorded=True), forward.hidden

        found = graphs.run(compute, padded, lengths, cache, forward.held)
        if found is None:
            return None
        logits, forward.hidden = found
        return logits

    def _of_group(
        self, padded: Tensor, lengths: Tensor, cache: SlotCache, num_cached: int = 0, *, is_recorded: bool = False
    ) -> Tensor:
        """The same of prompts that are run together; `is_recorded` as of `prefill_prompts`."""
        forward, block = self.forward, None
        if self.block is not None:
            block = forward.block_inputs(lengths, self.block.layout.num_rows - 1)
        gate, tap = forward.gate, forward.tap
        with forward.attached(), forward.packed():
            logits = prefill_prompts(forward.target, padded, lengths, cache, block, gate, tap, num_cached, is_recorded)
            if logits is not None:
                forward.hidden = None if tap is None else tap.hidden
                return logits
        # long or begun prompts, of which all but the last token is in the cache
        plan = forward.plan(real_layout(1)) if self.block is None else self.block
        with forward.attached():
            return forward.run(plan, cache, lengths - 1, padded.gather(1, (lengths - 1)[:, None]))


def prompt_groups(lengths: list[int]) -> list[list[int]]:
    """Indices of prompts in groups of similar length, each to be run by itself so that little of it is padding.

    Args:
        lengths: of the prompts.
    """
    groups: list[list[int]] = []
    longest = padding = 0
    for index in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        padding += longest - lengths[index]
        if not groups or padding > _PADDING_OF_A_GROUP:
            groups.append([])
            longest, padding = lengths[index], 0
        groups[-1].append(index)
    return groups


def prefill_prompts(
    target: TargetModel,
    padded: Tensor,
    lengths: Tensor,
    cache: SlotCache,
    block: Tensor | None,
    gate: LoraGate | None,
    tap: HiddenTap | None = None,
    num_cached: int = 0,
    is_recorded: bool = False,
) -> Tensor | None:
    """Runs the prompts, each with a block of mask tokens behind it.

    Padding stands behind the prompt and its block, so a causal forward without a mask is exact. Prompts that are too
    long for one forward are run in chunks, of which only the first goes without a mask; so is what is new where the
    cache holds the beginning already.

    Args:
        target: the frozen model.
        padded: prompt ids, shape [B, P], padded on the right.
        lengths: shape [B].
        cache: empty but for what `num_cached` says; written to.
        block: inputs of the mask tokens, shape [K, D], or [B, K, D] where prompts have their own; None for no block.
        gate: attached LoRA for the mask tokens, or None.
        tap: attached; keeps the hidden states of the rows whose logits are returned.
        num_cached: tokens at the beginning of every prompt that the cache holds; fewer than any prompt has.
        is_recorded: the forward is recorded, to be run again on prompts of other lengths: it must not go by these.

    Returns:
        logits of each prompt's last token and of its block, shape [B, 1 + K, V]; None for long prompts and those with a
        beginning in the cache, of which all but the last token is in it then, and whose last token is still to be run.
    """
    B, P = padded.shape
    num_masks = 0 if block is None else block.shape[-2]
    chunk = max(_TOKENS_PER_FORWARD // B, _MIN_CHUNK_TOKENS)
    cache.slots = cache.mask_rows = None
    if num_cached or P + num_masks > chunk:
        _run_chunks(target, padded, lengths, cache, chunk, num_cached)
        return None
    if block is None:
        cache.mask_rows = _behind(lengths, P, 0, P, is_recorded)
        positions = target.clamp_positions(torch.arange(P, device=padded.device).expand(B, -1))
        rows = (lengths - 1)[:, None]
        return target.run_at(rows, target.embed(padded), positions, None, cache, tap, rising=True)
    num_rows, most = P + num_masks, min(aligned(P + num_masks, target.dtype, padded.device), cache.num_slots)
    if is_recorded:
        num_rows = max(num_rows, most)
    logits = _run_with_block(target, padded, lengths, cache, block, gate, tap, num_rows, is_recorded)
    # a mask row whose weights in any layer are no numbers has no numbers for logits
    if num_rows < most and bool(logits[:, 1:].isnan().any()):
        logits = _run_with_block(target, padded, lengths, cache, block, gate, tap, most, is_recorded)
    return logits


def _run_with_block(
    target: TargetModel,
    padded: Tensor,
    lengths: Tensor,
    cache: SlotCache,
    block: Tensor,
    gate: LoraGate | None,
    tap: HiddenTap | None,
    num_rows: int,
    is_recorded: bool,
) -> Tensor:
    """Prompts with a block each in one forward of so many rows; arguments and logits as of `prefill_prompts`."""
    (B, P), num_masks, device = padded.shape, block.shape[-2], padded.device
    keep = (lengths - 1)[:, None] + torch.arange(1 + num_masks, device=device)
    rows = keep[:, 1:]
    # what stands behind a shorter prompt's block attends to it
    cache.mask_rows = _behind(lengths, P, 0, num_rows, is_recorded)
    embeds = target.embed(padded)
    embeds = torch.cat([embeds, embeds.new_zeros(B, num_rows - P, embeds.shape[2])], dim=1)
    embeds[torch.arange(B, device=device)[:, None], rows] = block
    gate_open = nullcontext()
    if gate is not None:
        # known to the host for one prompt: half the launches of an index, at every layer with a LoRA
        at = slice(P, P + num_masks) if B == 1 and not is_recorded else rows
        gate_open = gate.open(at, B, num_rows)
    positions = target.clamp_positions(torch.arange(num_rows, device=device).expand(B, -1))
    with gate_open:
        return target.run_at(keep, embeds, positions, None, cache, tap, rising=True)


def _behind(lengths: Tensor, longest: int, start: int, end: int, is_recorded: bool = False) -> Tensor | None:
    """Flags of those of columns start..end-1 that stand behind a prompt, the last M of them, [B, M]; None of none.

    On a GPU the host would wait for where they begin.
    """
    if is_recorded:
        first = 0
    elif lengths.shape[0] == 1:
        first = longest
    else:
        first = int(lengths.min()) if lengths.is_cpu else 0
    first = max(first, start)
    return None if first >= end else torch.arange(first, end, device=lengths.device) >= lengths[:, None]


def _run_chunks(target: TargetModel, padded: Tensor, lengths: Tensor, cache: SlotCache, chunk: int, first: int) -> None:
    """Runs columns first..P-2; what stands behind a shorter prompt is stale and is overwritten before it is seen."""
    B, last = padded.shape[0], padded.shape[1] - 1
    for start in range(first, last, chunk):
        end = min(start + chunk, last)
        positions = torch.arange(start, end, device=padded.device).expand(B, -1)
        cache.mask_rows = _behind(lengths, last + 1, start, end)
        mask = None
        if start:
            cache.slots, cache.num_used = positions, end
            slot = torch.arange(end, device=padded.device)[None]
            visible = (slot[None] <= positions[:, :, None]).expand(B, -1, -1)
            mask = target.attention.render(visible, positions, slot, target.dtype)
        target.run(target.embed(padded[:, start:end]), positions, mask, cache, logits_to_keep=1)
    cache.num_used, cache.mask_rows = cache.num_slots, None
