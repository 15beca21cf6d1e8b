"""Which batches of a measurement a process decodes, and how those of all processes come together.

Knows nothing of what is measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Found = TypeVar("Found")


@dataclass(frozen=True)
class Share:
    """Every `of`-th batch, beginning with that of `index`.

    Attributes:
        index: of the process.
        of: processes that share the batches.
        gather: gives the entries of all processes' lists to each of them, called by all as often; in any order.
    """

    index: int
    of: int
    gather: Callable[[list[Any]], list[Any]]

    def mine(self, starts: Sequence[int]) -> Sequence[int]:
        """Those of these batches that this process decodes; each by the index of its first prompt."""
        return starts[self.index :: self.of]

    def of_all(self, mine: list[tuple[int, Found]]) -> list[Found]:
        """What all processes have found, in the order of the batches, from what this one has, each with its start."""
        return [found for _, found in sorted(self.gather(mine), key=lambda one: one[0])]


ALL_OF_IT = Share(0, 1, list)
