"""Keys and values of one text that are kept from call to call, so that of the next prompt only what is new is run.

Knows token ids; no messages and no text.
"""

import threading
from collections.abc import Hashable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pardec.decoding.engine_pool import arithmetic, signature
from pardec.decoding.state import DecodeState
from pardec.decoding.weight_watch import WeightWatch
from pardec.target.cache import SlotCache


class Circumstances:
    """What keys and values of a base depend on besides the tokens: weights, modules, hooks, arithmetic."""

    def __init__(self, base: PreTrainedModel):
        """Takes the base; looks at nothing yet."""
        self._base = base
        self._lock = threading.RLock()  # the garbage collector may close a stream in here
        self._watch: WeightWatch | None = None
        self._num_changes = 0

    def now(self) -> Hashable:
        """Another value than the last time if any of it has changed since.

        Numbers are compared, whoever has written to them; of tensors that are no plain ones, as quantised weights are
        not, it is noticed what was written by torch.
        """
        tensors = {id(tensor): tensor for module in self._base.modules() for tensor in _tensors(module)}.values()
        written = tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)
        with self._lock:
            self._compare([tensor for tensor in tensors if _has_numbers(tensor)])
            return signature(self._base), arithmetic(self._base.device), written, self._num_changes

    def free(self) -> None:
        """Lets go of what makes the next look quick."""
        with self._lock:
            if self._watch is not None:
                self._watch.free()

    def _compare(self, tensors: list[Tensor]) -> None:
        if self._watch is None or not self._watch.holds(tensors):
            newer = WeightWatch(tensors)
            self._watch = newer if self._watch is None else self._watch.renewed(newer)
            self._num_changes += 1


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that are neither."""
    for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
        if isinstance(value, Tensor):
            yield value


def _has_numbers(tensor: Tensor) -> bool:
    """Whether these lie in memory as the dtype says, in a tensor of torch's own kind."""
    return (
        type(tensor) in (nn.Parameter, Tensor)
        and tensor.layout == torch.strided
        and not (tensor.is_meta or tensor.is_conj())
    )


class KeptCache:
    """What `stream(..., kept=)` leaves for the next call: the longest common beginning is not run again.

    A copy, so that calls with one of these do not disturb each other, nor any other call. It is of no use to another
    model, or once weights were replaced or written to: then everything is run.

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
