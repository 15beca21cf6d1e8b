"""Few rows of test parameters in which every two values of any two parameters stand together.

What fails because of three values at once, and with no two of them, is rare (Kuhn, Wallace and Gallo, 2004,
doi:10.1109/TSE.2004.24), and trying all of it would take a multiple of the time.
"""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def every_pair(*parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows with one value of each of two or more parameters, in the order of the first: the same ones in every run.

    Of all combinations always that one is taken next which has most pairs that no row has yet.
    """
    left = {
        ((i, a), (j, b))
        for (i, one), (j, other) in combinations(enumerate(parameters), 2)
        for a, b in product(range(len(one)), range(len(other)))
    }
    rows = []
    while left:
        every = product(*(range(len(values)) for values in parameters))
        best = max(every, key=lambda row: len(left & _pairs(row)))
        left -= _pairs(best)
        rows.append(best)
    return [tuple(values[n] for values, n in zip(parameters, row, strict=True)) for row in sorted(rows)]


def _pairs(row: Sequence[int]) -> set[tuple[tuple[int, int], tuple[int, int]]]:
    return set(combinations(enumerate(row), 2))
