"""With copied tokens sampled output follows the target's law: whole steps enumerated, and by chi-square."""

from collections import Counter

import pytest
from copying_steps import Plan, a_step, cut, decoder_for
from covering import every_pair
from sampling_oracle import WARPERS, Z_LIMIT, assert_same_law, chi_square_z, joint_law, thin_model
from tiny_models import make_adapter, tiny_model

from pardec.decoding import verifier as verifier_module
from pardec.decoding.verify import VERIFICATIONS, Verdict
from pardec.model import SelfSpeculativeModel

V, BONUS = 3, 0
# "2 0" has been followed by 1 and "0 1" by 2; nothing follows "0 2", so behind a draft 2 nothing is copied
PROMPT = [1, 2, 2, 0, 1, 2, 1, 1, 2]
PREFIX = [*PROMPT, BONUS]


@pytest.fixture(scope="module")
def toy():
    return tiny_model("llama", vocab_size=V, seed=3)


# mode, K, copied tokens, drafts of the step, verification
STEPS = [
    ("fused", 0, 2, 0, "token"),
    *[("fused", 1, 2, length, "token") for length in (0, 1)],
    *[("fused", 2, 1, length, verification) for length in (0, 1, 2) for verification in VERIFICATIONS],
    ("two_pass", 1, 1, 1, "token"),
]


@pytest.mark.parametrize(("step", "warper", "eos"), every_pair(STEPS, ["temperature", "all", "top_p"], [None, 1, 2]))
def test_a_step_with_copies_emits_the_targets_law(toy, step, warper, eos, monkeypatch):
    mode, K, L, draft_length, verification = step
    options = WARPERS[warper]
    decoder = decoder_for(toy, mode, K, L, options, verification, eos)
    plan = Plan.of_all(K, L, two_pass=mode == "two_pass", vocab_size=V)
    outputs, copied = a_step(decoder, [PREFIX] * len(plan.drawn), plan, draft_length, monkeypatch)
    weights = plan.weights()
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
    assert sum(w for w, n in zip(weights.tolist(), copied, strict=True) if n) > 1e-3  # some copies are accepted
    longest, emitted = K + L + 1 + (mode == "two_pass"), Counter()
    for tokens, weight in zip(outputs, weights.tolist(), strict=True):
        emitted[tokens] += weight
    found: Counter = Counter()
    for tokens, probability in emitted.items():
        ended = eos is not None and eos in tokens
        left = 0 if ended else longest - len(tokens)
        for rest, p in joint_law(toy, PREFIX + list(tokens), left, options).items():
            found[tokens + rest] += probability * p
    assert_same_law(cut(found, eos), cut(joint_law(toy, PREFIX, longest, options), eos))


# ---------------------------------------------------------------------- the public API, by chi-square


@pytest.fixture(scope="module")
def thin():
    return thin_model(V)


@pytest.fixture(scope="module")
def law_of_four(thin):
    return {name: joint_law(thin, PROMPT, 4, WARPERS[name]) for name in ("temperature", "all")}


def sampled(model, warper: str, eos: int | None = None, **options) -> tuple[Counter, int]:
    """Counts of four tokens, and accepted copies."""
    out = model.generate(
        [PROMPT], max_new_tokens=4, seed=1, num_return_sequences=3000, copy_tokens=2, **WARPERS[warper], **options
    )
    return Counter(map(tuple, out.token_ids)), out.stats.num_accepted_copies


@pytest.mark.parametrize(
    ("warper", "options"),
    [
        ("temperature", {"num_speculative_tokens": 0}),
        ("all", {"num_speculative_tokens": 0}),
        ("temperature", {}),
        ("all", {"block_lengths": (1, 2, 0, 1, 0)}),
        ("temperature", {"verification": "block"}),
        ("all", {"mode": "two_pass"}),
    ],
    ids=str,
)
def test_generate_samples_the_targets_law_with_copies(thin, law_of_four, warper, options):
    counts, num_copied = sampled(
        SelfSpeculativeModel(thin, None, make_adapter(thin, 2, lora_rank=2)), warper, **options
    )
    assert num_copied > 100
    assert chi_square_z(counts, law_of_four[warper]) < Z_LIMIT


def test_the_chi_square_notices_a_copy_that_is_taken_unseen(thin, law_of_four, monkeypatch):
    verify = verifier_module.verify_copies

    def credulous(verdict, target_tokens, candidates, length):
        tokens, place = verdict.tokens.clone(), verdict.num_accepted
        reached = length > place
        tokens[reached, place[reached]] = candidates[reached, place[reached]]
        return verify(Verdict(tokens, place), target_tokens, candidates, length)

    monkeypatch.setattr(verifier_module, "verify_copies", credulous)
    ours = SelfSpeculativeModel(thin, None, make_adapter(thin, 2, lora_rank=2))
    assert chi_square_z(sampled(ours, "temperature")[0], law_of_four["temperature"]) > 2 * Z_LIMIT
