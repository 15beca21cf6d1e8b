"""The law in the middle of several against a search through all corners of the piecewise linear problem."""

import itertools

import pytest
import torch

from pardec.measures.barycentre import barycentre, mean_overlap


def random_laws(seed: int, N: int, V: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    laws = (torch.randn(N, V, generator=generator, dtype=torch.float64) * 2).softmax(dim=-1)
    laws[laws < 0.05] = 0  # as top-k leaves them
    weights = torch.rand(N, generator=generator, dtype=torch.float64)
    return laws / laws.sum(dim=-1, keepdim=True), weights / weights.sum()


def best_corner(laws: torch.Tensor, weights: torch.Tensor) -> float:
    """The optimum is where all but one number of q are 0 or that of some law, and the last one is what is left."""
    (N, V), best = laws.shape, 0.0
    for free in range(V):
        others = [v for v in range(V) if v != free]
        for choice in itertools.product(*([0.0, *laws[:, v].tolist()] for v in others)):
            rest = 1 - sum(choice)
            if rest < -1e-12:
                continue
            q = dict(zip(others, choice, strict=True)) | {free: rest}
            value = sum(float(weights[n]) * sum(min(float(laws[n, v]), q[v]) for v in range(V)) for n in range(N))
            best = max(best, value)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_no_law_has_more_in_common(seed):
    laws, weights = random_laws(seed, N=4, V=4)
    overlap, q = barycentre(laws, weights)
    assert overlap == pytest.approx(best_corner(laws, weights), abs=1e-12)
    assert float(q.sum()) == pytest.approx(1)
    assert bool((q >= 0).all())
    assert mean_overlap(laws, weights, q) == pytest.approx(overlap, abs=1e-12)


def test_the_law_between_equal_ones_is_that_law():
    laws, _ = random_laws(3, N=1, V=6)
    overlap, q = barycentre(laws.expand(5, -1), torch.full((5,), 0.2))
    assert overlap == pytest.approx(1)
    torch.testing.assert_close(q, laws[0])


def test_laws_that_exclude_each_other_share_by_weight():
    overlap, q = barycentre(torch.eye(3), torch.tensor([0.2, 0.5, 0.3]))
    assert overlap == pytest.approx(0.5)
    assert q.tolist() == pytest.approx([0, 1, 0])
