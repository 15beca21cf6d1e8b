"""The model's own forwards, masks and caches its own, and what they differ by among themselves: its rounding.

What the probes hold steps of ours against.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from pardec.target.forward import TargetModel

# largest difference between logits, in units of the spread of the logits, of dtypes that round little
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-3}
# what is off by more is another model, whatever its own forwards deviate by; float64 has no layers that quantise
_CEILING = {torch.float64: 1e-4, torch.float32: 0.25, torch.bfloat16: 1.0, torch.float16: 1.0}
_TIMES_OWN = 4  # what rounding does depends on the model: so many times what its own forwards deviate by
_NUM_CACHED_ROWS = 3


def own_forward(
    target: TargetModel, ids: Tensor, first_position: int = 0, cache: Cache | None = None, *, keep: bool = False
):
    """Output of the model's own forward at the positions that `generate` gives it.

    Args:
        target: the model.
        ids: shape [B, n].
        first_position: of the first of them.
        cache: of the model's own, with what stands before.
        keep: makes one where there is none.
    """
    positions = torch.arange(first_position, first_position + ids.shape[1], device=ids.device).expand_as(ids)
    use_cache = keep or cache is not None
    return target.base(ids, position_ids=positions, past_key_values=cache, use_cache=use_cache)


def cached_logits(target: TargetModel, ids: Tensor, num_rows: int) -> Tensor:
    """Logits of the last rows of a text, shape [n], by the model's own cached forward: shape [num_rows, V]."""
    begun = own_forward(target, ids[None, :-num_rows], keep=True).past_key_values
    return own_forward(target, ids[None, -num_rows:], ids.shape[0] - num_rows, begun).logits[0]


def deviation(found: Tensor, expected: Tensor, plain: Tensor) -> float:
    """Largest difference of logits, in units of the spread of those of the plain forward."""
    worst = (found.double() - expected.double()).abs().max()
    return float(worst / plain.double().std().clamp_min(1e-6))


@contextmanager
def jittered_embeddings(target: TargetModel) -> Iterator[None]:
    """Input embeddings off by their dtype's rounding, in this context: what it does is no more than rounding may do."""
    eps, generator = torch.finfo(target.dtype).eps, torch.Generator().manual_seed(0)

    def jitter(module: nn.Module, args: object, output: Tensor) -> Tensor:
        signs = torch.randint(-1, 2, output.shape, generator=generator).to(output.device)
        return output * (1 + eps * signs).to(output.dtype)

    handle = target.base.get_input_embeddings().register_forward_hook(jitter)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class OwnRounding:
    """What equal logits of a text may differ by, measured on the model where that is needed, and once.

    Attributes:
        target: the model.
        ids: the text, shape [n].
    """

    target: TargetModel
    ids: Tensor

    @cached_property
    def own(self) -> float:
        """What its logits deviate by in its cached decoding, or where its inputs are rounded."""
        target, ids = self.target, self.ids
        plain = own_forward(target, ids[None]).logits[0]
        cached = cached_logits(target, ids, _NUM_CACHED_ROWS)
        with jittered_embeddings(target):
            jittered = own_forward(target, ids[None]).logits[0]
        return max(deviation(cached, plain[-_NUM_CACHED_ROWS:], plain), deviation(jittered, plain, plain))

    @property
    def of_equal_rows(self) -> float:
        """For rows with the same inputs, positions and masks, never more than dtypes round that round little."""
        dtype = self.target.dtype
        return min(_TIMES_OWN * self.own, _TOLERANCE.get(dtype, _CEILING[dtype]))

    def tolerance(self, deviations: Iterable[float]) -> float:
        """For the same rows by other forwards.

        Measured where the dtype rounds much, or where these deviations are beyond what it rounds: layers that quantise
        their inputs make steps of rounding. Never so much that another model could pass.
        """
        fixed = _TOLERANCE.get(self.target.dtype, 0.0)
        return fixed if all(found <= fixed for found in deviations) else max(fixed, self.times(self.own))

    def times(self, own: float) -> float:
        """What is allowed where the model's own forwards deviate by `own`."""
        return min(_TIMES_OWN * own, _CEILING[self.target.dtype])
