"""What a captured step will take on a device that is not here: counted from the step itself, which runs on shapes.

The model is one line, `predicted_seconds`. It knows no caches of the device, no shares of it that stand idle in
kernels of few blocks, and nothing of the host, which a captured step does not wait for.
Legend: K num_speculative_tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timing.bandwidth import flops_per_step, lora_bytes_per_step, weight_bytes_per_step
from timing.launches import StepCount, counted_step
from timing.published_peaks import Peaks
from timing.shapes import lora_without_numbers, model_without_numbers
from transformers import PretrainedConfig

from pardec.adapters.gated_lora import LoraGate
from pardec.decoding.engine import bucket
from pardec.decoding.graphs import CapturedSteps
from pardec.decoding.prepack import PackedLinears
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw
from pardec.decoding.state import DecodeState
from pardec.decoding.step import Decoder
from pardec.draft_tree import AnyTree, DynamicTree
from pardec.target.attention import query_group
from pardec.target.cache import SlotCache
from pardec.target.forward import TargetModel
from pardec.target.survey import siblings_of

# of the published bandwidth, which is that of the memory's pins, long reads by good kernels reach about so much
SHARE_OF_BANDWIDTH = 0.9
# published operations are those of large square products at the highest clock; few rows leave tiles partly empty
SHARE_OF_FLOPS = 0.6
# inside a captured graph: launching a kernel, filling the multiprocessors and draining them; small ones do little else.
# Measured on an H200 with torch 2.11, 8B and 135 M: 2.2 to 3.4 us for plain and fused steps
SECONDS_PER_LAUNCH = 2.7e-6
# one id ends a text; room for new tokens costs a step nothing
_NUM_EOS, _CAPACITY = 1, 256


@dataclass(frozen=True)
class Counted:
    """A captured step, counted.

    Attributes:
        num_speculative_tokens: K.
        with_lora: at mask rows.
        context: committed tokens.
        launches: kernels of the graph.
        num_bytes: that its operations read and write.
        flops: of its products.
        least_bytes: that must be read: weights, LoRA, keys and values of the context, each once.
    """

    num_speculative_tokens: int
    with_lora: bool
    context: int
    launches: int
    num_bytes: int
    flops: float
    least_bytes: int


def predicted_seconds(counted: Counted, peaks: Peaks) -> float:
    """Bytes or arithmetic, whichever takes longer, and a price for every launch."""
    memory, arithmetic = busy_seconds(counted, peaks)
    return max(memory, arithmetic) + counted.launches * SECONDS_PER_LAUNCH


def busy_seconds(counted: Counted, peaks: Peaks) -> tuple[float, float]:
    """Seconds that moving its bytes takes, and its arithmetic."""
    memory = counted.num_bytes / (SHARE_OF_BANDWIDTH * peaks.bytes_per_second)
    return memory, counted.flops / (SHARE_OF_FLOPS * peaks.flops_per_second)


def constants() -> dict[str, float]:
    """What the model supposes of every device, by name."""
    return {
        "share_of_bandwidth": SHARE_OF_BANDWIDTH,
        "share_of_flops": SHARE_OF_FLOPS,
        "seconds_per_launch": SECONDS_PER_LAUNCH,
    }


def figures(counted: Sequence[Counted], peaks: Peaks, lora_rank: int) -> list[dict[str, Any]]:
    """A row of figures for each step, ready for JSON; a plain step behind the same context must be among them."""
    plain = {one.context: predicted_seconds(one, peaks) for one in counted if not one.num_speculative_tokens}
    rows = []
    for one in counted:
        seconds, (memory, arithmetic) = predicted_seconds(one, peaks), busy_seconds(one, peaks)
        rows.append(
            {
                "context": one.context,
                "rows": (one.num_speculative_tokens + 1) ** 2,
                "num_speculative_tokens": one.num_speculative_tokens,
                "lora": one.with_lora,
                "lora_rank": lora_rank if one.with_lora else None,
                "launches": one.launches,
                "bytes": one.num_bytes,
                "flops": one.flops,
                "busy_with": "memory" if memory >= arithmetic else "arithmetic",
                "bound_ms": round(1000 * one.least_bytes / peaks.bytes_per_second, 4),
                "predicted_ms": round(1000 * seconds, 4),
                "ratio_to_plain": round(seconds / plain[one.context], 4),
            }
        )
    return rows


class ShapeOnly:
    """Counts steps of a model of which there is nothing but shapes."""

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype, lora_rank: int):
        """Args: config; dtype: of weights and activations; lora_rank: of the LoRA on every linear layer."""
        self.base = model_without_numbers(config, dtype)
        self._target = TargetModel.wrap(self.base)
        lora = lora_without_numbers(self.base, lora_rank)
        self._gate = LoraGate(self.base, lora)
        self._siblings = siblings_of(self._target)
        self._packed: dict[bool, PackedLinears] = {}
        self._weight_bytes = weight_bytes_per_step(self.base)
        self._lora_bytes = lora_bytes_per_step(lora, dtype)

    def count(
        self,
        num_speculative_tokens: int,
        with_lora: bool,
        context: int,
        *,
        tree: AnyTree | None = None,
        batch_size: int = 1,
    ) -> Counted:
        """A plain step for K = 0, else a fused one, greedy, behind `context` committed tokens.

        Args:
            num_speculative_tokens: K.
            with_lora: at mask rows.
            context: committed tokens of each sequence.
            tree: K deep; default the full chain of (K + 1)^2 rows.
            batch_size: sequences.

        Raises:
            ValueError: if the model has not so many positions.
        """
        K, limit = num_speculative_tokens, self._target.max_positions
        decoder = self._decoder(K, with_lora, tree)
        needed = context + decoder.num_slots_per_step
        if limit is not None and needed > limit:
            raise ValueError(f"contexts: expected at most the {limit} positions of the model, found {needed} in a step")
        # as the engine does where it reads a step late
        num_slots = bucket(needed + decoder.tokens_per_step, few=False, coarse=True)
        cache = SlotCache(self._target.num_layers, num_slots, batch_size)
        counted = captured_count(decoder, cache)
        if tree is not None:  # once more as the engine has it, which knows of what kinds the cache's buffers are
            cache = SlotCache(self._target.num_layers, num_slots, batch_size, cache.kinds)
            counted = captured_count(decoder, cache)
        context_bytes = sum(buffer.nbytes for buffer in cache.buffers) * context // num_slots
        return Counted(
            num_speculative_tokens=K,
            with_lora=with_lora,
            context=context,
            launches=counted.num_launches,
            num_bytes=counted.num_bytes,
            flops=flops_per_step(self.base, batch_size * decoder.rows_per_step, context),
            least_bytes=self._weight_bytes + self._lora_bytes * with_lora + context_bytes,
        )

    def _decoder(self, K: int, with_lora: bool, tree: AnyTree | None) -> Decoder:
        target = self._target
        masks = torch.empty(K, target.embedding_dim, dtype=target.dtype, device="meta") if K else None
        gate, linears = self._gate if with_lora else None, self._linears(with_lora)
        forward = RowForward(target, masks, gate, linears, query_group(self.base))
        eos = torch.empty(_NUM_EOS, dtype=torch.long, device="meta")
        return Decoder(forward, "fused" if K else "plain", K, TokenLaw(greedy=True), _CAPACITY, eos, tree=tree)

    def _linears(self, with_lora: bool) -> PackedLinears:
        """As the engine packs them where a quarter of the memory that is free does."""
        if with_lora not in self._packed:
            self._packed[with_lora] = PackedLinears(self._siblings, self._gate if with_lora else None)
            self._packed[with_lora].refresh()
        return self._packed[with_lora]


def captured_count(decoder: Decoder, cache: SlotCache) -> StepCount:
    """What the graph of a step would hold, the copies into the state that it works on among them."""
    lengths = torch.empty(cache.num_sequences or 1, dtype=torch.long, device="meta")
    drafts = lengths.new_empty(lengths.shape[0], decoder.num_drafts)
    state = DecodeState.begin(
        cache,
        lengths[:, None],
        lengths,
        decoder.eos_token_ids,
        room=lengths,
        drafts=drafts,
        parents=torch.empty_like(drafts) if isinstance(decoder.tree, DynamicTree) else None,
        draft_length=decoder.num_speculative_tokens,
        draft_probs=None,
        width=decoder.tokens_per_step,
        capacity=_CAPACITY,
    )
    counts: list[StepCount] = []

    def count(run: Any, *_: object) -> Any:
        with counted_step() as counted:
            run()
        counts.append(counted)
        return lambda: None

    steps = CapturedSteps(decoder, count)
    steps.take_over(state)
    steps.step()
    return counts[0]
