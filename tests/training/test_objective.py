"""What drafts are trained for: the expected accepted length against enumeration and against loops over blocks."""

import itertools
import math

import pytest
import torch

from pardec.layout import training_layout
from pardec.training.comparison import target_law
from pardec.training.loss import expected_accepted_length
from pardec.training.objective import Objective

ACCEPTED_LENGTH = Objective("accepted_length")


def random_law(generator, num_tokens: int, sharpness: float = 2.0) -> torch.Tensor:
    return (sharpness * torch.randn(num_tokens, generator=generator, dtype=torch.float64)).softmax(-1)


# ---------------------------------------------------------------------- one block, enumerated


@pytest.mark.parametrize("knows", ["nothing", "the tokens before"])
@pytest.mark.parametrize(("V", "K"), [(3, 1), (4, 3), (3, 4)])
def test_the_mean_over_the_targets_texts_is_what_verification_accepts(V, K, knows):
    """Accepted drafts counted over every draft and every outcome of judging it, one draft after another."""
    generator = torch.Generator().manual_seed(V + K)
    prefixes = [prefix for n in range(K) for prefix in itertools.product(range(V), repeat=n)]
    p = {prefix: random_law(generator, V) for prefix in prefixes}
    of_depth = [random_law(generator, V) for _ in range(K)]
    q = {prefix: of_depth[len(prefix)] if knows == "nothing" else random_law(generator, V) for prefix in prefixes}
    expected = found = 0.0
    for x in itertools.product(range(V), repeat=K):
        drawn = accepted = written = 1.0
        overlap, kept = [], []
        for k, token in enumerate(x):
            target, draft = p[x[:k]], q[x[:k]]
            ratio = float(draft[token] / target[token])
            drawn, accepted = drawn * float(draft[token]), accepted * min(1.0, 1 / ratio)
            # accepted to here or further; of drafts that begin alike the rest sums to 1
            expected += drawn * accepted / V ** (K - k - 1)
            written *= float(target[token])
            overlap.append(float(torch.minimum(target, draft).sum()))
            kept.append(min(1.0, ratio))
        found += written * float(expected_accepted_length(torch.tensor(overlap), torch.tensor(kept)))
    assert found == pytest.approx(expected, abs=1e-6)
    assert 0 < found < K


# ---------------------------------------------------------------------- rows of a forward


def rows_of(block_lengths: tuple[int, ...], num_tokens: int, seed: int, top_k: int | None = None):
    """Layout, logits, law, tokens of two sequences."""
    generator = torch.Generator().manual_seed(seed)
    layout = training_layout(torch.zeros(2, len(block_lengths), dtype=torch.long), block_lengths, 30)
    rows = 2 * len(layout.depths)
    logits, target = (2 * torch.randn(2, rows, num_tokens, generator=generator)).unbind()
    ids = torch.randint(num_tokens, (rows,), generator=generator)
    return layout, logits, target_law(target, top_k=top_k), ids


def by_loops(layout, logits, p, ids, counts, temperature: float) -> torch.Tensor:
    """-log E of the block of every row, from its definition, in float64 and differentiable."""
    log_q, p = (logits / temperature).log_softmax(-1), p.double()
    M, out = len(layout.depths), [torch.zeros((), dtype=torch.float64)] * len(ids)
    for b in range(2):
        for block in set(layout.blocks.tolist()):
            rows = [b * M + i for i in range(M) if layout.blocks[i] == block]
            before, length, reached = 1.0, 0.0, []
            for row in rows:
                if not counts[row]:
                    break
                reached.append(row)
                length = length + before * torch.minimum(log_q[row].exp(), p[row]).sum()
                x = ids[row]
                before = before * ((log_q[row, x].exp() / p[row, x]).clamp_max(1) if p[row, x] > 0 else 0.0)
            for row in reached:
                out[row] = -torch.log(length)
    return torch.stack(out)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.7, None), (1.0, 3)])
@pytest.mark.parametrize("block_lengths", [(3, 3), (4, 2, 1)])
def test_every_row_carries_minus_the_log_of_its_blocks_expected_length(block_lengths, temperature, top_k):
    layout, logits, law, ids = rows_of(block_lengths, 9, seed=1, top_k=top_k)
    p = law.probs
    counts = torch.ones(len(ids), dtype=torch.bool)
    counts[[1, len(ids) // 2]] = False  # inside of a block, and at the beginning of one
    objective, K = Objective("accepted_length", temperature=temperature), block_lengths[0]
    logits.requires_grad_()
    weighted, found = objective.weighted_losses(logits, law, ids, counts, layout, K)
    slopes = torch.arange(1, len(ids) + 1)
    (weighted * slopes).sum().backward()

    exact = logits.detach().double().requires_grad_()
    expected = by_loops(layout, exact, p, ids, counts, temperature)
    (expected * slopes).sum().backward()
    torch.testing.assert_close(weighted.detach().double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        found.overlap.detach(), torch.minimum((logits.detach() / temperature).softmax(-1), p).sum(-1)
    )
    assert float((expected > 0).sum() + (expected < 0).sum()) < len(ids)  # some rows count for nothing
    assert top_k is None or bool((p.gather(1, ids[:, None]) == 0).any())


def test_a_block_of_perfect_drafts_is_accepted_whole():
    layout, logits, _, ids = rows_of((4, 4), 9, seed=2)
    counts = torch.ones(len(ids), dtype=torch.bool)
    weighted, _ = ACCEPTED_LENGTH.weighted_losses(logits, target_law(logits), ids, counts, layout, 4)
    torch.testing.assert_close(weighted, torch.full((len(ids),), -math.log(4)))


def test_values_and_gradients_stay_finite_where_laws_do_not_overlap():
    layout, logits, law, ids = rows_of((3, 3), 9, seed=3, top_k=2)
    certain = torch.full_like(logits, -200.0).scatter(1, law.probs.argmin(dim=1, keepdim=True), 200.0).requires_grad_()
    counts = torch.ones(len(ids), dtype=torch.bool)
    weighted, _ = ACCEPTED_LENGTH.weighted_losses(certain, law, ids, counts, layout, 3)
    weighted.sum().backward()
    assert bool(weighted.isfinite().all())
    assert bool(certain.grad.isfinite().all())


@pytest.mark.parametrize("weights", ["expected_length", "prefix_product", [1.0, 0.5], [2.0, 2.0]])
def test_weights_beside_an_objective_that_has_its_own_are_refused(weights):
    with pytest.raises(
        ValueError, match=r"position_weights: expected 1 beside the objective accepted_length, .* found"
    ):
        Objective("accepted_length", weights)


@pytest.mark.parametrize("weights", ["uniform", [1.0, 1.0]])
def test_flat_weights_are_no_weights(weights):
    assert Objective("accepted_length", weights).weights == weights
