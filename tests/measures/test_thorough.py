"""The long check: it passes a model that is right, and finds tokens and laws that are not the base's."""

from collections import Counter

import pytest
import torch
from sampling_oracle import joint_law
from tiny_models import make_adapter, tiny_model

from pardec.decoding import verifier as verifier_module
from pardec.decoding.verify import Verdict
from pardec.measures import thorough
from pardec.measures.thorough import check_thoroughly, chi_square, continuations, law_check
from pardec.model import SelfSpeculativeModel

K, V = 3, 61
TEXT = [5, 9, 2, 7, 7, 1, 3, 8]


@pytest.fixture
def model():
    base = tiny_model("llama", dtype=torch.float32)
    return SelfSpeculativeModel(base, None, make_adapter(base, K, lora_rank=2))


@pytest.fixture
def fewer(monkeypatch):
    monkeypatch.setattr(thorough, "CONTEXTS", (8, 100))
    monkeypatch.setattr(thorough, "NEW_TOKENS", 24)
    monkeypatch.setattr(thorough, "NUM_SAMPLES", 300)


def accept_all(target, draft_probs_or_tokens, *rest, **options) -> Verdict:
    """Takes every draft, unseen; where there is none to compare it is as it should be."""
    drafts = rest[0] if options else draft_probs_or_tokens
    if not options and not drafts.shape[1]:
        return Verdict(target, drafts.new_zeros(drafts.shape[0]))
    tokens = torch.cat([drafts, drafts.new_zeros(drafts.shape[0], 1)], dim=1)
    return Verdict(tokens, torch.full((drafts.shape[0],), drafts.shape[1]))


def test_a_model_that_is_right_passes_whatever_its_generation_config_says(model, fewer):
    model.base_model.generation_config.repetition_penalty = 3.0
    own, told = model.base_model.generation_config, []
    report = check_thoroughly(model, TEXT, told.append)
    assert report.passed
    assert [(one.mode, one.context) for one in report.greedy] == [
        (mode, context) for context in (8, 100) for mode in ("plain", "two_pass", "fused")
    ]
    assert [one.mode for one in report.law] == ["plain", "two_pass", "fused"]
    assert told[0] == "steps behind many tokens"
    assert len(told) == 6
    assert model.base_model.generation_config is own


def test_greedy_tokens_that_are_not_the_bases_are_found(model, fewer, monkeypatch):
    monkeypatch.setattr(verifier_module, "verify_greedy", accept_all)
    report = check_thoroughly(model, TEXT)
    assert not report.passed
    assert {one.mode for one in report.greedy if not one.passed} >= {"two_pass", "fused"}
    assert all(one.passed for one in report.law)


def test_a_law_that_is_not_the_bases_is_found(model, monkeypatch):
    assert law_check(model, TEXT, "fused", 300).passed
    monkeypatch.setattr(verifier_module, "verify_sample", accept_all)
    assert not law_check(model, TEXT, "fused", 300).passed


def test_probabilities_of_continuations_are_those_of_plain_forwards(model):
    warper = {"temperature": 1.0, "top_k": 4, "top_p": None, "min_p": None}
    expected = joint_law(model.base_model, TEXT, 3, warper)
    found = continuations(model, TEXT)
    assert found.keys() == expected.keys()
    assert all(found[tokens] == pytest.approx(p, abs=1e-5) for tokens, p in expected.items())


def test_continuations_end_at_eos(model):
    (likeliest,) = max(continuations(model, TEXT).items(), key=lambda item: item[1])[:1]
    model.base_model.generation_config.eos_token_id = likeliest[0]
    found = continuations(model, TEXT)
    assert likeliest[:1] in found
    assert sum(found.values()) == pytest.approx(1.0)
    assert law_check(model, TEXT, "two_pass", 300).passed


def test_chi_square_is_that_of_the_tables():
    expected = {(0,): 50.0, (1,): 30.0, (2,): 20.0}
    cells, p = chi_square(Counter({(0,): 50, (1,): 30, (2,): 20}), expected)
    assert (cells, p) == (3, 1.0)
    # statistic 5.991 with 2 degrees of freedom is the table's 0.05
    off = (5.991 * 20 * 30 / 50) ** 0.5
    _, p = chi_square(Counter({(0,): 50, (1,): 30 + off, (2,): 20 - off}), expected)
    assert p == pytest.approx(0.05, abs=1e-4)
    assert chi_square(Counter({(3,): 1, (0,): 99}), expected)[1] == 0.0
