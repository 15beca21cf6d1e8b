"""KL and acceptance, a few rows at a time, against torch's own functions on all rows in float64."""

import pytest
import torch
from torch.nn import functional

from pardec.training import kl
from pardec.training.kl import entropies, kl_and_acceptance

M, V = 7, 33


def case(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(M, V, generator=generator)).to(dtype).requires_grad_()
    p = (2 * torch.randn(M, V, generator=generator)).softmax(-1)
    return logits, p, torch.rand(M, generator=generator)


@pytest.mark.parametrize("rows_at_once", [1, 3, M, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradient_are_those_of_kl_div_whatever_runs_at_once(monkeypatch, dtype, temperature, rows_at_once):
    monkeypatch.setattr(kl, "_ENTRIES_ON_CPU", rows_at_once * V)
    logits, p, slopes = case(dtype)
    losses, accepted = kl_and_acceptance(logits, p, entropies(p), temperature)
    (losses * slopes).sum().backward()

    exact = logits.detach().double().requires_grad_()
    log_q = (exact / temperature).log_softmax(-1)
    expected = functional.kl_div(log_q, p.double(), reduction="none").sum(-1)
    (expected * slopes).sum().backward()
    assert losses.dtype == accepted.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(accepted.double(), torch.minimum(log_q.exp(), p.double()).sum(-1), rtol=1e-5, atol=1e-6)
    assert logits.grad is not None
    assert exact.grad is not None
    assert logits.grad.dtype == dtype
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=rounding, atol=1e-6)


def test_acceptance_has_no_gradient_and_logits_stay_as_they_are():
    logits, p, _ = case(torch.float32)
    before = logits.detach().clone()
    losses, accepted = kl_and_acceptance(logits, p, entropies(p), 0.5)
    assert losses.requires_grad
    assert not accepted.requires_grad
    losses.sum().backward()
    assert torch.equal(logits.detach(), before)


def test_entropies_are_those_of_the_distribution_in_any_shape(monkeypatch):
    monkeypatch.setattr(kl, "_ENTRIES_ON_CPU", 2 * V)
    p = torch.randn(2, M, V, generator=torch.Generator().manual_seed(1)).softmax(-1)
    expected = torch.distributions.Categorical(probs=p.double()).entropy()
    torch.testing.assert_close(entropies(p).double(), expected, rtol=1e-5, atol=1e-6)
    one_hot = functional.one_hot(torch.tensor([3]), V).float()
    assert entropies(one_hot).tolist() == [0.0]
