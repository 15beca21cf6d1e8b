"""Overlap of two laws and likelihood of a token, a few rows at a time, against torch's own functions in float64."""

import pytest
import torch

from pardec.training import kl
from pardec.training.overlap import overlap_and_likelihood

M, V = 7, 33


def case(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(M, V, generator=generator)).to(dtype).requires_grad_()
    p = (2 * torch.randn(M, V, generator=generator)).softmax(-1)
    slopes = torch.rand(2, M, generator=generator)
    return logits, p, torch.randint(V, (M,), generator=generator), slopes


@pytest.mark.parametrize("rows_at_once", [1, 3, M, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_definition_whatever_runs_at_once(
    monkeypatch, dtype, temperature, rows_at_once
):
    monkeypatch.setattr(kl, "_ENTRIES_ON_CPU", rows_at_once * V)
    logits, p, ids, slopes = case(dtype)
    found = overlap_and_likelihood(logits, p, ids, temperature)
    (torch.stack(found) * slopes).sum().backward()

    exact = logits.detach().double().requires_grad_()
    log_q = (exact / temperature).log_softmax(-1)
    expected = torch.minimum(log_q.exp(), p.double()).sum(-1), log_q.gather(1, ids[:, None])[:, 0]
    (torch.stack(expected) * slopes).sum().backward()
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    assert logits.grad is not None
    assert exact.grad is not None
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("which", [0, 1])
def test_each_number_alone_has_its_gradient_and_logits_stay_as_they_are(which):
    logits, p, ids, _ = case(torch.float32)
    before = logits.detach().clone()
    overlap_and_likelihood(logits, p, ids, 0.5)[which].sum().backward()
    exact = before.double().requires_grad_()
    log_q = (exact / 0.5).log_softmax(-1)
    (torch.minimum(log_q.exp(), p.double()).sum(), log_q.gather(1, ids[:, None]).sum())[which].backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits.detach(), before)


def test_nothing_of_the_size_of_the_logits_is_kept_but_the_logits_and_the_law():
    logits, p, ids, _ = case(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        overlap_and_likelihood(logits, p, ids)
    large = {x.data_ptr() for x in kept if x.numel() > M}
    assert large == {logits.data_ptr(), p.data_ptr()}
