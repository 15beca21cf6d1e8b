"""Verification against a Python loop, exact sums over toy vocabularies, chi-square tests of what is drawn."""

import itertools

import pytest
import torch
from sampling_oracle import verdict_law

from pardec.decoding.verify import VERIFICATIONS, sample_from, verify_greedy, verify_sample

# 0.999 quantiles of chi-square by degrees of freedom; seeds are fixed, so a pass stays a pass
CHI_SQUARE_999 = {3: 16.27, 5: 20.52, 26: 54.05}


def random_laws(generator, *shape, zero_share=0.0):
    """Random laws over the last dimension, float32; some entries exactly 0, never all of a row."""
    weights = torch.rand(shape, generator=generator) ** 2 + 0.02
    weights[torch.rand(shape, generator=generator) < zero_share] = 0
    weights[..., 0] += (weights.sum(dim=-1) == 0).float()
    return weights / weights.sum(dim=-1, keepdim=True)


def chi_square(counts, law):
    """The statistic; where the law is 0 nothing may have been counted."""
    counts, expected = counts.double(), law.double() * counts.sum()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    return float(((counts - expected)[possible] ** 2 / expected[possible]).sum()), int(possible.sum()) - 1


# ---------------------------------------------------------------------- greedy


@pytest.mark.parametrize("K", range(5))
def test_greedy_accepts_the_targets_own_tokens_up_to_the_first_other(K):
    generator = torch.Generator().manual_seed(K)
    B = 200
    target = torch.randint(0, 2, (B, K + 1), generator=generator)
    drafts = torch.randint(0, 2, (B, K), generator=generator)
    length = torch.randint(0, K + 1, (B,), generator=generator)
    verdict = verify_greedy(target, drafts, length)
    seen = set()
    for b in range(B):
        emitted = []
        for k in range(K + 1):
            emitted.append(target[b, k].item())
            if k >= length[b] or drafts[b, k] != target[b, k]:
                break
        accepted = len(emitted) - 1
        assert verdict.num_accepted[b] == accepted
        assert verdict.tokens[b, : accepted + 1].tolist() == emitted
        assert drafts[b, :accepted].tolist() == emitted[:-1]
        seen.add(accepted)
    assert seen == set(range(K + 1))


def test_greedy_refuses_shapes_that_disagree():
    with pytest.raises(ValueError, match=r"target_tokens: expected leading shape \(2, 4\).*\(2, 3\).*found \(2, 3\)"):
        verify_greedy(torch.zeros(2, 3).long(), torch.zeros(2, 3).long(), torch.full((2,), 3))
    with pytest.raises(ValueError, match=r"target_tokens: expected leading shape \(2, 4\)"):
        verify_greedy(torch.zeros(1, 4).long(), torch.zeros(2, 3).long(), torch.full((2,), 3))


# ---------------------------------------------------------------------- the law, summed exactly


@pytest.mark.parametrize("zero_share", [0.0, 0.4])
@pytest.mark.parametrize("draft_length", range(4))
def test_accepted_and_residual_tokens_sum_to_the_targets_law(draft_length, zero_share):
    """q * min(1, p / q) + P(reject) * residual == p at each position, whatever token stands there."""
    K, V = 3, 6
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        p, q = (random_laws(generator, n, V, zero_share=zero_share) for n in (K + 1, K))
        every_token = torch.arange(V)[:, None].expand(V, K)  # row x drafts token x at each position
        law = verdict_law(p.expand(V, -1, -1), q.expand(V, -1, -1), every_token, torch.full((V,), draft_length))
        accept, bonus, p, q = law.accept.double(), law.bonus[0].double(), p.double(), q.double()
        for k in range(K):
            emitted = torch.zeros(V, dtype=torch.float64)
            if k < draft_length:
                for x in range(V):
                    if q[k, x] > 0:
                        assert accept[x, k].item() == pytest.approx(min(1.0, (p[k, x] / q[k, x]).item()), rel=1e-6)
                    emitted[x] += q[k, x] * accept[x, k]
                    emitted += q[k, x] * (1 - accept[x, k]) * bonus[k]
            else:
                assert not accept[:, k].any()
                emitted += bonus[k]
            torch.testing.assert_close(emitted, p[k], rtol=0, atol=2e-7)
        # behind the last draft nothing was rejected: p itself, bit for bit
        assert torch.equal(law.bonus[0, draft_length].double(), p[draft_length])


def enumerate_chain(K, V, seed, length_of, draft_law=None, verification="token"):
    """Law of K + 1 tokens that begin with what verification emits and go on by p, and the law p gives them.

    p depends on the whole prefix through a random table. Every draft is enumerated; `length_of(draft)` is its
    draft_length, `draft_law(p, prefix, k)` the q of its k-th token.
    """
    generator = torch.Generator().manual_seed(seed)
    prefixes = [prefix for n in range(K + 1) for prefix in itertools.product(range(V), repeat=n)]
    p = {prefix: random_laws(generator, V, zero_share=0.2) for prefix in prefixes}
    own_q = [random_laws(generator, V, zero_share=0.2) for _ in range(K)]
    q_of = draft_law or (lambda p, prefix, k: own_q[k])

    drafts = list(itertools.product(range(V), repeat=K))
    q = torch.stack([torch.stack([q_of(p, draft[:k], k) for k in range(K)]) for draft in drafts])
    law = verdict_law(
        torch.stack([torch.stack([p[draft[:k]] for k in range(K + 1)]) for draft in drafts]),
        q,
        torch.tensor(drafts),
        torch.tensor([length_of(draft) for draft in drafts]),
        verification,
    )
    emitted = torch.zeros([V] * (K + 1), dtype=torch.float64)
    for i, draft in enumerate(drafts):
        weight = 1.0
        for k, token in enumerate(draft):
            weight *= q[i, k, token].item()
        for accepted, end in enumerate(law.ends[i].tolist()):
            for token, share in enumerate(law.bonus[i, accepted].tolist()):
                extend(emitted, (*draft[:accepted], token), weight * end * share, p)
    expected = torch.zeros_like(emitted)
    extend(expected, (), 1.0, p)
    return emitted, expected


def extend(table, tokens, weight, p):
    """Adds `weight` to every sequence that begins with `tokens`, in proportion to p."""
    if weight == 0:
        return
    if len(tokens) == table.dim():
        table[tokens] += weight
        return
    for token, share in enumerate(p[tokens].tolist()):
        extend(table, (*tokens, token), weight * share, p)


LENGTHS = {
    "none": lambda draft: 0,
    "one": lambda draft: 1,
    "two": lambda draft: 2,
    "all": lambda draft: 3,
    # may depend on the drafts before those that it drops
    "by-first-draft": lambda draft: (1, 2, 3)[draft[0]],
    "by-second-draft": lambda draft: 3 if draft[1] == 0 else 2,
}


@pytest.mark.parametrize("verification", VERIFICATIONS)
@pytest.mark.parametrize("length", LENGTHS)
def test_the_whole_chain_follows_the_target(length, verification):
    for seed in range(3):
        emitted, expected = enumerate_chain(3, 3, seed, LENGTHS[length], verification=verification)
        torch.testing.assert_close(emitted, expected, rtol=0, atol=1e-6)
        assert emitted.sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_the_whole_chain_follows_the_target_if_drafts_depend_on_each_other(verification):
    def sharpened(p, prefix, k):
        squared = p[prefix] ** 2
        return squared / squared.sum()

    emitted, expected = enumerate_chain(3, 3, 5, lambda draft: 3, sharpened, verification)
    torch.testing.assert_close(emitted, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_a_perfect_draft_is_always_accepted(verification):
    emitted, expected = enumerate_chain(2, 3, 6, lambda draft: 2, lambda p, prefix, k: p[prefix], verification)
    torch.testing.assert_close(emitted, expected, rtol=0, atol=1e-6)

    generator = torch.Generator().manual_seed(0)
    p = random_laws(generator, 500, 4, 7, zero_share=0.3)
    drafts = torch.stack([sample_from(p[:, k], generator) for k in range(3)], dim=1)
    law = verdict_law(p, p[:, :3].clone(), drafts, torch.full((500,), 3), verification)
    assert torch.equal(law.accept, torch.ones(500, 3))
    assert torch.equal(law.bonus, p)  # the residual sums to 0
    length, settings = torch.full((500,), 3), {"verification": verification, "generator": generator}
    verdict = verify_sample(p, p[:, :3].clone(), drafts, length, **settings)
    assert verdict.num_accepted.tolist() == [3] * 500
    assert torch.equal(verdict.tokens[:, :3], drafts)


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_a_draft_the_target_excludes_is_never_accepted(verification):
    p = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    q = torch.tensor([[[1.0, 0.0]]])
    law = verdict_law(p, q, torch.tensor([[0]]), torch.tensor([1]), verification)
    assert law.accept.tolist() == [[0.0]]
    assert law.bonus[0, 0].tolist() == [0.0, 1.0]
    for seed in range(20):
        settings = {"verification": verification, "generator": torch.Generator().manual_seed(seed)}
        verdict = verify_sample(p, q, torch.tensor([[0]]), torch.tensor([1]), **settings)
        assert verdict.num_accepted.tolist() == [0]
        assert verdict.tokens[0, 0] == 1


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_what_stands_behind_draft_length_is_ignored(verification):
    """Dead drafts may hold anything, even another row's tokens and laws."""
    generator = torch.Generator().manual_seed(3)
    p, q = random_laws(generator, 50, 4, 5), random_laws(generator, 50, 3, 5)
    drafts = torch.randint(0, 5, (50, 3), generator=generator)
    length = torch.randint(0, 4, (50,), generator=generator)
    dead = torch.arange(3) >= length[:, None]
    other_q = torch.where(dead[:, :, None], torch.full_like(q, torch.nan), q)
    other_drafts = torch.where(dead, (drafts + 1) % 5, drafts)
    verdicts = [
        verify_sample(p, law, tokens, length, verification=verification, generator=torch.Generator().manual_seed(4))
        for law, tokens in ((q, drafts), (other_q, other_drafts))
    ]
    assert torch.equal(verdicts[0].num_accepted, verdicts[1].num_accepted)
    assert bool((verdicts[0].num_accepted <= length).all())
    for b, accepted in enumerate(verdicts[0].num_accepted.tolist()):
        assert torch.equal(verdicts[0].tokens[b, : accepted + 1], verdicts[1].tokens[b, : accepted + 1])


# ---------------------------------------------------------------------- what is drawn


@pytest.mark.parametrize("verification", VERIFICATIONS)
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_sampled_sequences_follow_the_target(ragged, verification):
    """Drafts, verification and continuation by p, counted over all sequences of 3 tokens of 3."""
    K, V, B = 2, 3, 60_000
    generator = torch.Generator().manual_seed(11)
    tables = [random_laws(generator, *[V] * (n + 1)) for n in range(K + 1)]  # p of token n, by the n before it
    q = [random_laws(generator, V) for _ in range(K)]

    def p_at(n, sequences):
        return tables[n][tuple(sequences[:, :n].T)].expand(B, V)

    drafts = torch.stack([torch.multinomial(law, B, replacement=True, generator=generator) for law in q], dim=1)
    length = torch.randint(0, K + 1, (B,), generator=generator) if ragged else torch.full((B,), K)
    verdict = verify_sample(
        torch.stack([p_at(n, drafts) for n in range(K + 1)], dim=1),
        torch.stack(q).expand(B, -1, -1),
        drafts,
        length,
        verification=verification,
        generator=generator,
    )
    sequences = verdict.tokens.clone()
    for n in range(1, K + 1):
        drawn = torch.multinomial(p_at(n, sequences), 1, generator=generator).squeeze(1)
        sequences[:, n] = torch.where(n <= verdict.num_accepted, sequences[:, n], drawn)
    counts = torch.bincount(sequences @ torch.tensor([9, 3, 1]), minlength=27)
    law = tables[0][:, None, None] * tables[1][:, :, None] * tables[2]
    statistic, freedom = chi_square(counts, law.flatten())
    assert statistic < CHI_SQUARE_999[freedom]
    assert set(verdict.num_accepted.tolist()) == {0, 1, 2}


def test_without_drafts_the_bonus_token_is_a_sample_of_the_target():
    generator = torch.Generator().manual_seed(12)
    p = random_laws(generator, 1, 1, 4)
    B = 40_000
    verdict = verify_sample(
        p.expand(B, -1, -1),
        p.new_zeros(B, 0, 4),
        torch.empty(B, 0).long(),
        torch.zeros(B).long(),
        generator=generator,
    )
    assert verdict.tokens.shape == (B, 1)
    assert not verdict.num_accepted.any()
    statistic, freedom = chi_square(torch.bincount(verdict.tokens[:, 0], minlength=4), p[0, 0])
    assert statistic < CHI_SQUARE_999[freedom]


@pytest.mark.parametrize("verification", VERIFICATIONS)
def test_the_same_generator_gives_the_same_verdict(verification):
    generator = torch.Generator().manual_seed(13)
    p, q = random_laws(generator, 100, 4, 9), random_laws(generator, 100, 3, 9)
    drafts, length = torch.randint(0, 9, (100, 3), generator=generator), torch.full((100,), 3)
    first, again, other = (
        verify_sample(p, q, drafts, length, verification=verification, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.num_accepted, again.num_accepted)
    assert not torch.equal(first.num_accepted, other.num_accepted)


def test_sample_from_follows_its_law_and_leaves_zeros_out():
    law = torch.tensor([0.0, 0.3, 0.0, 0.05, 0.25, 0.1, 0.2, 0.1, 0.0])
    drawn = sample_from(law.expand(50_000, -1), torch.Generator().manual_seed(14))
    statistic, freedom = chi_square(torch.bincount(drawn, minlength=9), law)
    assert statistic < CHI_SQUARE_999[freedom]


def test_sample_from_draws_each_row_by_itself():
    laws = torch.eye(5)[torch.tensor([[0, 3], [4, 1]])]
    assert sample_from(laws, torch.Generator().manual_seed(0)).tolist() == [[0, 3], [4, 1]]


@pytest.mark.parametrize("racing_to_zero", [slice(None), slice(0, 1), slice(2, 3)], ids=["all", "first", "last"])
def test_sample_from_survives_an_exponential_of_exactly_zero(racing_to_zero, monkeypatch):
    """0 / 0 would be NaN, which argmax takes for the largest."""
    draw = torch.Tensor.exponential_

    def with_zeros(self, lambd=1, *, generator=None):
        draw(self, lambd, generator=generator)[..., racing_to_zero] = 0
        return self

    monkeypatch.setattr(torch.Tensor, "exponential_", with_zeros)
    law = torch.tensor([0.0, 1.0, 0.0]).expand(100, -1)
    assert sample_from(law, torch.Generator().manual_seed(0)).tolist() == [1] * 100


def test_sample_from_keeps_to_what_top_k_left_of_a_large_vocabulary():
    generator = torch.Generator().manual_seed(15)
    law = torch.zeros(2000, 4096)
    kept = torch.randint(0, 4096, (2000, 5), generator=generator)
    law.scatter_(1, kept, torch.rand(2000, 5, generator=generator) + 1e-6)
    law /= law.sum(dim=1, keepdim=True)
    drawn = sample_from(law, generator)
    assert bool((law.gather(1, drawn[:, None]) > 0).all())


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("check", [verdict_law, verify_sample])
@pytest.mark.parametrize(
    ("p_shape", "q_shape", "message"),
    [
        (
            (2, 3, 5),
            (2, 3, 5),
            r"target_probs: expected leading shape \(2, 4\) for .*\(2, 3\), found \(2, 3, 5\)",
        ),
        (
            (1, 4, 5),
            (2, 3, 5),
            r"target_probs: expected leading shape \(2, 4\) for .*\(2, 3\), found \(1, 4, 5\)",
        ),
        (
            (2, 4, 5),
            (2, 4, 5),
            r"draft_probs: expected leading shape \(2, 3\) for .*\(2, 3\), found \(2, 4, 5\)",
        ),
        (
            (2, 4, 5),
            (3, 3, 5),
            r"draft_probs: expected leading shape \(2, 3\) for .*\(2, 3\), found \(3, 3, 5\)",
        ),
        ((2, 4, 5), (2, 3, 6), r"\(2, 3, 6\)"),
        ((2, 4, 5), (2, 3, 1), r"\(2, 3, 1\)"),
    ],
    ids=["p-rows", "p-batch", "q-rows", "q-batch", "vocabulary", "broadcast"],
)
def test_shapes_that_disagree_are_refused_with_both_shapes(check, p_shape, q_shape, message):
    with pytest.raises(ValueError, match=message):
        check(torch.ones(p_shape), torch.ones(q_shape), torch.zeros(2, 3).long(), torch.full((2,), 3))


@pytest.mark.parametrize("length_shape", [(1,), (3,), (2, 1)])
def test_a_draft_length_of_another_shape_is_refused(length_shape):
    p, q, drafts = torch.ones(2, 4, 5), torch.ones(2, 3, 5), torch.zeros(2, 3).long()
    length = torch.full(length_shape, 3)
    with pytest.raises(ValueError, match="draft_length"):
        verify_greedy(drafts.new_zeros(2, 4), drafts, length)
    with pytest.raises(ValueError, match="draft_length"):
        verify_sample(p, q, drafts, length)


@pytest.mark.parametrize("check", [verdict_law, verify_sample])
@pytest.mark.parametrize(("p_dtype", "q_dtype"), [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)])
def test_probabilities_other_than_float32_are_refused(check, p_dtype, q_dtype):
    p, q = torch.ones(2, 4, 5, dtype=p_dtype), torch.ones(2, 3, 5, dtype=q_dtype)
    with pytest.raises(ValueError, match=f"expected float32 probabilities, found {p_dtype} and {q_dtype}"):
        check(p, q, torch.zeros(2, 3).long(), torch.full((2,), 3))
