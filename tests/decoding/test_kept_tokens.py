"""Draws from what top-k keeps: the same law as over the whole vocabulary, ties too."""

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
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
