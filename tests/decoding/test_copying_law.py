"""With copied tokens sampled output follows the target's law: whole steps enumerated, and by chi-square."""

import itertools
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from sampling_oracle import WARPERS, Z_LIMIT, assert_same_law, chi_square_z, joint_law, verdict_law
from tiny_models import make_adapter, tiny_model

from pardec.decoding import step as step_module
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw, make_warpers
from pardec.decoding.step import Decoder
from pardec.decoding.verify import VERIFICATIONS, Verdict
from pardec.model import SelfSpeculativeModel
from pardec.target.forward import TargetModel

V, BONUS = 3, 0
# "2 0" has been followed by 1 and "0 1" by 2; nothing follows "0 2", so behind a draft 2 nothing is copied
PROMPT = [1, 2, 2, 0, 1, 2, 1, 1, 2]
PREFIX = [*PROMPT, BONUS]


@pytest.fixture(scope="module")
def toy():
    return tiny_model("llama", vocab_size=V, seed=3)


@dataclass
class Plan:
    """Every way that chance may fall in a step, one in each row of a batch, and the laws that weigh them.

    Attributes:
        exact: what two_pass takes from the target before it drafts, shape [B].
        drafts: shape [B, K].
        num_accepted: drafts that stand, shape [B].
        bonus: what is drawn behind them, shape [B].
        drawn: from the law of each row behind, shape [B, W].
        laws: what verification of drafts was given.
        behind: the laws of what is drawn, each of shape [B, W, V].
    """

    exact: torch.Tensor
    drafts: torch.Tensor
    num_accepted: torch.Tensor
    bonus: torch.Tensor
    drawn: torch.Tensor
    laws: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    behind: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of_all(cls, K: int, L: int, *, two_pass: bool) -> "Plan":
        tokens, num_drawn = range(V), K + L + (K == 0)  # copies alone are drawn with the token behind the bonus
        parts = ([tokens] * two_pass, [tokens] * K, [range(K + 1), tokens] if K else [], [tokens] * num_drawn)
        rows = torch.tensor(list(itertools.product(*itertools.chain(*parts))))
        columns = rows.split([len(part) for part in parts], dim=1)
        none = rows.new_zeros(len(rows))
        exact = columns[0][:, 0] if two_pass else none
        accepted, bonus = columns[2].unbind(1) if K else (none, none)
        return cls(exact, columns[1], accepted, bonus, columns[3])

    def verify_sample(self, p, q, drafts, draft_length, *, verification="token", generator=None) -> Verdict:
        B, K = drafts.shape
        self.laws.append((p.clone(), q.clone(), drafts.clone(), draft_length.clone(), verification))
        if K == 0:
            return Verdict(self.exact[:, None], torch.zeros(B, dtype=torch.long))
        tokens = torch.cat([drafts, drafts[:, :1]], dim=1).scatter(1, self.num_accepted[:, None], self.bonus[:, None])
        return Verdict(tokens, self.num_accepted)

    def sample(self, law: TokenLaw, logits: torch.Tensor, prefix_of=None) -> torch.Tensor:
        self.behind.append(law.probs(logits))
        return self.drawn

    def weights(self) -> torch.Tensor:
        """The probability of each row, shape [B], float64."""
        chance = self.behind[0].double().gather(2, self.drawn[:, :, None]).prod(dim=1)[:, 0]
        for p, q, drafts, draft_length, verification in self.laws:
            K = drafts.shape[1]
            if K == 0:
                chance = chance * p[:, 0].gather(1, self.exact[:, None])[:, 0]
                continue
            chance = chance * q.double().gather(2, drafts[:, :, None]).prod(dim=1)[:, 0]
            law = verdict_law(p, q, drafts, draft_length, verification)
            places = torch.arange(len(chance))
            chance = chance * law.ends[places, self.num_accepted]
            chance = chance * law.bonus[places, self.num_accepted, self.bonus]
        return chance


def cut(law: dict[tuple[int, ...], float], eos: int | None) -> dict[tuple[int, ...], float]:
    """Every sequence up to its first EOS token."""
    out: Counter = Counter()
    for tokens, probability in law.items():
        out[tokens[: tokens.index(eos) + 1] if eos in tokens else tokens] += probability
    return out


def decoder_for(model, mode: str, K: int, L: int, warper: dict, verification: str, eos: int | None) -> Decoder:
    law, target = TokenLaw(False, tuple(make_warpers(**warper))), TargetModel.wrap(model)
    eos_ids = torch.tensor([] if eos is None else [eos], dtype=torch.long)
    forward = RowForward(target, make_adapter(model, K).mask_embeddings.double() * 3 if K else None)
    return Decoder(forward, mode, K, law, 16, eos_ids, verification=verification, copy_tokens=L)


def a_step(decoder: Decoder, plan: Plan, draft_length: int, monkeypatch):
    """The tokens that a step emits in each row, and how many of them were copied."""
    B = len(plan.drawn)
    with torch.no_grad():
        state = decoder.prefill([PROMPT] * B)
    state.bonus, state.drafts = torch.full((B,), BONUS), plan.drafts
    state.output[:, 0], state.num_new[:], state.room[:], state.done[:] = BONUS, 1, 15, False
    state.write(state.lengths, state.bonus[:, None], torch.arange(1))
    state.draft_length = torch.full((B,), draft_length)
    draw = TokenLaw.draw
    monkeypatch.setattr(step_module, "verify_sample", plan.verify_sample)
    monkeypatch.setattr(TokenLaw, "sample", lambda law, *given: plan.sample(law, *given))
    monkeypatch.setattr(TokenLaw, "draw", lambda law, logits: (plan.drafts, draw(law, logits)[1]))
    with torch.no_grad():
        decoder.step(state)
    monkeypatch.undo()
    outputs = [row[1:n] for row, n in zip(state.output.tolist(), state.num_new.tolist(), strict=True)]
    return outputs, state.num_copied.tolist()


@pytest.mark.parametrize("eos", [None, 1, 2])
@pytest.mark.parametrize("warper", ["temperature", "all", "top_p"])
@pytest.mark.parametrize(
    ("mode", "K", "L", "draft_length", "verification"),
    [
        ("fused", 0, 2, 0, "token"),
        *[("fused", 1, 2, length, "token") for length in (0, 1)],
        *[("fused", 2, 1, length, verification) for length in (0, 1, 2) for verification in VERIFICATIONS],
        ("two_pass", 1, 1, 1, "token"),
    ],
)
def test_a_step_with_copies_emits_the_targets_law(
    toy, mode, K, L, draft_length, verification, warper, eos, monkeypatch
):
    options = WARPERS[warper]
    decoder = decoder_for(toy, mode, K, L, options, verification, eos)
    plan = Plan.of_all(K, L, two_pass=mode == "two_pass")
    outputs, copied = a_step(decoder, plan, draft_length, monkeypatch)
    weights = plan.weights()
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
    assert sum(w for w, n in zip(weights.tolist(), copied, strict=True) if n) > 1e-3  # some copies are accepted
    longest, emitted = K + L + 1 + (mode == "two_pass"), Counter()
    for tokens, weight in zip(outputs, weights.tolist(), strict=True):
        emitted[tuple(tokens)] += weight
    found: Counter = Counter()
    for tokens, probability in emitted.items():
        ended = eos is not None and eos in tokens
        left = 0 if ended else longest - len(tokens)
        for rest, p in joint_law(toy, PREFIX + list(tokens), left, options).items():
            found[tokens + rest] += probability * p
    assert_same_law(cut(found, eos), cut(joint_law(toy, PREFIX, longest, options), eos))


# ---------------------------------------------------------------------- the public API, by chi-square


@pytest.fixture(scope="module")
def law_of_four(toy):
    return {name: joint_law(toy, PROMPT, 4, WARPERS[name]) for name in ("temperature", "all")}


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
def test_generate_samples_the_targets_law_with_copies(toy, law_of_four, warper, options):
    counts, num_copied = sampled(SelfSpeculativeModel(toy, None, make_adapter(toy, 2, lora_rank=2)), warper, **options)
    assert num_copied > 100
    assert chi_square_z(counts, law_of_four[warper]) < Z_LIMIT


def test_the_chi_square_notices_a_copy_that_is_taken_unseen(toy, law_of_four, monkeypatch):
    verify = step_module.verify_copies

    def credulous(verdict, target_tokens, candidates, draft_length, length):
        tokens, reached = verdict.tokens.clone(), (verdict.num_accepted == draft_length) & (length > draft_length)
        tokens[reached, draft_length[reached]] = candidates[reached, draft_length[reached]]
        return verify(Verdict(tokens, verdict.num_accepted), target_tokens, candidates, draft_length, length)

    monkeypatch.setattr(step_module, "verify_copies", credulous)
    ours = SelfSpeculativeModel(toy, None, make_adapter(toy, 2, lora_rank=2))
    assert chi_square_z(sampled(ours, "temperature")[0], law_of_four["temperature"]) > 2 * Z_LIMIT
