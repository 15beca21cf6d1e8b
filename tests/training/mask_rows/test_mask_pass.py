"""Which layers of the pass over mask rows run twice."""

import pytest
from torch import nn

from pardec.training.mask_rows.mask_pass import spread

LAYERS = [nn.Identity() for _ in range(8)]


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.0, []), (0.25, [3, 7]), (0.3, [3, 6]), (0.5, [1, 3, 5, 7]), (0.75, [1, 2, 3, 5, 6, 7]), (1.0, list(range(8)))],
)
def test_a_share_of_the_layers_is_spread_over_them(share, expected):
    assert [LAYERS.index(layer) for layer in spread(LAYERS, share)] == expected
