"""Engines that wait to be used again, with their captured graphs, compiled steps and caches.

Each is lent to one caller at a time, so streams that are read in turn do not disturb each other.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pardec.decoding.engine import Engine

# each holds a cache; the one that was used least recently goes first
_MAX_IDLE = 8
_OF_ALL_MODULES = frozenset(vars(nn.Module()))  # among them parameters, buffers, modules and hooks
_PLAIN = frozenset({bool, int, float, str, type(None)})


class EnginePool:
    """Idle engines by what they were made for."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # the garbage collector may close a stream in here
        self._idle: OrderedDict[Hashable, Engine] = OrderedDict()
        self._rooms: list[int] = []

    @contextmanager
    def room_for(self, num_engines: int) -> Iterator[None]:
        """Inside of it so many are kept, if that is more than otherwise.

        For ways that take turns under a clock: of more than are kept each would be captured or compiled again in every
        call, and timed with that.
        """
        with self._lock:
            self._rooms.append(num_engines)
        try:
            yield
        finally:
            with self._lock:
                self._rooms.remove(num_engines)
                self._forget_oldest()

    def take(self, key: Hashable) -> Engine | None:
        """The idle engine of `key`, which is the caller's until it is given back; None if there is none."""
        with self._lock:
            return self._idle.pop(key, None)

    def give_back(self, key: Hashable, engine: Engine) -> None:
        """Keeps `engine` for the next caller."""
        with self._lock:
            self._idle[key] = engine
            self._idle.move_to_end(key)
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        while len(self._idle) > max(_MAX_IDLE, *self._rooms, 0):
            self._idle.popitem(last=False)

    def clear(self) -> None:
        """Forgets all idle engines, and frees what they hold."""
        with self._lock:
            self._idle.clear()


class Same:
    """Equal to another of the very same objects, as long as they live; keeps none of them alive.

    An id or an address says less: it may be that of what came after.
    """

    def __init__(self, objects: Iterable[object]):
        """Takes them in their order."""
        self._objects = tuple(map(_weakly, objects))

    def __eq__(self, other: object) -> bool:
        """Whether the other's are these."""
        if not isinstance(other, Same) or len(self._objects) != len(other._objects):
            return False
        return all(a() is not None and a() is b() for a, b in zip(self._objects, other._objects, strict=True))

    def __hash__(self) -> int:
        """Of their number."""
        return len(self._objects)


def _weakly(value: object) -> Callable[[], object]:
    try:
        return weakref.ref(value)
    except TypeError:  # of few kinds, all small
        return lambda: value


def signature(base: PreTrainedModel) -> Hashable:
    """Changes when weights are replaced, or modules, their hooks, their forward, their mode or other settings.

    Settings are plain values that modules keep, such as which of PEFT's adapters are active and with what factor.
    """
    found: list[Hashable] = []  # one list of a pass over a few hundred modules, as each call waits for it
    objects: list[object] = []
    for m in base.modules():
        own = vars(m)
        found += (*m._forward_hooks, *m._forward_pre_hooks, m.training)
        objects += (m, own.get("forward", m), type(m).forward)  # the latter, too, is replaced by what patches models
        for name, value in own.items():
            if name not in _OF_ALL_MODULES:
                found += (name, value if type(value) in _PLAIN else _setting(value))
        for tensor in (*m._parameters.values(), *m._buffers.values()):
            found.append(None if tensor is None else _place(tensor))
            if tensor is not None:
                objects.append(tensor)
    return hash(tuple(found)), Same(objects)


def _place(tensor: Tensor) -> Hashable:
    """Where a tensor's numbers lie and how they are read; None where it is no block of numbers."""
    if tensor.layout != torch.strided:
        return None
    return tensor.data_ptr(), tensor.stride(), tensor.is_neg()


def _setting(value: object) -> Hashable:
    """A value that can be compared later; None of what is not plain."""
    if isinstance(value, dict):
        return tuple((key, _setting(one)) for key, one in value.items())
    if isinstance(value, list | tuple | set):
        return tuple(map(_setting, value))
    return value if isinstance(value, bool | int | float | str) else None


def arithmetic(device: torch.device) -> Hashable:
    """What the caller may have switched on around a call, and graphs and compiled code would not notice."""
    kind = device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    # not `allow_tf32`, which refuses to be read once this has been set
    precision = torch.backends.cuda.matmul.fp32_precision if kind == "cuda" else None
    return torch.is_inference_mode_enabled(), autocast, precision
