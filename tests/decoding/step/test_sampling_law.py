"""Sampled output follows the target's law exactly: by enumeration of whole steps, and by chi-square."""

import itertools
import math
from collections import Counter

import pytest
import torch
from sampling_oracle import (
    PROMPT,
    WARPERS,
    Z_LIMIT,
    K,
    V,
    assert_same_law,
    chi_square_z,
    emitted_law,
    extended,
    joint_law,
    recorded_step,
    thin_model,
)
from tiny_models import make_adapter, tiny_model

from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw, likeliest, make_warpers
from pardec.decoding.step import Decoder
from pardec.decoding.verify import VERIFICATIONS
from pardec.model import SelfSpeculativeModel
from pardec.target.forward import TargetModel


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_of_logits_that_are_equal_in_their_dtype_the_first_is_the_likeliest(dtype):
    logits = torch.zeros(2, 3, 300, dtype=dtype)
    logits[0, 1, [40, 7, 299]] = 5.0
    logits[1, 2, 17] = float("inf")
    logits[1, 0, :] = float("-inf")
    expected = torch.tensor([[0, 7, 0], [0, 0, 17]])
    assert torch.equal(likeliest(logits), expected)
    close = torch.tensor([1.0, 1.0 + 1e-12], dtype=dtype)  # what only float64 tells apart
    assert int(likeliest(close)) == (dtype == torch.float64)


@pytest.fixture(scope="module")
def toy():
    return tiny_model("llama", vocab_size=V, seed=3)


def toy_decoder(model, mode: str, warper: dict) -> Decoder:
    law = TokenLaw(False, tuple(make_warpers(**warper)))
    masks = make_adapter(model, K).mask_embeddings.double() * 3
    return Decoder(RowForward(TargetModel.wrap(model), masks), mode, K, law, 16, torch.empty(0, dtype=torch.long))


@pytest.mark.parametrize("draft_length", [0, 1, 2])
@pytest.mark.parametrize("warper", list(WARPERS))
def test_a_fused_step_emits_the_targets_law(toy, warper, draft_length, monkeypatch):
    options = WARPERS[warper]
    decoder = toy_decoder(toy, "fused", options)
    drafts = torch.tensor(list(itertools.product(range(V), repeat=K)))
    B = len(drafts)
    with torch.no_grad():
        state = decoder.prefill([PROMPT] * B)
    bonus = 2
    state.bonus = torch.full((B,), bonus)
    state.drafts = drafts
    state.draft_length = torch.full((B,), draft_length)
    ((p, q, given, length),) = recorded_step(decoder, state, monkeypatch)
    assert torch.equal(given, drafts)
    assert q.std(dim=0).max() < 1e-6  # every row drafted from the same law, which is what weighs the rows
    weights = [math.prod(float(q[0, k, d]) for k, d in enumerate(row)) for row in drafts.tolist()]
    prefix = [*PROMPT, bonus]
    for verification in VERIFICATIONS:
        emitted = emitted_law(p, q, drafts, length, weights, verification)
        assert max(len(k) for k, v in emitted.items() if v > 0) == draft_length + 1
        found = extended(toy, emitted, prefix, K + 1, options)
        assert_same_law(found, joint_law(toy, prefix, K + 1, options))


@pytest.mark.parametrize("draft_length", [1, 2])
@pytest.mark.parametrize("warper", list(WARPERS))
def test_a_two_pass_round_emits_the_targets_law(toy, warper, draft_length, monkeypatch):
    options = WARPERS[warper]
    decoder = toy_decoder(toy, "two_pass", options)
    rows = torch.tensor(list(itertools.product(range(V), repeat=K + 1)))
    first, drafts = rows[:, 0], rows[:, 1:]
    B = len(rows)
    with torch.no_grad():
        state = decoder.prefill([PROMPT] * B)
    bonus = 2
    state.bonus = torch.full((B,), bonus)
    state.draft_length = torch.full((B,), draft_length)
    draw = TokenLaw.draw
    monkeypatch.setattr(TokenLaw, "draw", lambda self, logits: (drafts, draw(self, logits)[1]))
    (p_first, *_), (p, q, given, length) = recorded_step(decoder, state, monkeypatch, first=first)
    assert torch.equal(given, drafts)
    found: dict[tuple[int, ...], float] = {}
    for token in range(V):
        mine = first == token
        weight = float(p_first[0, 0, token])
        weights = [weight * math.prod(float(q[0, k, d]) for k, d in enumerate(r)) for r in drafts[mine].tolist()]
        for key, value in emitted_law(p[mine], q[mine], drafts[mine], length[mine], weights).items():
            found[(token, *key)] = found.get((token, *key), 0.0) + value
    prefix = [*PROMPT, bonus]
    found = extended(toy, found, prefix, K + 2, options)
    assert_same_law(found, joint_law(toy, prefix, K + 2, options))


# ---------------------------------------------------------------------- the public API, by chi-square


def with_eos(joint: dict[tuple[int, ...], float], eos: int | None) -> dict[tuple[int, ...], float]:
    cut: dict[tuple[int, ...], float] = {}
    for tokens, probability in joint.items():
        key = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
        cut[key] = cut.get(key, 0.0) + probability
    return cut


SAMPLES = 6000


@pytest.fixture(scope="module")
def thin():
    return thin_model()


def sample_counts(model, mode: str, warper: dict, seed: int = 0) -> Counter:
    out = model.generate([PROMPT], max_new_tokens=4, mode=mode, seed=seed, num_return_sequences=SAMPLES, **warper)
    return Counter(tuple(tokens) for tokens in out.token_ids)


@pytest.mark.parametrize("mode", ["plain", "two_pass", "fused"])
@pytest.mark.parametrize("warper", ["temperature", "all"])
def test_generate_samples_the_targets_law(thin, mode, warper):
    options = WARPERS[warper]
    eos = 3
    thin.generation_config.eos_token_id = eos
    try:
        ours = SelfSpeculativeModel(thin, None, make_adapter(thin, K, lora_rank=2))
        counts = sample_counts(ours, mode, options)
    finally:
        thin.generation_config.eos_token_id = None
    law = with_eos(joint_law(thin, PROMPT, 4, options), eos)
    assert any(len(tokens) < 4 for tokens in counts)
    assert chi_square_z(counts, law) < Z_LIMIT


def test_the_chi_square_notices_a_lossy_rule(thin, monkeypatch):
    """Drawing from p after a rejection, as published code does, is caught by the same test."""
    from pardec.decoding import verify

    monkeypatch.setattr(verify, "bonus_law", lambda target_probs, *others: target_probs)
    ours = SelfSpeculativeModel(thin, None, make_adapter(thin, K, lora_rank=2))
    counts = sample_counts(ours, "fused", WARPERS["temperature"])
    assert chi_square_z(counts, joint_law(thin, PROMPT, 4, WARPERS["temperature"])) > 2 * Z_LIMIT


def test_rows_of_a_batch_draw_independently(thin):
    ours = SelfSpeculativeModel(thin, None, make_adapter(thin, K))
    out = ours.generate([PROMPT] * 64, max_new_tokens=6, temperature=1.0, seed=0)
    assert len({tuple(tokens) for tokens in out.token_ids}) > 16
    again = ours.generate([PROMPT] * 64, max_new_tokens=6, temperature=1.0, seed=0)
    assert out.token_ids == again.token_ids
    other = ours.generate([PROMPT] * 64, max_new_tokens=6, temperature=1.0, seed=1)
    assert out.token_ids != other.token_ids
