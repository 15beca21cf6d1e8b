"""Losses, weights and agreement against torch's own functions in float64, and against sums written out."""

import math

import pytest
import torch
from torch.nn import functional

from pardec.training.comparison import compare, target_law
from pardec.training.loss import ROW_OBJECTIVES, acceptance_weights, learned_tokens
from pardec.training.loss import draft_loss as loss_of

M, V = 12, 17


def random_logits(seed, scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(M, V, generator=generator) * scale).to(dtype)


def draft_loss(objective, logits, law, ids, temperature=1.0):
    return loss_of(objective, compare(logits, law, learned_tokens(objective, law, ids), temperature))


def value_and_gradient(loss_of, logits):
    logits = logits.clone().requires_grad_()
    losses = loss_of(logits)
    (losses * torch.arange(1, M + 1)).sum().backward()  # rows weighted, so that a mix-up of rows shows
    return losses.detach(), logits.grad


@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_kl_is_kl_div_to_the_target(scale):
    draft, target = random_logits(0, scale), random_logits(1, scale)
    ids = torch.zeros(M, dtype=torch.long)
    losses, gradient = value_and_gradient(lambda x: draft_loss("kl", x, target_law(target), ids), draft)

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
    losses = draft_loss("kl", draft, target_law(target), torch.zeros(2, dtype=torch.long))
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
        lambda x: draft_loss("kl", x, target_law(logits), torch.zeros(M, dtype=torch.long)), logits
    )
    torch.testing.assert_close(losses, torch.zeros(M), rtol=0, atol=2e-6)
    torch.testing.assert_close(gradient, torch.zeros(M, V), rtol=0, atol=1e-5)


def test_cross_entropy_is_torchs():
    draft = random_logits(5)
    ids = torch.randint(0, V, (M,), generator=torch.Generator().manual_seed(6))
    losses, gradient = value_and_gradient(
        lambda x: draft_loss("cross_entropy", x, target_law(random_logits(7)), ids), draft
    )
    expected, expected_gradient = value_and_gradient(
        lambda x: functional.cross_entropy(x, ids, reduction="none"), draft.double()
    )
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-5)


def test_cross_entropy_does_not_look_at_the_target_model():
    draft, ids = random_logits(8), torch.arange(M)
    one, other = (draft_loss("cross_entropy", draft, target_law(random_logits(seed)), ids) for seed in (9, 10))
    assert torch.equal(one, other)


@pytest.mark.parametrize("objective", ROW_OBJECTIVES)
def test_half_precision_logits_lose_nothing_further(objective):
    """bfloat16 logits are raised to float32 first; the gradient comes back in their own dtype."""
    draft, target = random_logits(11, dtype=torch.bfloat16), random_logits(12, dtype=torch.bfloat16)
    ids = torch.arange(M)
    p = target_law(target)
    losses, gradient = value_and_gradient(lambda x: draft_loss(objective, x, p, ids), draft)
    expected = draft_loss(objective, draft.float(), target_law(target.float()), ids)
    assert losses.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(losses, expected)


def test_cross_entropy_on_the_targets_argmax_is_that_on_its_likeliest_tokens():
    draft, target = random_logits(20), random_logits(21)
    likeliest = torch.tensor([max(range(V), key=lambda v: target[row, v].item()) for row in range(M)])
    found = draft_loss("cross_entropy_argmax", draft, target_law(target), torch.zeros(M, dtype=torch.long))
    torch.testing.assert_close(found, functional.cross_entropy(draft, likeliest, reduction="none"))


def acceptance_by_loops(draft, target):
    p, q = target.double().softmax(dim=-1), draft.double().softmax(dim=-1)
    return torch.tensor([sum(min(p[row, v].item(), q[row, v].item()) for v in range(V)) for row in range(M)])


def test_lk_is_minus_the_log_of_the_probability_of_acceptance():
    draft, target = random_logits(22, 1.0), random_logits(23, 1.0)
    found = draft_loss("lk", draft, target_law(target), torch.zeros(M, dtype=torch.long))
    torch.testing.assert_close(found, -acceptance_by_loops(draft, target).log().float(), rtol=1e-5, atol=1e-6)


def test_cross_entropy_and_tv_are_mixed_one_to_nine():
    draft, law = random_logits(22, 1.0), target_law(random_logits(23, 1.0))
    ids = torch.randint(0, V, (M,), generator=torch.Generator().manual_seed(24))
    found, gradient = value_and_gradient(lambda x: draft_loss("cross_entropy_tv", x, law, ids, 0.6), draft)

    def mixed(x):
        distance = (law.probs.double() - (x / 0.6).softmax(dim=-1)).abs().sum(dim=-1) / 2
        return 0.1 * functional.cross_entropy(x / 0.6, ids, reduction="none") + 0.9 * distance

    expected, expected_gradient = value_and_gradient(mixed, draft.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tv_is_half_the_distance_of_the_laws(temperature):
    draft, law = random_logits(22, 1.0), target_law(random_logits(23, 1.0))
    ids = torch.zeros(M, dtype=torch.long)
    losses, gradient = value_and_gradient(lambda x: draft_loss("tv", x, law, ids, temperature), draft)
    expected, expected_gradient = value_and_gradient(
        lambda x: (law.probs.double() - (x / temperature).softmax(dim=-1)).abs().sum(dim=-1) / 2, draft.double()
    )
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ROW_OBJECTIVES)
def test_temperature_divides_the_drafts_logits(objective):
    draft, p, ids = random_logits(32), target_law(random_logits(33)), torch.arange(M)
    found, expected = draft_loss(objective, draft, p, ids, 0.7), draft_loss(objective, draft / 0.7, p, ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_lk_weighted_by_expected_length_has_the_gradient_of_the_expected_number_of_accepted_tokens():
    """One block of K rows: E[accepted] = sum over m of a_1 .. a_m, differentiated by torch from its definition."""
    K = 4
    draft = random_logits(24, 1.0, torch.float64)[:K].requires_grad_()
    law = target_law(random_logits(25, 1.0)[:K])
    accepted = torch.minimum(draft.softmax(dim=-1), law.probs.double()).sum(dim=-1)
    (accepted.cumprod(dim=0).sum()).backward()
    expected, draft.grad = draft.grad, None
    weights = acceptance_weights("expected_length", compare(draft, law, torch.zeros(K, dtype=torch.long)).overlap)
    (weights * draft_loss("lk", draft, law, torch.zeros(K, dtype=torch.long))).sum().backward()
    torch.testing.assert_close(-draft.grad, expected, rtol=1e-4, atol=1e-6)


def test_lk_hybrid_goes_from_kl_to_total_variation_as_acceptance_rises():
    ids = torch.zeros(M, dtype=torch.long)
    target = random_logits(26, 1.0)
    p = target_law(target)
    for noise in (0.01, 1.0, 30.0):
        draft = target + noise * random_logits(27, 1.0)
        accepted = acceptance_by_loops(draft, target).float()
        share = torch.exp(-3 * accepted)
        expected = share * draft_loss("kl", draft, p, ids) + (1 - share) * (1 - accepted)
        torch.testing.assert_close(draft_loss("lk_hybrid", draft, p, ids), expected, rtol=1e-4, atol=1e-5)
    never = torch.full((M, V), -1e4).scatter(1, p.probs.argmin(dim=1, keepdim=True), 1e4)  # q on the least likely token
    kl = draft_loss("kl", never, p, ids)
    found = draft_loss("lk_hybrid", never, p, ids)
    assert bool((found > 0.5 * kl).all())


@pytest.mark.parametrize("objective", ["kl", "tv", "lk", "lk_hybrid"])
def test_nothing_is_left_to_learn_where_draft_and_target_are_the_same_law(objective):
    logits = random_logits(28)
    losses = draft_loss(objective, logits, target_law(logits), torch.zeros(M, dtype=torch.long))
    torch.testing.assert_close(losses, torch.zeros(M), rtol=0, atol=3e-6)


@pytest.mark.parametrize("objective", ROW_OBJECTIVES)
def test_losses_and_gradients_stay_finite_where_laws_do_not_overlap(objective):
    """The target's law has zeros (top-k), and the draft is certain of something else."""
    p = target_law(random_logits(29), top_k=2)
    draft = torch.full((M, V), -50.0).scatter(1, p.probs.argmin(dim=1, keepdim=True), 50.0)
    ids = torch.arange(M)
    losses, gradient = value_and_gradient(lambda x: draft_loss(objective, x, p, ids), draft)
    assert bool(torch.isfinite(losses).all())
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.8, 10), (2.0, 1), (0.5, 100)])
def test_target_law_is_that_of_transformers_warpers(temperature, top_k):
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper

    logits = random_logits(30)
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    torch.testing.assert_close(target_law(logits, temperature, top_k).probs, scores.softmax(dim=-1))


def test_weights_are_the_products_written_out():
    accepted = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(31))
    accepted[0, 1, 3:] = 0  # a shorter block
    prefix, expected = (acceptance_weights(rule, accepted) for rule in ("prefix_product", "expected_length"))
    for b in range(3):
        for n in range(2):
            a = accepted[b, n].tolist()
            for i in range(5):
                assert prefix[b, n, i].item() == pytest.approx(math.prod(a[:i]), rel=1e-5, abs=1e-7)
                total = sum(math.prod(a[: m + 1]) for m in range(i, 5))
                assert expected[b, n, i].item() == pytest.approx(total, rel=1e-5, abs=1e-7)


def test_weights_carry_no_gradient():
    accepted = torch.rand(2, 3, requires_grad=True)
    assert not acceptance_weights("prefix_product", accepted).requires_grad


def test_unknown_weight_rule_names_the_known_ones():
    with pytest.raises(ValueError, match="one of expected_length, prefix_product, found 'harmonic'"):
        acceptance_weights("harmonic", torch.ones(1, 2))


@pytest.mark.parametrize("objective", ["mse", "accepted_length"])
def test_an_objective_that_no_row_has_names_the_known_ones(objective):
    known = "kl, cross_entropy, cross_entropy_argmax, tv, cross_entropy_tv, lk, lk_hybrid"
    with pytest.raises(ValueError, match=f"objective: expected one of {known}, found '{objective}'"):
        draft_loss(objective, random_logits(0), target_law(random_logits(1)), torch.zeros(M, dtype=torch.long))


def test_agreement_is_argmax_equality_and_the_sum_of_the_smaller_probability():
    draft, target = random_logits(13, scale=1.0), random_logits(14, scale=1.0)
    draft[::3] = target[::3] * 2  # the same argmax, another law
    law = target_law(target)
    found = compare(draft, law, torch.zeros(M, dtype=torch.long))
    agrees, overlap = (found.likeliest == law.likeliest).float(), found.overlap
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
