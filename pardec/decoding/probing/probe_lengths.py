"""What depends on length, seen on the loaded model: windows, scalings and caches' answers behind many tokens.

Caches are filled without running the tokens: slots of ours repeat the keys and values of a short text, and so does a
cache of the model's own. A step of ours behind them is compared with the model's own cached forward.
"""

import copy
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from pardec.decoding.probing.probe_step import SHORT, K, probe_decoder, state_behind, text_of
from pardec.errors import first_line
from pardec.target.cache import SlotCache
from pardec.target.forward import TargetModel, UnsupportedModelError
from pardec.target.own_forward import OwnRounding, deviation, jittered_embeddings, own_forward

# committed tokens behind which models change: windows of 128 to 8,192, temperatures from 8,192 on
QUICK, THOROUGH = (300, 2_500), (300, 2_500, 9_000)
_SPARE_SLOTS = 64  # that a step sees beyond its own, as decoding rounds them up
_SHARE_OF_MEMORY = 4  # of what is free, one part in so many may go into the probe's two caches


@dataclass(frozen=True)
class LengthReport:
    """What was seen.

    Attributes:
        deviations: of real rows from the model's own cached forward by committed tokens, in standard deviations.
        skipped: committed tokens for which there was no memory, or behind which the model itself could not be run.
    """

    deviations: dict[int, float]
    skipped: tuple[int, ...]


@torch.no_grad()
def probe_lengths(target: TargetModel, lengths: tuple[int, ...] = QUICK) -> LengthReport:
    """Compares a step behind each number of committed tokens that the model has positions for.

    Raises:
        UnsupportedModelError: naming the number behind which the model's own cached forward is another.
    """
    limit, name = target.max_positions, target.base.config.model_type
    if limit is not None:
        lengths = tuple(sorted({min(length, limit - K - 2) for length in lengths}))
    length, deviations, skipped = SHORT, {}, []
    try:
        probe = _LengthProbe(target)
        for length in lengths:
            if length <= SHORT:
                continue
            found = probe.step_behind(length)
            if found is None:
                skipped.append(length)
                continue
            deviations[length], tolerance = found
            if not deviations[length] <= tolerance:
                raise UnsupportedModelError(
                    f"{name}: expected real rows equal to the model's own cached forward within {tolerance:.3g} "
                    f"standard deviations of the logits, found {deviations[length]:.3g} behind {length} tokens: "
                    "a window or a scaling that follows the order of keys"
                )
        return LengthReport(deviations, tuple(skipped))
    except UnsupportedModelError:
        raise
    except Exception as error:  # a model's own code may raise anything
        raise UnsupportedModelError(
            f"{name}: expected a step behind {length} tokens, found: {first_line(error)}"
        ) from error


class _LengthProbe:
    """A short text in a cache of ours, and its first token in one of the model's own."""

    def __init__(self, target: TargetModel):
        self.target, self.decoder, self.ids = target, probe_decoder(target), text_of(target, SHORT)
        self.state = state_behind(self.decoder, self.ids)
        self.short = self.state.cache
        self.rounding = OwnRounding(target, self.ids)
        self.own = own_forward(target, self.ids[None, :1], keep=True).past_key_values

    def step_behind(self, num_committed: int) -> tuple[float, float] | None:
        """(deviation, tolerance) of a step behind so many tokens; None where it cannot be compared."""
        num_slots = num_committed + self.decoder.num_slots_per_step + _SPARE_SLOTS
        bytes_needed = 2 * sum(buffer.nbytes for buffer in self.short.buffers) // self.short.num_slots * num_slots
        if not isinstance(self.own, DynamicCache) or bytes_needed > _free_memory(self.target) // _SHARE_OF_MEMORY:
            return None
        # a staircase: whatever range of slots a window cuts off, what is left is another mixture
        source = torch.arange(num_committed, device=self.target.device) * (SHORT - K - 1) // num_committed
        long, own = self.short.stretched(source, num_slots), copy.deepcopy(self.own)
        _fill(own, long, num_committed)
        self.state.cache, self.state.lengths = long, torch.full_like(self.state.lengths, num_committed)
        try:
            expected = own_forward(self.target, self.ids[None, -K - 1 :], num_committed, own).logits[0]
        except Exception:  # more positions than it has, which its configuration does not tell
            return None
        found = self._real_logits()
        worst = deviation(found, expected, expected)
        tolerance = self.rounding.tolerance([worst])
        if not worst <= tolerance:  # long contexts may round more
            with jittered_embeddings(self.target):
                jittered = self._real_logits()
            tolerance = max(tolerance, self.rounding.times(deviation(jittered, found, expected)))
        return worst, tolerance

    def _real_logits(self) -> Tensor:
        return self.decoder.step_logits(self.state)[0, : K + 1]


def _fill(own: Cache, long: SlotCache, num_committed: int) -> None:
    """Writes the slots behind the first into the model's own cache, which keeps of them what it would."""
    for index, layer in enumerate(own.layers):
        if getattr(layer, "keys", None) is not None:  # some layers attend to another's
            keys, values = long.states(index, num_committed)
            own.update(keys[:, :, 1:], values[:, :, 1:], index)


def _free_memory(target: TargetModel) -> int:
    if target.device.type == "cuda":
        return torch.cuda.mem_get_info(target.device)[0]
    return psutil.virtual_memory().available
