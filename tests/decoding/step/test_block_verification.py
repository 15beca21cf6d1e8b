"""Block verification: its law by enumeration over whole steps and by chi-square, and that more drafts stand by it.

What it is asked of abstract laws in `test_verify.py`, here it is asked with up to four drafts, in the steps of a model.
"""

import itertools
import math
from collections import Counter

import pytest
import sampling_oracle
import torch
from sampling_oracle import (
    PROMPT,
    WARPERS,
    Z_LIMIT,
    assert_same_law,
    chi_square_z,
    emitted_law,
    joint_law,
    recorded_step,
    thin_model,
    verdict_law,
)
from tiny_models import make_adapter, tiny_model

from pardec.decoding import verifier as verifier_module
from pardec.decoding import verify
from pardec.decoding.drafting import HeadDrafter
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw, make_warpers
from pardec.decoding.step import Decoder
from pardec.decoding.verify import VERIFICATIONS, Verdict, verify_sample
from pardec.model import SelfSpeculativeModel
from pardec.target.forward import TargetModel

V, BONUS = 4, 2
PREFIX = [*[token % V for token in PROMPT], BONUS]
NO_EOS = torch.empty(0, dtype=torch.long)


@pytest.fixture(scope="module")
def toy():
    return tiny_model("llama", vocab_size=V, seed=3)


def toy_decoder(model, mode: str, K: int, warper: dict, *, with_head: bool = False, eos=NO_EOS) -> Decoder:
    law, target = TokenLaw(False, tuple(make_warpers(**warper))), TargetModel.wrap(model)
    adapter = make_adapter(model, K, head_width=3 if with_head else 0, shortlist=3)
    head = HeadDrafter.of(adapter, target)
    forward = RowForward(target, adapter.mask_embeddings.double() * 3, tap=head and head.tap)
    return Decoder(forward, mode, K, law, 16, eos, head=head, verification="block")


def all_drafts(K: int, num_tokens: int = V) -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(num_tokens), repeat=K)))


def weights_of(q: torch.Tensor, drafts: torch.Tensor) -> list[float]:
    weights = [math.prod(float(q[b, k, d]) for k, d in enumerate(row)) for b, row in enumerate(drafts.tolist())]
    assert sum(weights) == pytest.approx(1, abs=1e-5)  # the batch holds all drafts
    return weights


def continued(emitted: dict, joint: dict) -> dict:
    """The law of as many tokens as `joint` has when every shorter emission goes on by it."""
    mass: Counter = Counter()
    for tokens, probability in joint.items():
        for n in range(1, len(tokens) + 1):
            mass[tokens[:n]] += probability
    assert all(probability < 1e-7 for tokens, probability in emitted.items() if mass[tokens] == 0)
    out: Counter = Counter()
    for tokens, probability in joint.items():
        for n in range(1, len(tokens) + 1):
            out[tokens] += emitted.get(tokens[:n], 0.0) * probability / mass[tokens[:n]]
    return out


# ---------------------------------------------------------------------- whole steps, enumerated


def a_fused_step(toy, K: int, draft_length: int, warper: dict, monkeypatch):
    """What verification is given by one step from every draft, and the law of the drafts."""
    decoder, drafts = toy_decoder(toy, "fused", K, warper), all_drafts(K)
    with torch.no_grad():
        state = decoder.prefill([PREFIX[:-1]] * len(drafts))
    state.bonus = torch.full((len(drafts),), BONUS)
    state.drafts, state.draft_length = drafts, torch.full((len(drafts),), draft_length)
    ((p, q, given, length),) = recorded_step(decoder, state, monkeypatch)
    assert torch.equal(given, drafts)
    return p, q, drafts, length


@pytest.mark.parametrize("warper", list(WARPERS))
@pytest.mark.parametrize(("K", "draft_length"), [(K, n) for K in range(1, 5) for n in range(K + 1)])
def test_a_fused_step_emits_the_targets_law(toy, K, draft_length, warper, monkeypatch):
    p, q, drafts, length = a_fused_step(toy, K, draft_length, WARPERS[warper], monkeypatch)
    emitted = emitted_law(p, q, drafts, length, weights_of(q, drafts), "block")
    assert max(len(tokens) for tokens, probability in emitted.items() if probability > 0) == draft_length + 1
    joint = joint_law(toy, PREFIX, K + 1, WARPERS[warper])
    assert_same_law(continued(emitted, joint), joint)


def as_if_judged_one_by_one(monkeypatch, module) -> None:
    """Published code once accepted by block verification and drew from norm(max(0, p - q)): as many, by another law."""
    own = verify.bonus_law
    monkeypatch.setattr(module, "bonus_law", lambda p, q, rejected, reach: own(p, q, rejected))


@pytest.mark.parametrize("K", [2, 3])
def test_a_residual_that_knows_nothing_of_the_drafts_before_is_noticed(K, monkeypatch):
    toy = tiny_model("llama", vocab_size=V, seed=6)
    p, q, drafts, length = a_fused_step(toy, K, K, WARPERS["temperature"], monkeypatch)
    weights = weights_of(q, drafts)
    right = emitted_law(p, q, drafts, length, weights, "block")
    as_if_judged_one_by_one(monkeypatch, sampling_oracle)
    wrong = emitted_law(p, q, drafts, length, weights, "block")
    assert expected_accepted(wrong) == pytest.approx(expected_accepted(right), abs=1e-6)
    joint = joint_law(toy, PREFIX, K + 1, WARPERS["temperature"])
    found = continued(wrong, joint)
    assert max(abs(found[tokens] - joint[tokens]) for tokens in joint) > 1e-3


def expected_accepted(emitted: dict) -> float:
    return sum((len(tokens) - 1) * probability for tokens, probability in emitted.items())


@pytest.mark.parametrize("K", range(1, 5))
def test_more_drafts_stand_than_one_by_one_and_as_many_as_theory_says(toy, K, monkeypatch):
    """E = E_{x~p} sum_k sum_v min(a_{k-1} p(v), r_{k-1} q(v)) with r_k = prod q / p and a_k = min of r_0 .. r_k."""
    warper = WARPERS["temperature"]
    p, q, drafts, length = a_fused_step(toy, K, K, warper, monkeypatch)
    found = {
        verification: expected_accepted(emitted_law(p, q, drafts, length, weights_of(q, drafts), verification))
        for verification in VERIFICATIONS
    }
    laws = {tuple(draft[:k]): p[i, k].double() for i, draft in enumerate(drafts.tolist()) for k in range(K)}
    expected = 0.0
    for k in range(K):
        for x in itertools.product(range(V), repeat=k):
            weight, reach = 1.0, [1.0]
            for i, token in enumerate(x):
                weight *= float(laws[x[:i]][token])
                reach.append(reach[-1] * float(q[0, i, token]) / float(laws[x[:i]][token]))
            expected += weight * float(torch.minimum(min(reach) * laws[x], reach[-1] * q[0, k].double()).sum())
    assert found["block"] == pytest.approx(expected, abs=1e-5)
    assert found["block"] > found["token"] + 1e-3 if K > 1 else found["block"] == pytest.approx(found["token"])


@pytest.mark.parametrize(("K", "warper"), [(1, "temperature"), (2, "all"), (3, "temperature"), (3, "top_p")])
def test_a_two_pass_round_emits_the_targets_law(toy, K, warper, monkeypatch):
    decoder, rows = toy_decoder(toy, "two_pass", K, WARPERS[warper]), all_drafts(K + 1)
    first, drafts = rows[:, 0], rows[:, 1:]
    with torch.no_grad():
        state = decoder.prefill([PREFIX[:-1]] * len(rows))
    state.bonus = torch.full((len(rows),), BONUS)
    draw = TokenLaw.draw
    monkeypatch.setattr(TokenLaw, "draw", lambda self, logits: (drafts, draw(self, logits)[1]))
    (p_first, *_), (p, q, given, length) = recorded_step(decoder, state, monkeypatch, first=first)
    assert torch.equal(given, drafts)
    found: Counter = Counter()
    for token in range(V):
        mine, weight = first == token, float(p_first[0, 0, token])
        emitted = emitted_law(p[mine], q[mine], drafts[mine], length[mine], weights_of(q[mine], drafts[mine]), "block")
        for tokens, probability in emitted.items():
            found[(token, *tokens)] += weight * probability
    joint = joint_law(toy, PREFIX, K + 2, WARPERS[warper])
    assert_same_law(continued(found, joint), joint)


@pytest.mark.parametrize("draft_length", range(4))
@pytest.mark.parametrize("warper", ["temperature", "all"])
def test_a_step_whose_drafts_know_each_other_emits_the_targets_law(toy, warper, draft_length, monkeypatch):
    """With a sampler head, which scores three tokens of each row."""
    K = 3
    decoder, places = toy_decoder(toy, "fused", K, WARPERS[warper], with_head=True), all_drafts(K, num_tokens=3)
    draw, calls = TokenLaw.draw, itertools.count()

    def forced(self, scores):
        j = next(calls) % K
        return places[:, j : j + 1], draw(self, scores)[1]

    monkeypatch.setattr(TokenLaw, "draw", forced)
    bonus = torch.full((len(places), 1), BONUS)
    monkeypatch.setattr(verifier_module, "verify_sample", lambda *args, generator=None: Verdict(bonus, bonus[:, 0] * 0))
    with torch.no_grad(), decoder.attached():
        state = decoder.prefill([PREFIX[:-1]] * len(places))
        monkeypatch.undo()
        state.draft_length = torch.full((len(places),), draft_length)
        ((p, q, drafts, length),) = recorded_step(decoder, state, monkeypatch)
    weights = weights_of(q, drafts)
    assert max(weights) < 0.99
    joint = joint_law(toy, PREFIX, K + 1, WARPERS[warper])
    assert_same_law(continued(emitted_law(p, q, drafts, length, weights, "block"), joint), joint)


@pytest.mark.parametrize(("K", "draft_length"), [(1, 1), (2, 2), (3, 2), (3, 3)])
def test_with_an_eos_inside_a_step_still_emits_the_targets_law(toy, K, draft_length, monkeypatch):
    """Every verdict is put through the step's own commit, which ends a text at the EOS token."""
    eos, warper = 1, WARPERS["temperature"]
    p, q, drafts, length = a_fused_step(toy, K, draft_length, warper, monkeypatch)
    law, outcomes = verdict_law(p, q, drafts, length, "block"), []
    for row, weight in enumerate(weights_of(q, drafts)):
        for n, end in enumerate(law.ends[row].tolist()):
            for token, share in enumerate(law.bonus[row, n].tolist()):
                tokens = [*drafts[row, :n].tolist(), token]
                outcomes.append((tokens + [0] * (K - n), n, weight * end * share))
    decoder = toy_decoder(toy, "fused", K, warper, eos=torch.tensor([eos]))
    verdict = Verdict(torch.tensor([tokens for tokens, _, _ in outcomes]), torch.tensor([n for _, n, _ in outcomes]))
    with torch.no_grad():
        state = decoder.prefill([PREFIX[:-1]] * len(outcomes))
        state.done, state.num_new = torch.zeros_like(state.done), torch.zeros_like(state.num_new)
        state.room = torch.full_like(state.room, K + 1)
        monkeypatch.setattr(verifier_module, "verify_sample", lambda *args, **settings: verdict)
        decoder.step(state)
    emitted: Counter = Counter()
    for row, n, (_, _, probability) in zip(state.output.tolist(), state.num_new.tolist(), outcomes, strict=True):
        emitted[tuple(row[:n])] += probability
    assert any(tokens.index(eos) < len(tokens) - 1 for tokens, _, p in outcomes if p > 0 and eos in tokens[:-1])
    joint = joint_law(toy, PREFIX, K + 1, warper)
    expected: Counter = Counter()
    found: Counter = Counter()
    for tokens, probability in joint.items():
        expected[cut_at(tokens, eos)] += probability
    open_ones = {tokens: probability for tokens, probability in emitted.items() if eos not in tokens}
    for tokens, probability in continued(open_ones, joint).items():
        found[cut_at(tokens, eos)] += probability
    for tokens, probability in emitted.items():
        if eos in tokens:
            found[tokens] += probability
    assert_same_law(found, expected)


def cut_at(tokens: tuple[int, ...], eos: int) -> tuple[int, ...]:
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


# ---------------------------------------------------------------------- the verdict


def random_case(K: int, num_tokens: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(1, n, num_tokens, generator=generator).softmax(-1) for n in (K + 1, K))
    return p, q, torch.randint(num_tokens, (1, K), generator=generator)


@pytest.mark.parametrize("draft_length", [0, 2, 4])
def test_verdicts_are_drawn_by_their_law(draft_length):
    """The same drafts again and again: how many stand and which token follows, by chi-square."""
    K, B = 4, 40_000
    p, q, drafts = random_case(K, 5, seed=1670)
    length = torch.tensor([draft_length])
    law = verdict_law(p, q, drafts, length, "block")
    expected = {
        (n, token): end * share
        for n, end in enumerate(law.ends[0].tolist())
        for token, share in enumerate(law.bonus[0, n].tolist())
        if end * share > 0
    }
    many = (p.expand(B, -1, -1), q.expand(B, -1, -1), drafts.expand(B, -1), length.expand(B))
    verdict = verify_sample(*many, verification="block", generator=torch.Generator().manual_seed(0))
    bonus = verdict.tokens.gather(1, verdict.num_accepted[:, None])[:, 0]
    counts = Counter(zip(verdict.num_accepted.tolist(), bonus.tolist(), strict=True))
    assert len({n for n, _ in expected}) == draft_length + 1
    assert chi_square_z(counts, expected) < Z_LIMIT
    for row in range(100):
        n = int(verdict.num_accepted[row])
        assert torch.equal(verdict.tokens[row, :n], drafts[0, :n])


def test_a_draft_that_falls_does_not_stop_a_later_one():
    """Where r comes back to 1, the drafts before it stand again."""
    p = torch.tensor([[[0.2, 0.8], [0.9, 0.1], [0.5, 0.5]]])
    q = torch.tensor([[[0.8, 0.2], [0.2, 0.8]]])
    drafts, length = torch.tensor([[0, 0]]), torch.tensor([2])
    _, reach, _ = verify.block_accept_probability(p, q, drafts, length)
    assert reach[0].tolist() == pytest.approx([1, 0.25, 1])
    verdicts = [
        verify_sample(p, q, drafts, length, verification="block", generator=torch.Generator().manual_seed(seed))
        for seed in range(50)
    ]
    assert all(verdict.num_accepted.tolist() == [2] for verdict in verdicts)


def test_drafts_of_nan_are_none():
    """As numbers that overflow leave them: what stands before them is judged as if they had never been drafted."""
    K = 4
    for seed in range(10):
        p, q, drafts = random_case(K, 5, seed)
        for first in range(K):
            broken = q.clone()
            broken[:, first:] = torch.nan
            expected = verdict_law(p, q, drafts, torch.tensor([first]), "block")
            accept, _, length = verify.block_accept_probability(p, broken, drafts, torch.tensor([K]))
            assert torch.equal(accept, expected.accept)
            assert length.tolist() == [first]
            verdicts = [
                verify_sample(p, law, drafts, n, verification="block", generator=torch.Generator().manual_seed(seed))
                for law, n in ((q, torch.tensor([first])), (broken, torch.tensor([K])))
            ]
            assert verdicts[0].num_accepted.tolist() == verdicts[1].num_accepted.tolist()
            n = int(verdicts[0].num_accepted)
            assert torch.equal(verdicts[0].tokens[:, : n + 1], verdicts[1].tokens[:, : n + 1])


# ---------------------------------------------------------------------- the public API, by chi-square


@pytest.fixture(scope="module")
def thin():
    return thin_model(V)


def sample_counts(thin, mode: str, warper: dict) -> Counter:
    ours = SelfSpeculativeModel(thin, None, make_adapter(thin, 3, lora_rank=2))
    options = {"max_new_tokens": 5, "num_return_sequences": 4000, "seed": 0, "verification": "block"}
    out = ours.generate([PREFIX], mode=mode, **options, **warper)
    return Counter(tuple(tokens) for tokens in out.token_ids)


@pytest.mark.parametrize("mode", ["two_pass", "fused"])
@pytest.mark.parametrize("warper", ["temperature", "all"])
def test_generate_samples_the_targets_law(thin, mode, warper):
    eos = 3
    thin.generation_config.eos_token_id = eos
    try:
        counts = sample_counts(thin, mode, WARPERS[warper])
    finally:
        thin.generation_config.eos_token_id = None
    law: Counter = Counter()
    for tokens, probability in joint_law(thin, PREFIX, 5, WARPERS[warper]).items():
        law[cut_at(tokens, eos)] += probability
    assert any(len(tokens) < 5 for tokens in counts)
    assert chi_square_z(counts, law) < Z_LIMIT


@pytest.mark.parametrize("right", [True, False])
def test_the_chi_square_notices_the_residual_of_drafts_that_are_judged_one_by_one(thin, right, monkeypatch):
    """Where the second draft often falls behind a first one that is likelier in q than in p."""
    laws = torch.tensor([[0.5, 0.5, 0, 0], [0, 0.125, 0.4, 0.475]])

    def draw(self, logits):
        q = laws.expand(logits.shape[0], -1, -1).contiguous()
        return verify.sample_from(q, self.generator), q

    monkeypatch.setattr(TokenLaw, "draw", draw)
    if not right:
        as_if_judged_one_by_one(monkeypatch, verify)
    flat, ours = {"temperature": 20.0}, SelfSpeculativeModel(thin, None, make_adapter(thin, 2))
    options = {"max_new_tokens": 3, "num_return_sequences": 12_000, "seed": 0, "verification": "block"}
    out = ours.generate([PREFIX], **options, **flat)
    law = joint_law(thin, PREFIX, 3, {"top_k": None, "top_p": None, "min_p": None, **flat})
    z = chi_square_z(Counter(tuple(tokens) for tokens in out.token_ids), law)
    assert z < Z_LIMIT if right else z > 3 * Z_LIMIT


def test_greedy_tokens_and_streams_know_no_difference(toy):
    ours = SelfSpeculativeModel(toy, None, make_adapter(toy, 3, lora_rank=2))
    found = [ours.generate([PREFIX], max_new_tokens=20, verification=name) for name in VERIFICATIONS]
    assert found[0].token_ids == found[1].token_ids
    assert found[0].counts == found[1].counts
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 1, "verification": "block"}
    expected = ours.generate([PREFIX], **options).token_ids[0]
    assert [token for chunk in ours.stream(PREFIX, **options) for token in chunk.token_ids] == expected
