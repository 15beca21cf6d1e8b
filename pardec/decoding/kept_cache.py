"""Keys and values of one text that are kept from call to call, so that of the next prompt only what is new is run.

Knows token ids; no messages and no text.
"""

from collections.abc import Hashable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pardec.decoding.engine_pool import arithmetic, signature
from pardec.decoding.state import DecodeState
from pardec.target.cache import SlotCache


def circumstances(base: PreTrainedModel) -> Hashable:
    """Changes with what keys and values depend on besides the tokens: weights, modules, hooks, arithmetic."""
    tensors = [tensor for module in base.modules() for tensor in _tensors(module)]
    written = tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)
    return signature(base), arithmetic(base.device), written


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that are neither."""
    for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
        if isinstance(value, Tensor):
            yield value


class KeptCache:
    """What `stream(..., kept=)` leaves for the next call: the longest common beginning is not run again.

    A copy, so that calls with one of these do not disturb each other, nor any other call. It is of no use to another
    model, or once weights were replaced or written to: then everything is run. What is written past torch, through
    `weight.data`, goes unnoticed; make a new one then.

    Attributes:
        token_ids: whose keys and values are kept.
        num_reused: tokens of the last call's prompt that were not run again.
    """

    def __init__(self) -> None:
        """Begins empty."""
        self.token_ids: list[int] = []
        self.num_reused = 0
        self._cache: SlotCache | None = None
        self._made_by: Hashable = None

    def begin(self, prompt: list[int], made_by: Hashable) -> SlotCache | None:
        """The keys and values of the first `num_reused` tokens of `prompt`, which this counts; None for none.

        Args:
            prompt: token ids; the last of them is always run.
            made_by: changes with the model and whatever else keys and values depend on.
        """
        usable = self._cache is not None and made_by == self._made_by
        pairs = zip(self.token_ids if usable else [], prompt[:-1], strict=False)
        same = [mine == theirs for mine, theirs in pairs]
        self.num_reused = [*same, False].index(False)
        return self._cache if self.num_reused else None

    def keep(self, state: DecodeState, prompt: list[int], made_by: Hashable) -> None:
        """Keeps what is committed of the one sequence that a state has.

        Args:
            state: behind prefill or any step.
            prompt: its token ids.
            made_by: as in `begin`.
        """
        # the newest token is not in the cache; the state may be a step ahead of what was read, so it alone tells
        num_new = int(state.num_new[0])
        self.token_ids = [*prompt, *state.output[0, :num_new].tolist()][:-1]
        committed = torch.arange(len(self.token_ids), device=state.lengths.device)
        self._cache = state.cache.stretched(committed, len(self.token_ids))
        self._made_by = made_by
