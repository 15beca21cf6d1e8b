"""How long several sequences may be that share a batch, for models that compute with the length of their context.

A cache has one answer to how long it is. Models that only ask for it to number positions are given those; one that
scales by it, such as Llama 4 with its temperature, is right for one sequence, and for several as long as the answer
changes nothing.
"""

import torch
from torch import Tensor

from pardec.decoding.probing.probe_step import SHORT, K, probe_decoder, state_behind, text_of
from pardec.decoding.state import DecodeState
from pardec.decoding.step import Decoder
from pardec.target.forward import TargetModel

_LONGEST = 2**16  # looked at for models that name no limit


@torch.no_grad()
def shared_length_limit(target: TargetModel) -> int | None:
    """The largest length that a cache may name for another sequence without changing a step; None for any."""
    decoder = probe_decoder(target)
    state = state_behind(decoder, text_of(target, SHORT))
    same, differs = SHORT - K - 1, target.max_positions or _LONGEST
    expected, was_asked = _logits_if_length_is(decoder, state, same)
    if not was_asked or _is_same(decoder, state, differs, expected):
        return None
    while differs - same > 1:
        middle = (same + differs) // 2
        same, differs = (middle, differs) if _is_same(decoder, state, middle, expected) else (same, middle)
    return same


def _is_same(decoder: Decoder, state: DecodeState, length: int, expected: Tensor) -> bool:
    try:
        found, _ = _logits_if_length_is(decoder, state, length)
    except Exception:  # a model's own code may raise anything
        return False
    return torch.equal(expected, found)


def _logits_if_length_is(decoder: Decoder, state: DecodeState, length: int) -> tuple[Tensor, bool]:
    """Logits of the real rows, and whether the cache was asked for its length."""
    asked = []

    def answer(layer_idx: int = 0) -> int:
        asked.append(layer_idx)
        return length

    state.cache.get_seq_length = answer
    return decoder.step_logits(state)[0, : K + 1], bool(asked)
