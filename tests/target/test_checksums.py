"""What a checksum of weights sees."""

import pytest
import torch
from torch import Tensor

from pardec.target.checksums import checksum

# many blocks of rows, words of one, two and four numbers, rows that no whole word divides, one row, a bias
SHAPES = [(4916, 576), (1001, 577), (3, 70001), (10000, 8), (576,)]


@pytest.fixture(params=SHAPES, ids=str)
def shape(request) -> tuple[int, ...]:
    return request.param


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16], ids=str)
def weight(request, shape) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(request.param)


def sees(weight: Tensor, changed: Tensor) -> bool:
    return not torch.equal(checksum(weight), checksum(changed))


def test_equal_weights_have_equal_checksums(weight):
    assert not sees(weight, weight.clone())


def test_one_changed_number_is_seen_wherever_it_is(weight):
    generator = torch.Generator().manual_seed(1)
    for place in torch.randint(weight.numel(), (40,), generator=generator).tolist():
        changed = weight.clone()
        changed.view(-1)[place] += 0.25
        assert sees(weight, changed), place


def test_changed_signs_are_seen_though_they_are_one_bit_each(weight):
    assert sees(weight, -weight)
    assert sees(weight, weight.abs())
    if weight.dim() == 2:
        for column in range(4):
            changed = weight.clone()
            changed[:, column].neg_()
            assert sees(weight, changed), column


def test_numbers_in_other_places_are_seen(weight):
    assert sees(weight, weight.roll(1, dims=0))
    assert sees(weight, weight.flip(-1))
    if weight.dim() == 2:
        changed = weight.clone()
        changed[[0, 1]] = weight[[1, 0]]
        assert sees(weight, changed)


def test_all_bits_turned_over_are_seen():
    for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float64, torch.int64)):
        weight = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
        for one in (weight, torch.zeros_like(weight)):
            changed = one.clone()
            changed.view(bits).bitwise_not_()
            assert sees(one, changed)
            changed = one.clone()
            changed.view(bits)[7, 8:16].bitwise_not_()
            assert sees(one, changed)


@pytest.mark.parametrize("distance", [1, 2, 4096, 8191, 8192, 16382, 16384])
def test_columns_that_changed_places_are_seen_however_far_apart(distance):
    weight = torch.randn(5, 20000, dtype=torch.float64)
    changed = weight.clone()
    changed[:, [0, distance]] = weight[:, [distance, 0]]
    assert sees(weight, changed)
