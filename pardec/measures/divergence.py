"""Where two continuations of a prompt first differ, and whether their tokens are a tie that rounding decides there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pardec.target.base import eos_token_ids

# in units of logits: the best logits are a tie when they are this close
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
# In units of eps(dtype) * largest |logit|, for dtypes that round the logits themselves: rounding two logits moves
# their gap by up to 1 such unit, so 2 between two forwards with different numbers of rows, which take other kernels.
# The rest is for the activations, which every layer rounds as well.
HALF_PRECISION_TOLERANCE = 8


@dataclass(frozen=True)
class Divergence:
    """The first place where two continuations of a prompt differ; gaps are in units of logits."""

    prompt: str  # its name
    index: int  # of the first new token that differs
    tokens: tuple[int | None, int | None]  # of the mode and of the reference; None where the sequence has ended
    top2_gap: float  # between the two largest logits
    relative_gap: float  # top2_gap / largest |logit|
    token_gap: float  # between the logits of the two tokens
    shortfall: float  # of the less likely of the two tokens, below the largest logit
    tolerance: float  # the largest shortfall of a tie
    explained: bool  # whether the two tokens are a tie


def tie_tolerance(dtype: torch.dtype, largest_logit: float) -> float:
    """How far below the largest logit a token may be that rounding in `dtype` can put first, in units of logits."""
    if dtype in TOLERANCE:
        return TOLERANCE[dtype]
    return HALF_PRECISION_TOLERANCE * torch.finfo(dtype).eps * largest_logit


def first_difference(found: Sequence[int], reference: Sequence[int]) -> int | None:
    """Index of the first token that differs; where one sequence begins with the other, the shorter one's length."""
    for index, (a, b) in enumerate(zip(found, reference, strict=False)):
        if a != b:
            return index
    return None if len(found) == len(reference) else min(len(found), len(reference))


def examine(
    prompt: str,
    found: Sequence[int],
    reference: Sequence[int],
    logits_after: Callable[[Sequence[int]], Tensor],
    dtype: torch.dtype,
    eos_ids: Sequence[int],
) -> Divergence | None:
    """The first divergence of two continuations, None if they are the same.

    Both tokens must be within the tolerance of the largest logit: in a low precision the two best tokens of this
    forward need not be those that the decodings chose. A sequence that ends without an EOS where the other goes on is
    taken to have chosen the likeliest EOS silently; no other difference in length can be a tie.

    Args:
        prompt: its name.
        found: new tokens of a mode.
        reference: new tokens that it is compared with.
        logits_after: the base's logits behind the prompt and these new tokens, shape [V].
        dtype: that both were decoded in.
        eos_ids: that end a text.
    """
    index = first_difference(found, reference)
    if index is None:
        return None
    logits = logits_after(reference[:index]).cpu().double()  # subtracting in float64 adds no rounding
    first, second = logits.topk(2).values.tolist()
    largest = float(logits.abs().nan_to_num(nan=0.0, posinf=0.0).max())
    tolerance = tie_tolerance(dtype, largest)
    ours, theirs = (ids[index] if index < len(ids) else None for ids in (found, reference))
    chosen = [token for token in (ours, theirs) if token is not None]
    if len(chosen) == 1 and eos_ids and not set(reference[:index][-1:]) & set(eos_ids):
        chosen.append(max(eos_ids, key=lambda token: float(logits[token])))
    below = first - logits[chosen]
    return Divergence(
        prompt=prompt,
        index=index,
        tokens=(ours, theirs),
        top2_gap=first - second,
        relative_gap=(first - second) / largest if largest else 0.0,
        token_gap=float(below.max() - below.min()),
        shortfall=float(below.max()),
        tolerance=tolerance,
        # a logit that is no number is never within the tolerance
        explained=len(set(chosen)) == 2 and bool((below <= tolerance).all()),
    )


def divergence_from(
    base: PreTrainedModel, prompt: str, prompt_ids: Sequence[int], found: Sequence[int], reference: Sequence[int]
) -> Divergence | None:
    """`examine` by one plain forward of `base`, in whose dtype both were decoded, over what they share."""

    @torch.no_grad()
    def logits_after(new: Sequence[int]) -> Tensor:
        ids = torch.tensor([[*prompt_ids, *new]], device=base.device)
        return base(input_ids=ids, use_cache=False).logits[0, -1]

    return examine(prompt, found, reference, logits_after, base.dtype, eos_token_ids(base))
