"""What a checksum of weights sees."""

import pytest
import torch
import xxhash
from torch import Tensor

from pardec.target import checksums as module
from pardec.target.checksums import checksums, launched_checksum

# many blocks of rows, words of one, two and four numbers, rows that no whole word divides, one row, a bias
SHAPES = [(4916, 576), (1001, 577), (3, 70001), (10000, 8), (576,)]


@pytest.fixture(params=SHAPES, ids=str)
def shape(request) -> tuple[int, ...]:
    return request.param


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16], ids=str)
def weight(request, shape) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(request.param)


@pytest.fixture(params=["hashed", "launched"])
def sees(request, monkeypatch):
    """Whether a change is seen, by what a CPU has and by what a GPU launches; of several pieces and blocks."""
    monkeypatch.setattr(module, "_PIECE_BYTES", 2**16)
    monkeypatch.setattr(module, "_BLOCK_WORDS", 2**16)

    def checksum(weight: Tensor) -> Tensor:
        return checksums([weight])[0] if request.param == "hashed" else launched_checksum(weight)

    return lambda weight, changed: not torch.equal(checksum(weight), checksum(changed))


def test_equal_weights_have_equal_checksums(weight, sees):
    assert not sees(weight, weight.clone())


def test_one_changed_number_is_seen_wherever_it_is(weight, sees):
    generator = torch.Generator().manual_seed(1)
    for place in torch.randint(weight.numel(), (40,), generator=generator).tolist():
        changed = weight.clone()
        changed.view(-1)[place] += 0.25
        assert sees(weight, changed), place


def test_changed_signs_are_seen_though_they_are_one_bit_each(weight, sees):
    assert sees(weight, -weight)
    assert sees(weight, weight.abs())
    if weight.dim() == 2:
        for column in range(4):
            changed = weight.clone()
            changed[:, column].neg_()
            assert sees(weight, changed), column


def test_numbers_in_other_places_are_seen(weight, sees):
    assert sees(weight, weight.roll(1, dims=0))
    assert sees(weight, weight.flip(-1))
    if weight.dim() == 2:
        changed = weight.clone()
        changed[[0, 1]] = weight[[1, 0]]
        assert sees(weight, changed)


def test_all_bits_turned_over_are_seen(sees):
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
def test_columns_that_changed_places_are_seen_however_far_apart(distance, sees):
    weight = torch.randn(5, 20000, dtype=torch.float64)
    changed = weight.clone()
    changed[:, [0, distance]] = weight[:, [distance, 0]]
    assert sees(weight, changed)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_hashes_do_not_depend_on_the_number_of_threads_nor_on_where_numbers_lie(num_threads, monkeypatch):
    monkeypatch.setattr(module, "_PIECE_BYTES", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    some = [torch.arange(300.0), torch.empty(0, 4), torch.ones(7, 5, dtype=torch.bfloat16), torch.arange(3.0)]
    expected = [
        xxhash.xxh3_128_digest(one.view(-1).view(torch.uint8).numpy().data[at : at + 100])
        for one in some
        for at in range(0, max(1, one.nbytes), 100)
    ]
    for tensors in (some, [one.T.contiguous().T if one.dim() == 2 else one for one in some]):
        found = checksums(tensors)
        assert [one.shape[0] for one in found] == [24, 2, 2, 2]
        assert b"".join(one.numpy().tobytes() for one in found) == b"".join(expected)


def test_an_interpreter_that_ends_hashes_by_itself(monkeypatch):
    def refuses(self, *arguments):
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(module, "_PIECE_BYTES", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    expected = checksums([torch.arange(300.0)])
    monkeypatch.setattr(module.ThreadPoolExecutor, "map", refuses)
    assert torch.equal(checksums([torch.arange(300.0)])[0], expected[0])
