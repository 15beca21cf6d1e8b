"""One pass over the vocabulary against torch's own functions on all of it in float64."""

import pytest
import torch
from torch.nn import functional

from pardec.training import comparison
from pardec.training.comparison import compare, target_law

M, V = 7, 33


def case(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(M, V, generator=generator)).to(dtype).requires_grad_()
    target = 2 * torch.randn(M, V, generator=generator)
    slopes = torch.rand(3, M, generator=generator)
    return logits, target, torch.randint(V, (M,), generator=generator), slopes


def by_definition(logits, p, ids, temperature):
    """KL, overlap and log-likelihood of float64 logits."""
    log_q = (logits / temperature).log_softmax(-1)
    kl = functional.kl_div(log_q, p, reduction="none").sum(-1)
    return torch.stack([kl, torch.minimum(log_q.exp(), p).sum(-1), log_q.gather(1, ids[:, None])[:, 0]])


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_definitions(dtype, temperature, which):
    logits, target, ids, slopes = case(dtype)
    before = logits.detach().clone()
    law = target_law(target)
    found = compare(logits, law, ids, temperature)
    values = torch.stack([found.kl, found.overlap, found.log_likelihood])
    sum((values[i] * slopes[i]).sum() for i in which).backward()

    exact = before.double().requires_grad_()
    expected = by_definition(exact, law.probs.double(), ids, temperature)
    sum((expected[i] * slopes[i]).sum() for i in which).backward()
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits.detach(), before)
    assert torch.equal(found.likeliest, before.argmax(-1))
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.6, None), (1.0, 3), (1.3, 1)])
def test_the_targets_law_has_its_entropy_and_its_likeliest_token(temperature, top_k):
    _, target, _, _ = case(torch.float32)
    law = target_law(target, temperature, top_k)
    expected = torch.distributions.Categorical(probs=law.probs.double()).entropy()
    torch.testing.assert_close(law.entropy.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(law.likeliest, target.argmax(-1))
    rows = torch.tensor([3, 0, 3])
    assert torch.equal(law.at(rows).probs, law.probs[rows])
    assert torch.equal(law.at(rows).entropy, law.entropy[rows])


@pytest.mark.parametrize("entries", [1, 2 * V, 10 * V])
def test_rows_a_few_at_a_time_are_all_rows_at_once(entries, monkeypatch):
    """Whatever a sweep takes, and whether the target's rows are named or are those of the draft."""
    found = []
    for at_once in (10**6, entries):
        monkeypatch.setattr(comparison, "_ENTRIES_ON_CPU", at_once)
        logits, target, ids, slopes = case(torch.float32)
        law = target_law(target[:4], top_k=5).at(torch.tensor([3, 0, 1, 1, 2, 3, 3]))
        one = compare(logits, law, ids)
        values = torch.stack([one.kl, one.overlap, one.log_likelihood])
        (values * slopes).sum().backward()
        found.append([values.detach(), logits.grad, law.probs, law.entropy, one.likeliest, law.prob_of(ids)])
    for mine, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(found[0][5], found[0][2].gather(1, ids[:, None])[:, 0])


def test_likeliest_tokens_are_found_only_where_they_are_asked_for():
    logits, target, ids, _ = case(torch.float32)
    law = target_law(target, with_likeliest=False)
    found = compare(logits, law, ids, with_likeliest=False)
    assert law.likeliest is law.at(ids[:2] % 3).likeliest is found.likeliest is None
    torch.testing.assert_close(found.kl, compare(logits, target_law(target), ids).kl)


def test_of_the_size_of_the_logits_only_the_two_laws_are_kept():
    logits, target, ids, _ = case(torch.float32)
    kept, law = [], target_law(target)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        compare(logits, law, ids)
    large = {x.data_ptr() for x in kept if x.numel() > M}
    assert len(large) == 2
    assert law.probs.data_ptr() in large
