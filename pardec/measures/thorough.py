"""The long check of a loaded model: its steps behind many tokens, its greedy tokens and its sampled law.

Knows prompts as token ids; no files and no printing. Legend: N samples, K num_speculative_tokens.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.special import gammaincc
from transformers import PreTrainedModel
from transformers.generation.logits_process import TopKLogitsWarper

from pardec.decoding.probing.probe_lengths import THOROUGH, LengthReport, probe_lengths
from pardec.decoding.step import MODES
from pardec.measures.divergence import Divergence, divergence_from
from pardec.model import SelfSpeculativeModel
from pardec.target.base import eos_token_ids, neutral_generation_config

NEW_TOKENS = 64
CONTEXTS = (16, 300, 2_000)
NUM_SAMPLES = 2_000
NUM_SAMPLED_TOKENS = 3
_TOP_K = 4  # so that every continuation can be enumerated
_SAMPLES_AT_ONCE = 100
_SIGNIFICANCE = 1e-4  # a law that is right fails once in ten thousand checks
_LEAST_EXPECTED = 5.0  # samples in a cell of the test; rarer continuations are counted together


@dataclass(frozen=True)
class GreedyCheck:
    """Greedy tokens of a mode against those of `base_model.generate`.

    Attributes:
        mode: of decoding.
        context: tokens of the prompt.
        divergence: the first difference; None where there is none.
    """

    mode: str
    context: int
    divergence: Divergence | None

    @property
    def passed(self) -> bool:
        """Equal, or different at a tie that the dtype's rounding decides."""
        return self.divergence is None or self.divergence.explained


@dataclass(frozen=True)
class LawCheck:
    """Sampled continuations of a mode against the base's law, enumerated.

    Attributes:
        mode: of decoding.
        num_samples: N.
        num_cells: continuations, rare ones together, whose counts are compared.
        p_value: of the chi-square test.
    """

    mode: str
    num_samples: int
    num_cells: int
    p_value: float

    @property
    def passed(self) -> bool:
        """Whether the counts may be those of the base's law."""
        return self.p_value >= _SIGNIFICANCE


@dataclass(frozen=True)
class ThoroughReport:
    """What was seen; see the classes."""

    lengths: LengthReport
    greedy: list[GreedyCheck]
    law: list[LawCheck]

    @property
    def passed(self) -> bool:
        """Whether everything was."""
        return all(check.passed for check in (*self.greedy, *self.law))


def check_thoroughly(
    model: SelfSpeculativeModel, text: list[int], progress: Callable[[str], None] = lambda part: None
) -> ThoroughReport:
    """Runs the long check.

    Args:
        model: with an adapter.
        text: token ids of real text, of which prompts are cut; repeated where it is too short.
        progress: told what comes next.

    Raises:
        UnsupportedModelError: if the base cannot be decoded exactly behind many tokens.
    """
    progress("steps behind many tokens")
    lengths = probe_lengths(model.target, THOROUGH)
    limit = model.target.max_positions
    num_tokens = NEW_TOKENS if limit is None else min(NEW_TOKENS, limit // 2)
    longest = max(CONTEXTS) if limit is None else limit - num_tokens
    greedy = []
    for context in sorted({min(context, longest) for context in CONTEXTS}):
        prompt = [text[i % len(text)] for i in range(context)]
        progress(f"greedy tokens behind {context}")
        greedy += greedy_checks(model, prompt, num_tokens)
    law = []
    for mode in MODES:
        progress(f"{NUM_SAMPLES:,} samples, {mode}")
        context = min(*CONTEXTS, longest)
        law.append(law_check(model, [text[i % len(text)] for i in range(context)], mode, NUM_SAMPLES))
    return ThoroughReport(lengths, greedy, law)


@torch.no_grad()
def greedy_checks(model: SelfSpeculativeModel, prompt: list[int], num_tokens: int) -> list[GreedyCheck]:
    """Every mode's greedy tokens behind one prompt against those of `base_model.generate`."""
    reference = _generated(model.base_model, prompt, num_tokens)
    found = []
    for mode in MODES:
        tokens = model.generate([prompt], max_new_tokens=num_tokens, mode=mode).token_ids[0]
        divergence = divergence_from(model.base_model, "", prompt, tokens, reference)
        found.append(GreedyCheck(mode, len(prompt), divergence))
    return found


def _generated(base: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens of `generate` without what a checkpoint's generation_config adds to them."""
    ids, own = torch.tensor([prompt], device=base.device), base.generation_config
    base.generation_config = neutral_generation_config(base, stop_at_eos=True)
    try:
        out = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False)  # type: ignore[operator]
    finally:
        base.generation_config = own
    return out[0, len(prompt) :].tolist()


def law_check(model: SelfSpeculativeModel, prompt: list[int], mode: str, num_samples: int) -> LawCheck:
    """Chi-square test of a mode's first `NUM_SAMPLED_TOKENS` sampled tokens, at temperature 1 and top-k 4."""
    assert model.adapter is not None
    K = 0 if mode == "plain" else min(2, model.adapter.metadata.num_speculative_tokens)
    counts: Counter[tuple[int, ...]] = Counter()
    for start in range(0, num_samples, _SAMPLES_AT_ONCE):
        out = model.generate(
            [prompt],
            max_new_tokens=NUM_SAMPLED_TOKENS,
            temperature=1.0,
            top_k=_TOP_K,
            seed=start,
            mode=mode,
            num_speculative_tokens=K,
            num_return_sequences=min(_SAMPLES_AT_ONCE, num_samples - start),
        )
        counts.update(tuple(tokens) for tokens in out.token_ids)
    expected = {tokens: p * num_samples for tokens, p in continuations(model, prompt).items()}
    num_cells, p_value = chi_square(counts, expected)
    return LawCheck(mode, num_samples, num_cells, p_value)


@torch.no_grad()
def continuations(model: SelfSpeculativeModel, prompt: list[int]) -> dict[tuple[int, ...], float]:
    """The base's probability of every continuation, by plain forwards; one that meets EOS ends there."""
    eos = set(eos_token_ids(model.base_model))
    laws, ended = {(): 1.0}, {}
    for _ in range(NUM_SAMPLED_TOKENS):
        rows = torch.tensor([[*prompt, *tokens] for tokens in laws], device=model.target.device)
        logits = model.base_model(rows, use_cache=False).logits[:, -1].float()
        # transformers' own top-k, which keeps ties with the last
        probs = TopKLogitsWarper(_TOP_K)(rows, logits).double().softmax(dim=-1)  # type: ignore[arg-type]
        grown = {}
        for (tokens, p), law in zip(laws.items(), probs, strict=True):
            for token in law.nonzero()[:, 0].tolist():
                (ended if token in eos else grown)[(*tokens, token)] = p * float(law[token])
        laws = grown
        if not laws:
            break
    return {**laws, **ended}


def chi_square(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> tuple[int, float]:
    """(cells, p-value) of observed counts against expected ones; continuations that cannot be make it 0."""
    if any(tokens not in expected for tokens in counts):
        return len(expected), 0.0
    common = {tokens: number for tokens, number in expected.items() if number >= _LEAST_EXPECTED}
    cells = [(counts[tokens], number) for tokens, number in common.items()]
    rare = sum(expected.values()) - sum(common.values())
    if rare > 0:
        cells.append((sum(counts.values()) - sum(observed for observed, _ in cells), rare))
    statistic = sum((observed - number) ** 2 / number for observed, number in cells)
    if len(cells) < 2:
        return len(cells), 1.0
    halves = torch.tensor([len(cells) - 1, statistic], dtype=torch.float64) / 2
    return len(cells), float(gammaincc(halves[0], halves[1]))
