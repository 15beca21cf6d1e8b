"""Sequences of one prompt that copy from each other keep their laws and stay independent; that they do, in any call."""

import itertools
from collections import Counter
from functools import cache as remembered

import pytest
import torch
from copying_steps import Plan, a_step, cut, decoder_for
from recorded_steps import decoder_for as tiny_decoder_for
from recorded_steps import results, sampled, tape
from sampling_oracle import WARPERS, Z_LIMIT, assert_same_law, chi_square_z, joint_law, thin_model
from tiny_models import make_adapter, tiny_model

from pardec.decoding import copying
from pardec.decoding.engine import Engine
from pardec.decoding.state import LiveRows
from pardec.draft_tree import DraftTree, DynamicTree
from pardec.model import SelfSpeculativeModel

# ---------------------------------------------------------------------- the joint law of two rows, by enumeration

# two texts of one prompt, by size of the vocabulary: the longest match of what each ends with is in the other
TEXTS = {
    3: ([1, 1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 2, 0, 0, 2, 2]),
    2: ([1, 1, 1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0, 1, 0, 1]),
}


@pytest.mark.parametrize("warper", ["temperature", "top_p"])
@pytest.mark.parametrize(
    ("K", "L", "draft_length", "verification", "vocab_size", "eos"),
    [
        (0, 2, 0, "token", 3, None),
        (0, 2, 0, "token", 3, 1),
        (1, 1, 0, "token", 2, None),
        (1, 1, 1, "token", 2, None),
        (1, 1, 1, "block", 2, None),
    ],
)
def test_two_rows_that_copy_from_each_other_are_independent_and_have_the_laws_of_rows_alone(
    K, L, draft_length, verification, vocab_size, eos, warper, monkeypatch
):
    toy, options = tiny_model("llama", vocab_size=vocab_size, seed=3), WARPERS[warper]
    decoder = decoder_for(toy, "fused", K, L, options, verification, eos)
    plan = Plan.of_all(K, L, two_pass=False, vocab_size=vocab_size).of_pairs
    texts, rows = TEXTS[vocab_size] * (len(plan.drawn) // 2), torch.arange(len(plan.drawn))
    alone, _ = a_step(decoder, texts, plan, draft_length, monkeypatch, rows[:, None])
    plan.laws.clear(), plan.behind.clear()
    outputs, copied = a_step(decoder, texts, plan, draft_length, monkeypatch, torch.stack([rows, rows ^ 1], dim=1))
    weights = plan.weights().view(-1, 2).prod(dim=1).tolist()
    assert sum(weights) == pytest.approx(1, abs=1e-5)
    for row in (0, 1):
        assert outputs[row::2] != alone[row::2]  # the other text makes a difference
        assert sum(w for w, n in zip(weights, copied[row::2], strict=True) if n) > 1e-3
    longest = K + L + 1

    @remembered
    def law_of(row: int, tokens: tuple[int, ...]):
        left = 0 if eos in tokens else longest - len(tokens)
        return cut(
            {(*tokens, *rest): p for rest, p in joint_law(toy, [*texts[row], *tokens], left, options).items()}, eos
        )

    found: Counter = Counter()
    for first, second, weight in zip(outputs[0::2], outputs[1::2], weights, strict=True):
        for (a, p), (b, q) in itertools.product(law_of(0, first).items(), law_of(1, second).items()):
            found[a, b] += weight * p * q
    expected = {(a, b): p * q for (a, p), (b, q) in itertools.product(law_of(0, ()).items(), law_of(1, ()).items())}
    assert_same_law(found, expected)


# ---------------------------------------------------------------------- through the public API, by chi-square

V, PROMPT, NEW = 3, [1, 2, 2, 0, 1, 2, 1, 1, 2], 4


@pytest.mark.parametrize("eos", [None, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"num_speculative_tokens": 0},
        {},
        {"mode": "two_pass"},
        {"verification": "block"},
        {"tree": DraftTree((0, 0, 1), (0, 1, 0), (2, 1, 2, 0))},
        {"tree": DynamicTree((2, 1, 2, 0))},
    ],
    ids=str,
)
def test_samples_of_one_prompt_follow_its_law_and_are_independent(options, eos):
    """Neighbours look in each other's texts, also where one has ended and left the batch."""
    toy = thin_model(V)
    toy.generation_config.eos_token_id = eos
    ours, warper = SelfSpeculativeModel(toy, None, make_adapter(toy, 2, lora_rank=2)), WARPERS["temperature"]
    asked = {"max_new_tokens": NEW, "seed": 1, "copy_tokens": 2, **warper, **options}
    out = ours.generate([PROMPT], num_return_sequences=6000, **asked)
    assert out.stats.num_accepted_copies > 100
    law = cut(joint_law(toy, PROMPT, NEW, warper), eos)
    tokens = [tuple(ids) for ids in out.token_ids]
    assert chi_square_z(Counter(tokens), law) < Z_LIMIT
    ends: Counter = Counter()
    for text, probability in law.items():
        ends[text[-2:]] += probability
    both = {(a, b): p * q for (a, p), (b, q) in itertools.product(ends.items(), repeat=2)}
    counts = Counter((a[-2:], b[-2:]) for a, b in zip(tokens[0::2], tokens[1::2], strict=True))
    assert chi_square_z(counts, both) < Z_LIMIT


# ---------------------------------------------------------------------- that they do, in any call


@pytest.fixture
def alone(monkeypatch):
    """Makes rows look in their own texts only."""
    return lambda: monkeypatch.setattr(copying, "MAX_SOURCES", 1)


def test_samples_take_fewer_steps_together_however_their_prompt_is_given(tiny_base, tokenizer, alone):
    ours = SelfSpeculativeModel(tiny_base, tokenizer, None)
    asked = {"max_new_tokens": 64, "temperature": 0.5, "seed": 0, "num_speculative_tokens": 0, "copy_tokens": 6}
    row = tokenizer("import os\nimport sys\n\n\ndef main():\n").input_ids
    together = ours.generate([row], num_return_sequences=8, **asked)
    given_apart = ours.generate([row] * 8, **asked)
    assert given_apart.token_ids == together.token_ids
    assert given_apart.stats.num_steps == together.stats.num_steps
    alone()
    by_itself = ours.generate([row], num_return_sequences=8, **asked)
    assert together.stats.tokens_per_step > 1.02 * by_itself.stats.tokens_per_step


def test_rows_that_have_left_are_copied_from_and_rows_that_moved_write_where_their_text_is():
    decoder = tiny_decoder_for(tiny_model("llama"), "fused", sampled(), copy_tokens=3)
    row = [5, 9, 2, 7]
    with torch.no_grad(), decoder.attached():
        whole = decoder.prefill([row, [3, 8]], repeats=2)
        live = LiveRows(whole)
        live.leave([True, False, False, False])
        state = live.state
        assert live.sequences == [3, 1, 2]
        assert state.texts.sources.tolist() == [[3, 2], [1, 0], [2, 3]]
        before = whole.context.clone()
        decoder.step(state)
    assert state.context is whole.context
    assert torch.equal(whole.context[0], before[0])
    margin = copying.MARGIN
    for place, sequence in enumerate(live.sequences):
        text = [row, row, [3, 8], [3, 8]][sequence] + state.output[place, : int(state.num_new[place])].tolist()
        assert int(whole.context_lengths[sequence]) == len(text)
        assert whole.context[sequence, margin : margin + len(text)].tolist() == text


def test_captured_steps_of_one_prompt_draw_what_steps_that_run_draw():
    """Calls of other numbers of prompts and of sequences of each on one engine, whose batches are of one size."""
    model, found = tiny_model("llama"), []
    calls = [([[5, 9, 2, 7] * 3], 4), ([[5, 9, 2], [3, 8] * 4], 2), ([[5, 9, 2, 7] * 3], 4), ([[4], [5], [6], [7]], 1)]
    for captured in (False, True):
        decoder = tiny_decoder_for(model, "fused", sampled(), copy_tokens=3, new_tokens=20)
        decoder.is_recorded = True  # neither looks at its numbers: it would leave out rows, and what they draw
        engine = Engine(decoder, 1, captured=captured, recorder=tape)
        found.append([])
        for seed, (rows, repeats) in enumerate(calls):
            decoder.law.generator.manual_seed(seed)
            for _ in engine.run(rows, repeats=repeats):
                pass
            found[-1].append((results(decoder, engine.state), engine.state.copies()))
    assert found[0] == found[1]
    assert any(copies for _, each in found[0] for row in each for _, copies in row)
