"""Draws from what top-k keeps: the same law as over the whole vocabulary, ties too."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from pardec.decoding.sampling import TokenLaw, make_warpers

V = 2000
LAWS = [(0.8, 10, None, None), (1.0, 1, None, None), (1.3, 50, None, 0.1), (1.0, 5, None, 0.3)]


def law_of(*settings) -> TokenLaw:
    return TokenLaw(False, tuple(make_warpers(*settings)), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("settings", LAWS, ids=str)
def test_it_is_the_law_of_the_whole_vocabulary(settings, dtype):
    logits = (torch.randn(3, 4, V, generator=torch.Generator().manual_seed(1)) * 4).to(dtype)
    law = law_of(*settings)
    scores, ids = law._kept(logits)
    found = torch.zeros(3, 4, V).scatter(2, ids, scores.softmax(dim=-1))
    torch.testing.assert_close(found, law.probs(logits), rtol=1e-5, atol=1e-7)


def test_ties_with_the_last_score_that_is_kept_are_kept():
    logits = torch.randn(1, 1, V, generator=torch.Generator().manual_seed(1))
    logits[0, 0, :14] = 9.0  # ten are to be kept
    law = law_of(0.8, 10, None, None)
    scores, ids = law._kept(logits)
    assert sorted(ids[scores > -float("inf")].tolist()) == list(range(14))
    assert torch.equal(law.probs(logits)[0, 0] > 0, torch.arange(V) < 14)


def test_where_there_are_more_ties_than_were_looked_at_the_whole_vocabulary_is():
    logits = torch.zeros(2, 1, V)
    law = law_of(1.0, 10, None, None)
    assert law._kept(logits) is None
    assert law.sample(logits.expand(-1, 3000, -1)).unique().numel() > V // 2


@pytest.mark.parametrize(
    "processors",
    [
        (),
        (MinPLogitsWarper(0.1),),
        (MinPLogitsWarper(0.1), TopKLogitsWarper(5)),
        (TopKLogitsWarper(5), TopPLogitsWarper(0.9)),
        (TopKLogitsWarper(V),),
    ],
    ids=["none", "no top-k", "another before it", "one that goes by the order of ties", "nearly all"],
)
def test_other_laws_are_drawn_from_the_whole_vocabulary(processors):
    assert TokenLaw(False, (TemperatureLogitsWarper(0.8), *processors))._kept(torch.randn(1, 1, V)) is None


def test_draws_follow_the_law():
    logits = torch.randn(1, 1, V, generator=torch.Generator().manual_seed(2)) * 3
    law = law_of(0.9, 6, None, 0.05)
    drawn = law.sample(logits.expand(1, 40_000, V))[0].bincount(minlength=V) / 40_000
    torch.testing.assert_close(drawn, law.probs(logits)[0, 0], rtol=0, atol=0.01)


# ---------------------------------------------------------------------- drafts, whose law is free


@pytest.mark.parametrize("settings", [*LAWS, (0.8, 20, 0.95, None), (1.2, 40, 0.5, 0.05)], ids=str)
def test_drafts_from_the_tokens_that_top_k_leaves_have_the_law_of_all(settings):
    logits = torch.randn(3, 4, V, generator=torch.Generator().manual_seed(1)) * 4
    law = law_of(*settings)
    tokens, q = law._draw_listed(logits)
    assert (tokens.shape, q.dtype) == ((3, 4), torch.float32)
    torch.testing.assert_close(q, law.probs(logits), rtol=1e-5, atol=1e-7)
    assert (q.gather(2, tokens[..., None]) > 0).all()


def test_drafts_follow_the_law_that_is_told_of_them():
    """Among them more ties than are looked at, cut by top-p: another law than the target's, but the one they have."""
    logits = torch.zeros(1, 1, V)
    logits[0, 0, 500:502] = 1.0
    law = law_of(0.7, 10, 0.9, None)
    tokens, q = law._draw_listed(logits.expand(1, 40_000, V))
    drawn = tokens[0].bincount(minlength=V) / 40_000
    torch.testing.assert_close(drawn, q[0, 0], rtol=0, atol=0.01)
    assert float(q[0, 0].sum()) == pytest.approx(1)
    assert not torch.equal(q[0, 0] > 0, law.probs(logits)[0, 0] > 0)


class Reversed(LogitsProcessor):
    """Of a user's own; drafts are made without."""

    def __call__(self, input_ids, scores):
        return -scores


@pytest.mark.filterwarnings("ignore:called row by row")
def test_processors_of_a_users_own_do_not_reach_drafts():
    logits = torch.randn(1, 2, V, generator=torch.Generator().manual_seed(1))
    law = TokenLaw(False, (Reversed(), TopKLogitsWarper(5)), torch.Generator().manual_seed(0))
    torch.testing.assert_close(law._draw_listed(logits)[1], law.probs(logits), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "processors",
    [(), (TypicalLogitsWarper(0.9), TopKLogitsWarper(5)), (TopKLogitsWarper(V // 2),)],
    ids=["no top-k", "another before it", "nearly all"],
)
def test_drafts_of_other_laws_are_drawn_from_the_whole_vocabulary(processors):
    assert TokenLaw(False, processors)._draw_listed(torch.randn(1, 1, V)) is None


class _Sorts(TorchDispatchMode):
    """Widths of the rows that are sorted."""

    def __init__(self):
        super().__init__()
        self.widths: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.startswith("sort"):
            self.widths.append(args[0].shape[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("device", "width"), [("meta", 26), ("cpu", V)])
def test_where_sorting_is_slow_drafts_are_found_without_sorting_the_vocabulary(device, width):
    """On a CPU a seed brings the drafts that it always brought."""
    law = TokenLaw(False, tuple(make_warpers(0.8, 10, 0.9, None)))
    with _Sorts() as sorts:
        _, q = law.draw(torch.zeros(1, 3, V, device=device))
    assert sorts.widths == [width]
    assert q.shape == (1, 3, V)
