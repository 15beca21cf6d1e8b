"""How much memory the pass over real tokens takes, as a whole and in slices, found on a few tokens of the very model.

What is alive is most in one of two moments: where a layer widens its rows, or where attention has made numbers of its
mask. Which of them it is depends on sizes, and of few tokens it is not that of many; so both are carried on by
themselves. Knows nothing of what is learned.
Legend: B sequences, T tokens, R rows of a slice.
"""

from dataclasses import astuple, dataclass

import torch

from pardec.target.forward import FULL, TargetModel
from pardec.target.own_head import OwnHead
from pardec.target.prefix_cache import PrefixCache
from pardec.training.live_bytes import LiveBytes
from pardec.training.prefix_pass import run_prefix, slice_mask

_TOKENS = 96  # of the longest of tiny passes


@dataclass(frozen=True)
class Moment:
    """What is alive in a moment of the last slice, in bytes.

    Attributes:
        constant: whatever the sizes.
        of_token: for each real token, what the pass leaves behind above all.
        of_row: for each row of the slice.
        of_pair: for each pair of a row of the slice and a token that it may see.
        of_mask: for each such pair, of all sequences together.
    """

    constant: float
    of_token: float
    of_row: float
    of_pair: float
    of_mask: float

    def bytes_for(self, batch_size: int, num_tokens: int, num_rows: int) -> int:
        """Of B sequences of T tokens in slices of R."""
        pairs = num_rows * num_tokens
        of_sequence = self.of_token * num_tokens + self.of_row * num_rows + self.of_pair * pairs
        return int(self.constant + self.of_mask * pairs + batch_size * of_sequence)

    def with_another_sequence(self, added: float, num_tokens: int, num_rows: int) -> "Moment":
        """What is the same for all sequences told apart, by the bytes that a second one adds."""
        of_pair = (added - self.of_token * num_tokens - self.of_row * num_rows) / (num_rows * num_tokens)
        of_pair = min(max(0.0, of_pair), self.of_pair)
        return Moment(self.constant, self.of_token, self.of_row, of_pair, self.of_pair - of_pair)


@dataclass(frozen=True)
class PrefixMemory:
    """What is alive at most in the pass over real tokens.

    Attributes:
        moments: of which one is that of most.
    """

    moments: tuple[Moment, ...]

    def bytes_for(self, batch_size: int, num_tokens: int, num_slices: int = 1) -> int:
        """Of B sequences of T tokens, in slices of one size."""
        num_rows = -(-num_tokens // num_slices)
        return max(moment.bytes_for(batch_size, num_tokens, num_rows) for moment in self.moments)

    def carried_on(self, other: "PrefixMemory", share: float) -> "PrefixMemory":
        """What grows along with layers, as from here to another of more layers, `share` times as far."""
        pairs = zip(self.moments, other.moments, strict=True)
        return PrefixMemory(tuple(Moment(*line(astuple(a), astuple(b), share)) for a, b in pairs))


def line(here: tuple[float, ...], there: tuple[float, ...], share: float) -> tuple[float, ...]:
    """Numbers from here to there, `share` times as far."""
    return tuple(a + share * (b - a) for a, b in zip(here, there, strict=True))


def tiny_lengths(target: TargetModel) -> tuple[int, int, int]:
    """T of tiny passes, each twice the one before."""
    least = min(_TOKENS, target.max_positions or _TOKENS) // 4
    return least, 2 * least, 4 * least


def measure_whole(own_head: OwnHead) -> PrefixMemory:
    """Runs tiny passes as a whole; a parabola through three lengths."""
    least, _, most = lengths = tiny_lengths(own_head.target)
    found = [_alive(own_head, T) for T in lengths]
    with_another = _alive(own_head, most, batch_size=2)
    moments = []
    for (f1, f2, f4), more in zip(zip(*found, strict=True), with_another, strict=True):
        of_pair = max(0.0, (f4 - 3 * f2 + 2 * f1) / (6 * least**2))
        of_token = (f2 - f1) / least - 3 * of_pair * least
        moment = Moment(f1 - of_token * least - of_pair * least**2, of_token, 0.0, of_pair, 0.0)
        moments.append(moment.with_another_sequence(more - f4, most, most))
    return PrefixMemory(tuple(moments))


def measure_slices(own_head: OwnHead) -> PrefixMemory:
    """Runs tiny passes in slices: of T / 4 and T / 2 rows, each for two lengths of which one is twice the other."""
    _, T0, T1 = tiny_lengths(own_head.target)
    found = [_alive(own_head, T, num_slices) for T in (T0, T1) for num_slices in (4, 2)]
    with_another = _alive(own_head, T1, 2, batch_size=2)
    moments = []
    for (f00, f01, f10, f11), more in zip(zip(*found, strict=True), with_another, strict=True):
        of_rows = (f01 - f00) / (T0 // 4), (f11 - f10) / (T1 // 4)  # for each row, with the pairs that it is part of
        of_pair = max(0.0, (of_rows[1] - of_rows[0]) / (T1 - T0))
        of_row = of_rows[0] - of_pair * T0
        of_token = (f10 - f01) / (T1 - T0) - of_pair * (T0 // 2)  # both in slices of as many rows
        constant = f01 - of_token * T0 - of_row * (T0 // 2) - of_pair * T0 * (T0 // 2)
        moment = Moment(constant, of_token, of_row, of_pair, 0.0)
        moments.append(moment.with_another_sequence(more - f11, T1, T1 // 2))
    return PrefixMemory(tuple(moments))


@torch.no_grad()
def _alive(own_head: OwnHead, T: int, num_slices: int = 1, *, batch_size: int = 1) -> tuple[int, int]:
    """Most bytes alive in the pass over T tokens of each sequence, and where it attends."""
    target = own_head.target
    ids = torch.zeros(batch_size, T, dtype=torch.long, device=target.device)
    has_windows = target.attention.layer_types != (FULL,)
    with _counted(own_head) as counted:
        left = _windowed(own_head, ids) if has_windows and num_slices == 1 else run_prefix(own_head, ids, num_slices)
        del left
    return counted.peak, counted.attending


def _windowed(own_head: OwnHead, ids: torch.Tensor) -> object:
    """The pass as a whole as it is beyond windows, of which so few tokens know nothing."""
    target, T = own_head.target, ids.shape[1]
    mask = slice_mask(target, slice(0, T))
    if isinstance(mask, dict):
        mask = {kind: None if kind == FULL else one for kind, one in mask.items()}
    cache, positions = PrefixCache(target.num_layers), torch.arange(T, device=ids.device).expand_as(ids)
    return cache, own_head.hidden(target.embed(ids), positions, mask, cache)  # type: ignore[arg-type]


def _counted(own_head: OwnHead) -> LiveBytes:
    counted, base = LiveBytes(), own_head.target.base
    counted.leave_out([*base.parameters(), *base.buffers()])
    return counted
