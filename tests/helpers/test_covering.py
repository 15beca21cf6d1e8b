"""Rows of test parameters that stand for all combinations of them."""

from itertools import combinations, product

import pytest
from covering import every_pair


@pytest.mark.parametrize("sizes", [(2, 3), (12, 2, 4, 2), (3, 3, 2, 2, 2)], ids=str)
def test_every_two_values_of_any_two_parameters_stand_together_in_a_row(sizes):
    parameters = [[f"{name}{value}" for value in range(size)] for name, size in zip("abcde", sizes, strict=False)]
    rows = every_pair(*parameters)
    for (i, one), (j, other) in combinations(enumerate(parameters), 2):
        assert {(row[i], row[j]) for row in rows} == set(product(one, other))
    largest = sorted(sizes)[-2:]
    assert largest[0] * largest[1] <= len(rows) <= 2 * largest[0] * largest[1]  # fewer there cannot be
    assert len(rows) == len(set(rows))
