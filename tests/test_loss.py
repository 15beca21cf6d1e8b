"""Losses and agreement against torch's own functions in float64, and against sums written out."""

import math

import pytest
import torch
from torch.nn import functional

from pardec.loss import agreement, draft_loss

M, V = 12, 17


def random_logits(seed, scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(M, V, generator=generator) * scale).to(dtype)


def value_and_gradient(loss_of, logits):
    logits = logits.clone().requires_grad_()
    losses = loss_of(logits)
    (losses * torch.arange(1, M + 1)).sum().backward()  # rows weighted, so that a mix-up of rows shows
    return losses.detach(), logits.grad


@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_kl_is_kl_div_to_the_target(scale):
    draft, target = random_logits(0, scale), random_logits(1, scale)
    ids = torch.zeros(M, dtype=torch.long)
    losses, gradient = value_and_gradient(lambda x: draft_loss("kl", x, target, ids), draft)

    def kl_div(x):
        log_p = target.double().log_softmax(dim=-1)
        return functional.kl_div(x.log_softmax(dim=-1), log_p, reduction="none", log_target=True).sum(dim=-1)

    expected, expected_gradient = value_and_gradient(kl_div, draft.double())
    assert losses.shape == (M,)
    torch.testing.assert_close(
        losses.double(), expected, rtol=1e-5, atol=1e-6 * max(scale, 1)
    )  # rounds with the logits
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-5)


def test_kl_is_sum_of_p_times_log_ratio():
    draft, target = random_logits(2)[:2, :4], random_logits(3)[:2, :4]
    losses = draft_loss("kl", draft, target, torch.zeros(2, dtype=torch.long))
    for row in range(2):
        p = [math.exp(x) for x in target[row].tolist()]
        q = [math.exp(x) for x in draft[row].tolist()]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        assert losses[row].item() == pytest.approx(
            sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), rel=1e-5
        )


def test_kl_and_its_gradient_vanish_where_draft_and_target_agree():
    logits = random_logits(4)
    losses, gradient = value_and_gradient(
        lambda x: draft_loss("kl", x, logits, torch.zeros(M, dtype=torch.long)), logits
    )
    torch.testing.assert_close(losses, torch.zeros(M), rtol=0, atol=2e-6)
    torch.testing.assert_close(gradient, torch.zeros(M, V), rtol=0, atol=1e-5)


def test_cross_entropy_is_torchs():
    draft = random_logits(5)
    ids = torch.randint(0, V, (M,), generator=torch.Generator().manual_seed(6))
    losses, gradient = value_and_gradient(lambda x: draft_loss("cross_entropy", x, random_logits(7), ids), draft)
    expected, expected_gradient = value_and_gradient(
        lambda x: functional.cross_entropy(x, ids, reduction="none"), draft.double()
    )
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-5)


def test_cross_entropy_does_not_look_at_the_target_model():
    draft, ids = random_logits(8), torch.arange(M)
    one, other = (draft_loss("cross_entropy", draft, random_logits(seed), ids) for seed in (9, 10))
    assert torch.equal(one, other)


@pytest.mark.parametrize("objective", ["kl", "cross_entropy"])
def test_half_precision_logits_lose_nothing_further(objective):
    """bfloat16 logits are raised to float32 first; the gradient comes back in their own dtype."""
    draft, target = random_logits(11, dtype=torch.bfloat16), random_logits(12, dtype=torch.bfloat16)
    ids = torch.arange(M)
    losses, gradient = value_and_gradient(lambda x: draft_loss(objective, x, target, ids), draft)
    expected = draft_loss(objective, draft.float(), target.float(), ids)
    assert losses.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(losses, expected)


def test_unknown_objective_names_the_known_ones():
    with pytest.raises(ValueError, match=r"objective: expected kl or cross_entropy, found 'mse'"):
        draft_loss("mse", random_logits(0), random_logits(1), torch.zeros(M, dtype=torch.long))


def test_agreement_is_argmax_equality_and_the_sum_of_the_smaller_probability():
    draft, target = random_logits(13, scale=1.0), random_logits(14, scale=1.0)
    draft[::3] = target[::3] * 2  # the same argmax, another law
    agrees, overlap = agreement(draft, target)
    p, q = target.double().softmax(dim=-1), draft.double().softmax(dim=-1)
    for row in range(M):
        best_p = max(range(V), key=lambda v: p[row, v].item())
        best_q = max(range(V), key=lambda v: q[row, v].item())
        assert agrees[row].item() == float(best_p == best_q)
        expected = sum(min(p[row, v].item(), q[row, v].item()) for v in range(V))
        assert overlap[row].item() == pytest.approx(expected, rel=1e-5)
    assert 0 < agrees.sum() < M
    # arXiv:2211.17192, Theorem 3.5: acceptance = 1 - total variation distance
    torch.testing.assert_close(overlap.double(), 1 - (p - q).abs().sum(dim=-1) / 2, rtol=1e-5, atol=1e-6)


def test_agreement_carries_no_gradient():
    draft = random_logits(15).requires_grad_()
    assert not any(values.requires_grad for values in agreement(draft, random_logits(16)))
