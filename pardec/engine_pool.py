"""Engines that wait to be used again, with their captured graphs, compiled steps and caches.

Each is lent to one caller at a time, so streams that are read in turn do not disturb each other.
"""

import threading
from collections import OrderedDict
from collections.abc import Hashable

from pardec.engine import Engine

# each holds a cache; the one that was used least recently goes first
_MAX_ENGINES = 8


class EnginePool:
    """Idle engines by what they were made for."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # the garbage collector may close a stream in here
        self._idle: OrderedDict[Hashable, Engine] = OrderedDict()

    def take(self, key: Hashable) -> Engine | None:
        """The idle engine of `key`, which is the caller's until it is given back; None if there is none."""
        with self._lock:
            return self._idle.pop(key, None)

    def give_back(self, key: Hashable, engine: Engine) -> None:
        """Keeps `engine` for the next caller."""
        with self._lock:
            self._idle[key] = engine
            self._idle.move_to_end(key)
            while len(self._idle) > _MAX_ENGINES:
                self._idle.popitem(last=False)

    def clear(self) -> None:
        """Forgets all idle engines, and frees what they hold."""
        with self._lock:
            self._idle.clear()
