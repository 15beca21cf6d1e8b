"""Sampled output follows the target's law with a sampler head and with noise: by enumeration and by chi-square.

Every row of a batch is made to draw another sequence of drafts, each knowing the one before it, so that a batch holds
all of them; what verification is told of their law weighs them.
"""

import dataclasses
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

from pardec.adapters.gated_lora import LoraGate
from pardec.adapters.noise import NoiseTokens
from pardec.decoding import verifier as verifier_module
from pardec.decoding.drafting import HeadDrafter
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw, make_warpers
from pardec.decoding.step import Decoder
from pardec.decoding.verify import VERIFICATIONS, Verdict
from pardec.model import SelfSpeculativeModel
from pardec.target.forward import TargetModel


@pytest.fixture(scope="module")
def toy():
    return tiny_model("llama", vocab_size=V, seed=3)


def adapter_for(toy, draft_input: str, shortlist: int):
    rank = 2 if draft_input == "uniform_noise" else 0
    adapter = make_adapter(toy, K, lora_rank=rank, head_width=3, shortlist=shortlist, draft_input=draft_input)
    # small enough that the law of a draft has more than one likely token
    return dataclasses.replace(adapter, head={name: tensor * 0.4 for name, tensor in adapter.head.items()})


def decoder_for(toy, mode: str, warper: dict, draft_input: str, shortlist: int, *, with_head=True) -> Decoder:
    adapter, target = adapter_for(toy, draft_input, shortlist), TargetModel.wrap(toy)
    law, no_eos = TokenLaw(False, tuple(make_warpers(**warper))), torch.empty(0, dtype=torch.long)
    inputs = {"noise": NoiseTokens.of(V, target.device)}
    if draft_input == "mask_embeddings":
        inputs = {"mask_embeddings": adapter.mask_embeddings.double()}
    gate = None if adapter.lora is None else LoraGate(toy, adapter.lora)
    head = HeadDrafter.of(adapter, target) if with_head else None
    forward = RowForward(target, gate=gate, tap=head and head.tap, **inputs)
    return Decoder(forward, mode, K, law, 16, no_eos, head=head)


def force_draws(monkeypatch, places: torch.Tensor) -> None:
    """The j-th draft of row b is number `places[b, j]` of its shortlist, whatever its law is."""
    draw, calls = TokenLaw.draw, itertools.count()

    def forced(self, scores):
        j = next(calls) % places.shape[1]
        return places[:, j : j + 1], draw(self, scores)[1]

    monkeypatch.setattr(TokenLaw, "draw", forced)


def force_verdict(monkeypatch, tokens: list[int], num_accepted: int) -> None:
    def verdict(target_probs, *args, verification="token", generator=None):
        B = target_probs.shape[0]
        return Verdict(torch.tensor([tokens] * B), torch.full((B,), num_accepted))

    monkeypatch.setattr(verifier_module, "verify_sample", verdict)


def weights_of(q: torch.Tensor, drafts: torch.Tensor) -> list[float]:
    weights = [math.prod(float(q[b, k, d]) for k, d in enumerate(row)) for b, row in enumerate(drafts.tolist())]
    assert sum(weights) == pytest.approx(1, abs=1e-5)  # the batch holds all drafts
    assert max(weights) < 0.99  # and not one for certain
    return weights


@pytest.mark.parametrize("draft_length", [0, 1, 2])
@pytest.mark.parametrize("accepted", [None, 0, 1, 2], ids=["prefill", "none", "one", "two"])
@pytest.mark.parametrize(
    ("warper", "shortlist", "draft_input"),
    [("temperature", 3, "mask_embeddings"), ("top_p", V, "mask_embeddings"), ("all", 4, "uniform_noise")],
)
def test_a_fused_step_emits_the_targets_law(toy, warper, shortlist, accepted, draft_length, draft_input, monkeypatch):
    """Whether its drafts come from prefill or from a step that accepted none, one or two."""
    options = WARPERS[warper]
    decoder = decoder_for(toy, "fused", options, draft_input, shortlist)
    places = torch.tensor(list(itertools.product(range(shortlist), repeat=K)))
    prefix = [*PROMPT, 2]
    with torch.no_grad(), decoder.attached():
        force_draws(monkeypatch, places)
        force_verdict(monkeypatch, [2], 0)
        state = decoder.prefill([PROMPT] * len(places))
        if accepted is not None:
            given = [4, 1]
            state.drafts = torch.tensor([given] * len(places))
            force_verdict(monkeypatch, [*given[:accepted], 3, *[0] * (K - accepted)], accepted)
            decoder.step(state)
            prefix += [*given[:accepted], 3]
        monkeypatch.undo()
        assert state.bonus.tolist() == prefix[-1:] * len(places)
        state.draft_length = torch.full((len(places),), draft_length)
        drafts = state.drafts.clone()
        ((p, q, verified, length),) = recorded_step(decoder, state, monkeypatch)
    assert torch.equal(verified, drafts)
    for verification in VERIFICATIONS:
        emitted = emitted_law(p, q, drafts, length, weights_of(q, drafts), verification)
        assert max(len(tokens) for tokens, weight in emitted.items() if weight > 0) <= draft_length + 1
        assert_same_law(extended(toy, emitted, prefix, K + 1, options), joint_law(toy, prefix, K + 1, options))


@pytest.mark.parametrize(
    ("warper", "shortlist", "draft_input"), [("temperature", 3, "uniform_noise"), ("all", 4, "mask_embeddings")]
)
def test_a_two_pass_round_emits_the_targets_law(toy, warper, shortlist, draft_input, monkeypatch):
    options = WARPERS[warper]
    decoder = decoder_for(toy, "two_pass", options, draft_input, shortlist)
    rows = torch.tensor(list(itertools.product(range(V), *[range(shortlist)] * K)))
    first, places = rows[:, 0], rows[:, 1:]
    with torch.no_grad(), decoder.attached():
        force_verdict(monkeypatch, [2], 0)
        state = decoder.prefill([PROMPT] * len(rows))
        force_draws(monkeypatch, places)
        (p_first, *_), (p, q, drafts, length) = recorded_step(decoder, state, monkeypatch, first=first)
    found: dict[tuple[int, ...], float] = {}
    for token in range(V):
        mine, weight = first == token, float(p_first[0, 0, token])
        weights = [weight * one for one in weights_of(q[mine], drafts[mine])]
        for key, value in emitted_law(p[mine], q[mine], drafts[mine], length[mine], weights).items():
            found[(token, *key)] = found.get((token, *key), 0.0) + value
    prefix = [*PROMPT, 2]
    assert_same_law(extended(toy, found, prefix, K + 2, options), joint_law(toy, prefix, K + 2, options))


@pytest.mark.parametrize("warper", ["temperature", "all"])
def test_a_fused_step_with_noise_and_no_head_emits_the_targets_law(toy, warper, monkeypatch):
    options = WARPERS[warper]
    decoder = decoder_for(toy, "fused", options, "uniform_noise", V, with_head=False)
    drafts = torch.tensor(list(itertools.product(range(V), repeat=K)))
    with torch.no_grad(), decoder.attached():
        force_verdict(monkeypatch, [2], 0)
        draw = TokenLaw.draw
        monkeypatch.setattr(TokenLaw, "draw", lambda self, logits: (drafts, draw(self, logits)[1]))
        state = decoder.prefill([PROMPT] * len(drafts))
        monkeypatch.undo()
        ((p, q, given, length),) = recorded_step(decoder, state, monkeypatch)
    emitted = emitted_law(p, q, given, length, weights_of(q, given))
    prefix = [*PROMPT, 2]
    assert_same_law(extended(toy, emitted, prefix, K + 1, options), joint_law(toy, prefix, K + 1, options))


@pytest.fixture(scope="module")
def thin():
    return thin_model()


@pytest.fixture(scope="module")
def law_of_four(thin):
    return {name: joint_law(thin, PROMPT, 4, WARPERS[name]) for name in ("temperature", "all")}


def sample_counts(model, mode: str, warper: dict) -> Counter:
    out = model.generate([PROMPT], max_new_tokens=4, mode=mode, seed=0, num_return_sequences=2500, **warper)
    return Counter(tuple(tokens) for tokens in out.token_ids)


@pytest.mark.parametrize(
    ("mode", "warper", "draft_input"),
    [
        ("fused", "temperature", "mask_embeddings"),
        ("fused", "all", "uniform_noise"),
        ("two_pass", "temperature", "uniform_noise"),
        ("two_pass", "all", "mask_embeddings"),
    ],
)
def test_generate_samples_the_targets_law(thin, law_of_four, mode, warper, draft_input):
    ours = SelfSpeculativeModel(thin, None, adapter_for(thin, draft_input, 3))
    assert chi_square_z(sample_counts(ours, mode, WARPERS[warper]), law_of_four[warper]) < Z_LIMIT


def test_the_chi_square_notices_a_law_that_verification_was_not_told_of(thin, law_of_four, monkeypatch):
    """Drafts drawn in turn, but reported as if each were drawn without knowing the one before."""
    from pardec.decoding import drafting

    in_turn = drafting.draft_in_turn

    def untold(head, law, logits, *others):
        return in_turn(head, law, logits, *others)[0], law.probs(logits)

    monkeypatch.setattr(drafting, "draft_in_turn", untold)
    ours = SelfSpeculativeModel(thin, None, adapter_for(thin, "mask_embeddings", 3))
    assert chi_square_z(sample_counts(ours, "fused", WARPERS["temperature"]), law_of_four["temperature"]) > 2 * Z_LIMIT
