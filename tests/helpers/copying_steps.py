"""A step with copied tokens in which chance falls every way that it can, and what each way weighs."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from sampling_oracle import verdict_law
from tiny_models import make_adapter

from pardec.decoding import verifier as verifier_module
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw, make_warpers
from pardec.decoding.step import Decoder
from pardec.decoding.verify import Verdict
from pardec.target.forward import TargetModel


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
    def of_all(cls, K: int, L: int, *, two_pass: bool, vocab_size: int) -> "Plan":
        tokens, num_drawn = (
            range(vocab_size),
            K + L + (K == 0),
        )  # copies alone are drawn with the token behind the bonus
        parts = ([tokens] * two_pass, [tokens] * K, [range(K + 1), tokens] if K else [], [tokens] * num_drawn)
        rows = torch.tensor(list(itertools.product(*itertools.chain(*parts))))
        columns = rows.split([len(part) for part in parts], dim=1)
        none = rows.new_zeros(len(rows))
        exact = columns[0][:, 0] if two_pass else none
        accepted, bonus = columns[2].unbind(1) if K else (none, none)
        return cls(exact, columns[1], accepted, bonus, columns[3])

    @property
    def of_pairs(self) -> "Plan":
        """Every pair of these ways, for two rows one behind the other."""
        pairs = torch.tensor(list(itertools.product(range(len(self.drawn)), repeat=2))).flatten()
        columns = (self.exact, self.drafts, self.num_accepted, self.bonus, self.drawn)
        return Plan(*(column[pairs] for column in columns))

    def verify_sample(self, p, q, drafts, draft_length, *, verification="token", generator=None) -> Verdict:
        B, K = drafts.shape
        self.laws.append((p.clone(), q.clone(), drafts.clone(), draft_length.clone(), verification))
        if K == 0:
            return Verdict(self.exact[:, None], torch.zeros(B, dtype=torch.long))
        tokens = torch.cat([drafts, drafts[:, :1]], dim=1).scatter(1, self.num_accepted[:, None], self.bonus[:, None])
        return Verdict(tokens, self.num_accepted)

    def sample(self, law: TokenLaw, logits: torch.Tensor, prefix_of=None) -> torch.Tensor:
        self.behind.append(law.probs(logits))
        return self.drawn[:, : logits.shape[1]]  # fewer where nothing is copied

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


def cut(law: Mapping[tuple[int, ...], float], eos: int | None) -> Counter:
    """Every sequence up to its first EOS token."""
    out: Counter = Counter()
    for tokens, probability in law.items():
        out[tokens[: tokens.index(eos) + 1] if eos in tokens else tokens] += probability
    return out


def decoder_for(model, mode: str, K: int, L: int, warper: dict, verification: str, eos: int | None) -> Decoder:
    """Samples, with drafts from random mask embeddings."""
    law, target = TokenLaw(False, tuple(make_warpers(**warper))), TargetModel.wrap(model)
    eos_ids = torch.tensor([] if eos is None else [eos], dtype=torch.long)
    forward = RowForward(target, make_adapter(model, K).mask_embeddings.double() * 3 if K else None)
    return Decoder(forward, mode, K, law, 16, eos_ids, verification=verification, copy_tokens=L)


def a_step(
    decoder: Decoder,
    texts: Sequence[list[int]],
    plan: Plan,
    draft_length: int,
    monkeypatch: pytest.MonkeyPatch,
    sources: torch.Tensor | None = None,
) -> tuple[list[tuple[int, ...]], list[int]]:
    """The tokens that a step emits in each row, and how many of them were copied.

    Args:
        texts: of each row before, the bonus token last.
        plan: how chance falls.
        sources: texts that each row looks in; default as prefill has it.
    """
    B = len(texts)
    prompts = [text[:-1] for text in texts]
    with torch.no_grad():  # of one prompt only once
        same = all(prompt == prompts[0] for prompt in prompts)
        state = decoder.prefill(prompts[:1], repeats=B) if same else decoder.prefill(prompts)
    state.sources = state.sources if sources is None else sources
    state.bonus, state.drafts = torch.tensor([text[-1] for text in texts]), plan.drafts
    state.output[:, 0], state.num_new[:], state.room[:], state.done[:] = state.bonus, 1, 15, False
    state.write(state.lengths, state.bonus[:, None], torch.arange(1))
    state.draft_length = torch.full((B,), draft_length)
    draw = TokenLaw.draw
    monkeypatch.setattr(verifier_module, "verify_sample", plan.verify_sample)
    monkeypatch.setattr(TokenLaw, "sample", lambda law, *given: plan.sample(law, *given))
    monkeypatch.setattr(TokenLaw, "draw", lambda law, logits: (plan.drafts, draw(law, logits)[1]))
    with torch.no_grad():
        decoder.step(state)
    monkeypatch.undo()
    outputs = [tuple(row[1:n]) for row, n in zip(state.output.tolist(), state.num_new.tolist(), strict=True)]
    return outputs, state.num_copied.tolist()
