"""The target's law of what is sampled, by enumeration and by chi-square.

Oracles: plain forwards of the model on every possible continuation, warpers written out as loops.
"""

import math
import weakref
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from tiny_models import tiny_model

from pardec.decoding import verifier as verifier_module
from pardec.decoding import verify
from pardec.decoding.step import Decoder
from pardec.decoding.verify import Verdict, accept_probability, block_accept_probability, bonus_law

V, K = 5, 2
PROMPT = [1, 3, 2, 4]
WARPERS = {
    "temperature": {"temperature": 0.7, "top_k": None, "top_p": None, "min_p": None},
    "top_k": {"temperature": 1.0, "top_k": 3, "top_p": None, "min_p": None},
    "top_p": {"temperature": 1.3, "top_k": None, "top_p": 0.8, "min_p": None},
    "min_p": {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": 0.25},
    "all": {"temperature": 0.9, "top_k": 4, "top_p": 0.9, "min_p": 0.1},
}


def thin_model(vocab_size: int = V):
    """For thousands of sequences at once: more layers and heads take longer and change nothing in what is drawn."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny_model("llama", vocab_size=vocab_size, seed=3, **sizes)


def warped(logits: torch.Tensor, temperature, top_k, top_p, min_p) -> list[float]:
    """The law after the warpers, in plain Python, in transformers' order."""
    scores = [float(x) / temperature for x in logits]
    alive = set(range(len(scores)))

    def law() -> dict[int, float]:
        best = max(scores[i] for i in alive)
        weights = {i: math.exp(scores[i] - best) for i in alive}
        total = sum(weights.values())
        return {i: w / total for i, w in weights.items()}

    if top_k is not None:
        alive = set(sorted(alive, key=lambda i: -scores[i])[:top_k])
    if top_p is not None:
        probs, mass, kept = law(), 0.0, set()
        for i in sorted(alive, key=lambda i: -probs[i]):
            if kept and mass >= top_p:
                break
            kept.add(i)
            mass += probs[i]
        alive = kept
    if min_p is not None:
        probs = law()
        alive = {i for i in alive if probs[i] >= min_p * max(probs.values())}
    probs = law()
    return [probs.get(i, 0.0) for i in range(len(scores))]


def joint_law(model, prefix: list[int], length: int, warper: dict) -> dict[tuple[int, ...], float]:
    """Probability of every continuation of `length` tokens."""
    laws, of_next = {(): 1.0}, known_laws(model, warper)
    for _ in range(length):
        unknown = [text for text in ((*prefix, *tokens) for tokens in laws) if text not in of_next]
        if unknown:
            for text, logits in zip(unknown, model(torch.tensor(unknown)).logits[:, -1], strict=True):
                of_next[text] = warped(logits, **warper)
        grown = {}
        for tokens, probability in laws.items():
            for token, p in enumerate(of_next[(*prefix, *tokens)]):
                if p * probability > 0:
                    grown[(*tokens, token)] = p * probability
        laws = grown
    return laws


_KNOWN = weakref.WeakKeyDictionary()


def known_laws(model, warper: dict) -> dict[tuple[int, ...], list[float]]:
    """Laws of the next token by text, to be filled: who enumerates asks again and again of the same few texts.

    They are those of the weights that the model has now: written to, replaced or joined by others, all is forgotten.
    """
    weights = [(weight.data_ptr(), weight._version) for weight in model.parameters()]
    if _KNOWN.get(model, ((), {}))[0] != weights:
        _KNOWN[model] = (weights, {})
    return _KNOWN[model][1].setdefault(tuple(warper.items()), {})


def recorded_step(decoder: Decoder, state, monkeypatch, first=None):
    """Runs one real step whose random choices are replaced, and returns what verification was given.

    `first` are the tokens that two_pass takes from the target before it drafts.
    """
    calls = []

    def recorder(target_probs, draft_probs, draft_tokens, draft_length, *, verification="token", generator=None):
        calls.append(tuple(t.clone() for t in (target_probs, draft_probs, draft_tokens, draft_length)))
        B, drafted = draft_tokens.shape
        tokens = torch.zeros(B, drafted + 1, dtype=torch.long)
        if drafted == 0:
            tokens[:, 0] = first
        return Verdict(tokens, torch.zeros(B, dtype=torch.long))

    monkeypatch.setattr(verifier_module, "verify_sample", recorder)
    with torch.no_grad():
        decoder.step(state)
    monkeypatch.undo()
    return calls


@dataclass(frozen=True)
class VerdictLaw:
    """The law of the verdict for given drafts, before any random number is drawn.

    Attributes:
        accept: what draft k is held against: where drafts are judged one by one, the probability that it is accepted
            once those before it are; shape [B, K].
        ends: probability that exactly k drafts are accepted, shape [B, K + 1], float64.
        bonus: law of the bonus token if exactly k drafts are accepted, shape [B, K + 1, V].
    """

    accept: torch.Tensor
    ends: torch.Tensor
    bonus: torch.Tensor


def verdict_law(target_probs, draft_probs, draft_tokens, draft_length, verification="token") -> VerdictLaw:
    """What `verify_sample` draws from, of all numbers of accepted drafts; the same arguments.

    After a rejection at k the bonus follows norm(max(0, r p - q)), where r = 1 for drafts that are judged one by one;
    at k = draft_length, where nothing was rejected, it follows p itself.
    """
    B, K = draft_tokens.shape
    verify._check_probs(target_probs, draft_probs, draft_tokens, draft_length)
    if verification == "block":
        accept, reach, draft_length = block_accept_probability(target_probs, draft_probs, draft_tokens, draft_length)
        # from the last draft down: the first that passes is the last that counts
        h = torch.cat([torch.ones(B, 1), accept], dim=1).double()
        later_fail = (1 - h.flip(1)).cumprod(dim=1).flip(1)
        ends = h * torch.cat([later_fail[:, 1:], torch.ones(B, 1)], dim=1)
        before = reach[:, :K, None]
    else:
        accept = accept_probability(target_probs[:, :K], draft_probs, draft_tokens) * verify._exists(draft_length, K)
        a = torch.cat([accept, torch.zeros(B, 1)], dim=1).double()
        reached = torch.cat([torch.ones(B, 1), a[:, :K].cumprod(dim=1)], dim=1)
        ends, before = reached * (1 - a), 1.0
    bonus = bonus_law(target_probs[:, :K], draft_probs, verify._exists(draft_length, K), before)
    return VerdictLaw(accept, ends, torch.cat([bonus, target_probs[:, K:]], dim=1))


def emitted_law(p, q, drafts, draft_length, weights, verification="token") -> dict[tuple[int, ...], float]:
    """Law of what a step emits: sums over all drafts, all acceptance counts and all bonus tokens."""
    law = verdict_law(p, q, drafts, draft_length, verification)
    total: dict[tuple[int, ...], float] = {}
    for row, weight in enumerate(weights):
        tokens = drafts[row].tolist()
        for n, (end, bonus) in enumerate(zip(law.ends[row].tolist(), law.bonus[row].tolist(), strict=True)):
            for token, share in enumerate(bonus):
                key = (*tokens[:n], token)
                total[key] = total.get(key, 0.0) + weight * end * share
    return total


def extended(model, emitted: dict[tuple[int, ...], float], prefix: list[int], length: int, warper) -> dict:
    """The law of `length` tokens when every shorter emission is continued by the target itself."""
    out: dict[tuple[int, ...], float] = {}
    for tokens, probability in emitted.items():
        if probability == 0:
            continue
        for rest, p in joint_law(model, prefix + list(tokens), length - len(tokens), warper).items():
            out[tokens + rest] = out.get(tokens + rest, 0.0) + probability * p
    return out


def assert_same_law(found: dict, expected: dict) -> None:
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    for key in found.keys() | expected.keys():
        assert abs(found.get(key, 0.0) - expected.get(key, 0.0)) <= 2e-6, key


def chi_square_z(counts: Counter, law: dict[tuple[int, ...], float]) -> float:
    """Chi-square as a standard normal deviate (Wilson and Hilferty 1931); cells below 5 expected are pooled."""
    n = sum(counts.values())
    assert not set(counts) - set(law), "a sequence of probability 0 was emitted"
    cells, rest_observed, rest_expected = [], 0, 0.0
    for key, probability in law.items():
        if n * probability >= 5:
            cells.append((counts[key], n * probability))
        else:
            rest_observed, rest_expected = rest_observed + counts[key], rest_expected + n * probability
    if rest_expected > 1:
        cells.append((rest_observed, rest_expected))
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    df = len(cells) - 1
    return ((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


# z below this is passed by 99.9 % of exact samplers; the seed is fixed
Z_LIMIT = 3.1
