"""A step on a short text, run on the loaded model to see that what decoding relies on holds.

Mask rows cannot disturb real rows: a fused step is run with two very different inputs at the mask rows, and the real
rows' logits must be the same numbers. Positions and masks are honoured: those logits are the plain forward's, and a
block of mask rows computes the same wherever it stands among the rows.
"""

import torch
from torch import Tensor

from pardec.adapters.gated_lora import LoraGate
from pardec.decoding.prefill import prefill_prompts
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw
from pardec.decoding.state import DecodeState
from pardec.decoding.step import Decoder
from pardec.errors import first_line
from pardec.target.cache import SlotCache
from pardec.target.forward import SLIDING, TargetModel, UnsupportedModelError
from pardec.target.own_forward import OwnRounding, cached_logits, deviation, own_forward

K = 2  # of the probe's steps
SHORT = 12  # tokens of its short text
_NUM_NEIGHBOURS = 8


def probe_step(target: TargetModel) -> float:
    """Largest deviation of real rows from a plain forward, in standard deviations of the logits.

    Raises:
        UnsupportedModelError: if real rows depend on mask rows, if the deviation is beyond the tolerance of the
            model's dtype, if mask rows depend on the order of rows, or if the model cannot run the rows.
    """
    ids = text_of(target, prompt_tokens(target))
    try:
        with torch.no_grad():
            return _worst_deviation(target, ids)
    except UnsupportedModelError:
        raise
    except Exception as error:  # a model's own code may raise anything
        raise UnsupportedModelError(
            f"{target.base.config.model_type}: expected a model that runs input embeddings at given positions under "
            f"a 4-D attention mask, found: {first_line(error)}"
        ) from error


def _worst_deviation(target: TargetModel, ids: Tensor) -> float:
    plain = own_forward(target, ids[None]).logits[0]
    # inputs as large as real embeddings, and a hundred times as large
    decoders = [probe_decoder(target, seed, 100.0**seed) for seed in (0, 1)]
    states = [state_behind(decoder, ids) for decoder in decoders]
    logits = [decoder.step_logits(state)[0] for decoder, state in zip(decoders, states, strict=True)]
    prefill = _prefill_logits(decoders[0], ids[:-K])
    found = {
        "rows of a step that are those of a plain forward, by position and mask": max(
            deviation(prefill[0], plain[-K - 1], plain),
            *(deviation(one[: K + 1], plain[-K - 1 :], plain) for one in logits),
        ),
        "rows that follow their positions, not their order (as with alibi and the like)": deviation(
            logits[0][K + 1 : 2 * K + 1], prefill[1:], plain
        ),
        "cached decoding of its own, a token at a time, that is its plain forward": deviation(
            cached_logits(target, ids, num_rows=1), plain[-1:], plain
        ),
        "texts that do not depend on what stands beside them in a batch": deviation(
            own_forward(target, torch.stack([ids, ids.roll(1)])).logits[0], plain, plain
        ),
    }
    rounding = OwnRounding(target, ids)
    tolerance = rounding.tolerance(found.values())
    for expected, worst in found.items():
        if not worst <= tolerance:
            raise UnsupportedModelError(
                f"{target.base.config.model_type}: expected {expected}, within {tolerance:.3g} standard deviations of "
                f"the logits ({target.dtype}), found {worst:.3g}"
            )
    leaked = deviation(logits[1][: K + 1], logits[0][: K + 1], plain)
    # experts that batch their rows round with the number of them
    if leaked > 0 and not (leaked <= min(tolerance, rounding.of_equal_rows) and _rounds_with_neighbours(target, ids)):
        raise UnsupportedModelError(
            f"{target.base.config.model_type}: expected real rows that are the same whatever stands at mask rows, "
            f"found a difference of {leaked:.3g} standard deviations of the logits"
        )
    return next(iter(found.values()))


# ---------------------------------------------------------------------- what the probes share


def text_of(target: TargetModel, length: int) -> Tensor:
    """Token ids that differ, shape [length]."""
    return torch.arange(length, device=target.device) * 7 % target.vocab_size


def probe_decoder(target: TargetModel, seed: int = 0, scale: float = 1.0, gate: LoraGate | None = None) -> Decoder:
    """A fused greedy decoder with random mask tokens, `scale` times as large as real embeddings, and with a LoRA."""
    masks = torch.randn(K, target.embedding_dim, generator=torch.Generator().manual_seed(seed)) * scale
    size = target.embed(text_of(target, SHORT)).float().std()
    masks = (masks.to(target.device) * size).to(target.dtype)
    no_eos = torch.empty(0, dtype=torch.long, device=target.device)
    return Decoder(RowForward(target, masks, gate), "fused", K, TokenLaw(greedy=True), K + 2, no_eos)


def state_behind(decoder: Decoder, ids: Tensor, cache: SlotCache | None = None) -> DecodeState:
    """A state whose next step verifies the last K + 1 of `ids`, bonus token and drafts, behind the others."""
    state = decoder.prefill([ids[: -K - 1].tolist()], cache=cache)
    state.bonus, state.drafts = ids[-K - 1 : -K], ids[None, -K:]
    return state


def _rounds_with_neighbours(target: TargetModel, ids: Tensor) -> bool:
    """Whether other texts in a batch change what a text's logits round to, as with experts that batch their rows."""
    for length in range(1, K + 2):  # of few rows, one more or less in an expert's batch takes another kernel
        # a token over and over goes to few experts, so that numbers of rows differ most
        others = [token.expand(length) for token in text_of(target, _NUM_NEIGHBOURS)]
        pairs = [torch.stack([ids[:length], other]) for other in others]
        logits = [own_forward(target, pair).logits[0] for pair in pairs]
        if any(not torch.equal(one, logits[0]) for one in logits[1:]):
            return True
    return False


def _prefill_logits(decoder: Decoder, ids: Tensor) -> Tensor:
    """Logits of the last of `ids` and of a block of mask rows behind it, as prefill computes them: shape [1 + K, V]."""
    lengths = torch.tensor([ids.shape[0]], device=ids.device)
    cache = SlotCache(decoder.target.num_layers, ids.shape[0] + K)
    block = decoder.forward.block_inputs(lengths, K)
    logits = prefill_prompts(decoder.target, ids[None], lengths, cache, block, None)
    assert logits is not None
    return logits[0]


def prompt_tokens(target: TargetModel) -> int:
    """Long enough to leave a small sliding window, which a mask without windows would get wrong."""
    window = target.attention.window if SLIDING in target.attention.layer_types else None
    length = SHORT if not window or window > 256 else max(SHORT, window + 4)
    limit = target.max_positions
    return length if limit is None else min(length, limit - K - 2)
