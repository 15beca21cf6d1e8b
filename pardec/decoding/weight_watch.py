"""Whether weights still have the numbers that they had, whoever has written to them, in one launch on a GPU.

A few hundred matrices are a few thousand small kernels, for whose launches a host takes longer than for many steps of a
small model. Knows tensors; no layer.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pardec.decoding.capture import (
    CaptureSite,
    Recorder,
    cause_of,
    forbids_capture,
    is_out_of_memory,
    record_cuda_graph,
    recorded,
)
from pardec.target.checksums import checksums, differ, launched_checksum

_Place = tuple[int, tuple[int, ...], bool]


@dataclass(frozen=True)
class _Comparison:
    """A captured comparison of weights that lie in `places`; `replay` says in `flag`, bool, whether they differ."""

    places: list[_Place]
    replay: Callable[[], None]
    flag: Tensor


class WeightWatch:
    """Remembers the numbers of weights, by checksums.

    On a GPU the comparison is captured when weights lie for the second time where they lay the last time: of a model
    that is brought in anew for each call it never is. A graph takes some 64 MiB.
    """

    def __init__(self, weights: Sequence[Tensor], recorder: Recorder | None = None):
        """Args: weights: as they are now, on any devices; recorder: makes graphs; default CUDA graphs, on CUDA."""
        self._kinds = _kinds(weights)
        self._recorder = recorder
        self._sums = self._sums_of(weights)
        self._places: dict[torch.device, list[_Place]] = {}  # of the last comparison
        self._compared: dict[torch.device, _Comparison] = {}
        self._captures = True

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether these are such weights as those of then, with their numbers, wherever on their devices they lie."""
        if _kinds(weights) != self._kinds:
            return False
        by_device: dict[torch.device, list[int]] = {}
        for index, weight in enumerate(weights):
            by_device.setdefault(weight.device, []).append(index)
        flags = [
            self._differ(device, [weights[i] for i in indices], [self._sums[i] for i in indices])
            for device, indices in by_device.items()
        ]
        # every device has been told what to do before one is waited for; all are, as what they read may go after that
        told = [bool(flag) for flag in flags]
        return not any(told)

    def renewed(self, newer: "WeightWatch") -> "WeightWatch":
        """A watch over what `newer` remembers: this one with its graphs, if it is of such weights, else `newer`."""
        newer._captures = newer._captures and self._captures
        if self._kinds != newer._kinds:
            return newer
        for mine, theirs in zip(self._sums, newer._sums, strict=True):
            mine.copy_(theirs)
        return self

    def free(self) -> None:
        """Lets go of the graphs and their memory."""
        self._compared.clear()
        self._places.clear()

    def _differ(self, device: torch.device, weights: list[Tensor], sums: list[Tensor]) -> Tensor:
        """Whether weights of one device differ from what their checksums say, shape [], on it."""
        if not self._captures or (device.type != "cuda" and self._recorder is None):
            return self._differ_now(weights, sums)
        places = [(one.data_ptr(), one.stride(), one.is_neg()) for one in weights]
        known = self._compared.get(device)
        if known is None or known.places != places:
            self._compared.pop(device, None)
            before, self._places[device] = self._places.get(device), places
            known = self._captured(device, places, weights, sums) if before == places else None
            if known is None:
                return self._differ_now(weights, sums)
            self._compared[device] = known
        known.replay()
        return known.flag

    def _differ_now(self, weights: Sequence[Tensor], sums: Sequence[Tensor]) -> Tensor:
        return differ(self._sums_of(weights), sums)

    def _sums_of(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """What the host computes cannot be recorded."""
        return checksums(weights) if self._recorder is None else [launched_checksum(weight) for weight in weights]

    def _captured(
        self, device: torch.device, places: list[_Place], weights: list[Tensor], sums: list[Tensor]
    ) -> _Comparison | None:
        """The comparison as a graph; None where there can be none, or no memory for it now."""
        flag = torch.zeros((), dtype=torch.bool, device=device)
        site = CaptureSite.on(device)

        def run() -> None:
            flag.copy_(self._differ_now(weights, sums))

        try:
            replay = recorded(run, None, site, self._recorder or record_cuda_graph)
            return _Comparison(places, replay, flag)
        except RuntimeError as error:
            if is_out_of_memory(error):
                return None
            if not forbids_capture(error):
                raise
            self._captures = False
            warnings.warn(
                f"the comparison of weights cannot be captured as a CUDA graph ({cause_of(error)}); "
                "calls begin more slowly",
                stacklevel=2,
            )
            return None


def _kinds(weights: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    return [(one.shape, one.dtype, one.device) for one in weights]
