"""Shows on the loaded model itself that what decoding relies on holds, before anything is promised.

Mask rows cannot disturb real rows: a short prompt is decoded for one fused step with two very different inputs at the
mask rows, and the real rows' logits are compared with those of a plain forward of the same tokens. And a sampler head
finds the hidden states that it reads.
"""

import torch
from torch import Tensor

from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw
from pardec.decoding.step import Decoder
from pardec.errors import first_line
from pardec.target.forward import SLIDING, TargetModel, UnsupportedModelError
from pardec.target.hidden import HiddenTap

_K = 2
# largest difference between logits, in units of the spread of the logits
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}
# of other dtypes, whose rounding depends on the model: so many times what its own cached decoding deviates by
_TIMES_OWN = 4


def probe(target: TargetModel) -> float:
    """Largest deviation of real rows from a plain forward, in standard deviations of the logits.

    Raises:
        UnsupportedModelError: if it is beyond the tolerance of the model's dtype, or the model cannot run the rows.
    """
    ids = torch.arange(_prompt_tokens(target), device=target.device) * 7 % target.vocab_size
    try:
        with torch.no_grad():
            deviation, tolerance = _deviation_and_tolerance(target, ids)
    except UnsupportedModelError:
        raise
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"{target.base.config.model_type}: expected a model that runs input embeddings at given positions under "
            f"a 4-D attention mask, found: {first_line(error)}"
        ) from error
    if not deviation <= tolerance:
        raise UnsupportedModelError(
            f"{target.base.config.model_type}: expected real rows equal to a plain forward within "
            f"{tolerance:g} standard deviations of the logits ({target.dtype}), found {deviation:.3g}: "
            "mask rows reach real rows, or positions or masks are not honoured"
        )
    return deviation


@torch.no_grad()
def probe_head(target: TargetModel, tap: HiddenTap) -> None:
    """Checks that the output head reads one hidden state for each row of logits, where the tap sees it.

    Raises:
        UnsupportedModelError: if it does not.
    """
    ids = torch.arange(2, device=target.device)[None] % target.vocab_size
    with tap.attached():
        logits = target.base(ids, use_cache=False).logits
        found = None if not tap.has_seen else list(tap.hidden.shape)
    expected = [*logits.shape[:2], tap.output_embeddings.shape[1]]
    if found != expected or logits.shape[2] != tap.output_embeddings.shape[0]:
        raise UnsupportedModelError(
            f"{target.base.config.model_type}: expected an output head that reads hidden states of shape {expected} "
            f"and writes {tap.output_embeddings.shape[0]} logits, found {found} and {logits.shape[2]}"
        )


def _prompt_tokens(target: TargetModel) -> int:
    """Long enough to leave a small sliding window, which a mask without windows would get wrong."""
    window = target.attention.window if SLIDING in target.attention.layer_types else None
    length = 12 if not window or window > 256 else max(12, window + 4)
    limit = target.max_positions
    return length if limit is None else min(length, limit - _K - 2)


def _deviation_and_tolerance(target: TargetModel, ids: Tensor) -> tuple[float, float]:
    plain = target.base(ids[None], use_cache=False).logits[0].float()
    scale, worst = plain.std().clamp_min(1e-6), 0.0
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        # as large as real embeddings once, a hundred times as large the second time
        masks = torch.randn(_K, target.embedding_dim, generator=generator) * 100**seed
        size = target.embed(ids).float().std()
        masks = (masks.to(target.device) * size).to(target.dtype)
        logits = _fused_step_logits(target, ids, masks)
        worst = max(worst, float((logits.float() - plain[-_K - 1 :]).abs().max() / scale))
    if target.dtype in _TOLERANCE:
        return worst, _TOLERANCE[target.dtype]
    begun = target.base(ids[None, : -_K - 1], use_cache=True).past_key_values
    cached = target.base(ids[None, -_K - 1 :], past_key_values=begun, use_cache=True).logits[0].float()
    own = float((cached - plain[-_K - 1 :]).abs().max() / scale)
    return worst, max(_TIMES_OWN * own, 8 * torch.finfo(target.dtype).eps)


def _fused_step_logits(target: TargetModel, ids: Tensor, masks: Tensor) -> Tensor:
    """Logits of the last K + 1 tokens of `ids`, run as bonus token and drafts of a fused step."""
    no_eos = ids.new_empty(0)
    decoder = Decoder(RowForward(target, masks), "fused", _K, TokenLaw(greedy=True), _K + 2, no_eos)
    prompt, rest = ids[: -_K - 1], ids[-_K - 1 :]
    state = decoder.prefill([prompt.tolist()])
    state.bonus, state.drafts = rest[:1], rest[None, 1:]
    return decoder.step_logits(state)[0, : _K + 1]
