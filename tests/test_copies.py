"""Copied tokens through the public API: exact in every mode and form of call, counted apart, refused in one line."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from data_samples import REPEATING
from greedy_oracle import plain_generate
from tiny_models import make_adapter, tiny_model
from transformers.generation import StoppingCriteria, StoppingCriteriaList
from typer.testing import CliRunner

import pardec
from pardec.adapters.adapter import UNIFORM_NOISE
from pardec.adapters.files import save_adapter
from pardec.adapters.tuned import TunedChoice
from pardec.cli import program
from pardec.cli.program import app
from pardec.decoding import engine as engine_module
from pardec.decoding.output import StreamChunk, TextStream, pieces_of
from pardec.draft_tree import DraftTree
from pardec.model import SelfSpeculativeModel

K, L, NEW = 2, 5, 40


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer(text).input_ids for text in REPEATING]


@pytest.fixture(scope="module")
def expected(tiny_base, prompts):
    return [plain_generate(tiny_base, prompt, NEW) for prompt in prompts]


@pytest.fixture(scope="module")
def ours(tiny_base, tokenizer):
    return SelfSpeculativeModel(tiny_base, tokenizer, make_adapter(tiny_base, K, lora_rank=2))


WAYS = [
    {"num_speculative_tokens": 0, "copy_tokens": L},
    {"num_speculative_tokens": 1, "copy_tokens": L},
    {"copy_tokens": 1},
    {"mode": "two_pass", "copy_tokens": L},
    {"block_lengths": (2, 1, 0, 0, 1, 2), "copy_tokens": 3},
    {"block_lengths": (1, 1), "copy_tokens": 3},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_ragged_batches_give_generates_tokens(ours, prompts, expected, way):
    out = ours.generate(prompts, max_new_tokens=NEW, **way)
    assert out.token_ids == expected
    for counts in out.counts:
        if counts.copied:
            assert all(a <= c for a, c in zip(counts.accepted_copies, counts.copied, strict=True))
            # a copy is accepted only behind drafts that all stand
            rounds = zip(counts.accepted, counts.drafted, counts.accepted_copies, strict=True)
            assert all(a == d for a, d, copies in rounds if copies)
    per_step = 2 if way.get("mode") == "two_pass" else 1
    emitted = [1 + sum(one.accepted_in_all) + per_step * len(one.accepted) for one in out.counts]
    assert all(NEW <= n <= NEW + K + L + per_step for n in emitted)


def test_copies_are_taken_where_the_text_repeats_itself(ours, prompts, expected):
    out = ours.generate(prompts, max_new_tokens=NEW, num_speculative_tokens=0, copy_tokens=L)
    stats = out.stats
    assert stats.num_accepted_copies > NEW
    assert stats.num_accepted_tokens == stats.num_draft_tokens == 0
    assert stats.num_copied_tokens == L * stats.num_drafts
    assert stats.mean_acceptance_length == 1 + stats.num_accepted_copies / stats.num_drafts > 2
    assert stats.num_steps < 0.6 * sum(len(tokens) - 1 for tokens in expected)


def test_copies_alone_need_no_adapter(tiny_base, tokenizer, prompts, expected):
    bare = SelfSpeculativeModel(tiny_base, tokenizer, None)
    assert bare.generate(prompts, max_new_tokens=NEW, num_speculative_tokens=0, copy_tokens=L).token_ids == expected
    with pytest.raises(ValueError, match="mode: expected plain or num_speculative_tokens=0, the only one without an a"):
        bare.generate(prompts, copy_tokens=L)


@pytest.mark.parametrize("parts", [{"head_width": 6}, {"draft_input": UNIFORM_NOISE, "lora_rank": 2}], ids=str)
def test_heads_and_noise_draft_before_copies(tiny_base, tokenizer, prompts, expected, parts):
    model = SelfSpeculativeModel(tiny_base, tokenizer, make_adapter(tiny_base, K, **parts))
    assert model.generate(prompts, max_new_tokens=NEW, copy_tokens=L).token_ids == expected


@pytest.mark.parametrize("mode", ["fused", "two_pass"])
def test_several_sequences_of_a_prompt_are_those_of_one(ours, prompts, expected, mode):
    out = ours.generate(prompts[:2], max_new_tokens=NEW, num_return_sequences=2, mode=mode, copy_tokens=L)
    assert out.token_ids == [tokens for tokens in expected[:2] for _ in range(2)]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_stream_brings_what_generate_brings_and_tells_copies_from_drafts(ours, prompts, way):
    out = ours.generate(prompts[1], max_new_tokens=NEW, **way)
    chunks = list(ours.stream(prompts[1], max_new_tokens=NEW, **way))
    assert [token for chunk in chunks for token in chunk.token_ids] == out.token_ids[0]
    copies = out.counts[0].accepted_copies or [0] * (len(chunks) - 1)
    assert [chunk.num_accepted_tokens for chunk in chunks[1:-1]] == out.counts[0].accepted[:-1]
    assert [chunk.num_copied_tokens for chunk in chunks[1:-1]] == copies[:-1]
    assert 0 <= chunks[-1].num_copied_tokens <= copies[-1]


def test_pieces_say_where_their_tokens_came_from(tokenizer):
    ids = tokenizer("a = b + c").input_ids[:5]
    for mode, origins in (
        ("fused", ["drafted", "copied", "copied", "target", "target"]),
        ("two_pass", ["target", "drafted", "copied", "copied", "target"]),
    ):
        pieces = list(pieces_of(TextStream(tokenizer), StreamChunk("", ids, 1, 2), mode, is_first=False))
        assert [origin for _, origin in pieces] == origins


def test_eos_among_copies_ends_a_text(ours, tiny_base, prompts, expected):
    for eos in dict.fromkeys(expected[1][3:9]):
        tiny_base.generation_config.eos_token_id = eos
        try:
            cut = plain_generate(tiny_base, prompts[1], NEW, eos_token_id=eos)
            for way in WAYS:
                assert ours.generate(prompts[1], max_new_tokens=NEW, **way).token_ids == [cut]
        finally:
            tiny_base.generation_config.eos_token_id = 0


# ---------------------------------------------------------------------- through transformers


class _AtToken(StoppingCriteria):
    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores, **options):
        return input_ids[:, -1] == self.token


def test_the_door_copies_under_processors_and_criteria(tiny_base, ours, prompts):
    ids = torch.tensor([prompts[1]])
    stop = plain_generate(tiny_base, prompts[1], NEW)[7]
    stopped = {"stopping_criteria": StoppingCriteriaList([_AtToken(stop)])}
    for options in ({}, {"repetition_penalty": 1.2}, stopped, {"no_repeat_ngram_size": 3}):
        asked = {"max_new_tokens": 16, "do_sample": False, **options}
        expected = tiny_base.generate(ids, **asked)
        is_slow = bool(options) and options is not stopped
        for way in ({"num_speculative_tokens": 0}, {}, {"mode": "two_pass"}):
            with pytest.warns(UserWarning, match="row by row") if is_slow else nullcontext():
                found = tiny_base.generate(ids, custom_generate=ours, copy_tokens=L, **way, **asked)
            assert torch.equal(found, expected)


# ---------------------------------------------------------------------- what is asked for


def choice(**parts) -> TunedChoice:
    return TunedChoice("a device", "float32", False, parts.pop("block_lengths"), {}, 1.0, 2.0, 2.0, 1.0, [0.5], **parts)


def test_a_tuned_choice_brings_its_copies_unless_others_are_asked_for(llama_engines):
    engines = llama_engines
    engines.choices = [choice(block_lengths=(1, 1, 0, 0), copy_tokens=2)]
    for asked, mode, blocks, copies in (
        ({}, "fused", (1, 1, 0, 0), 2),
        ({"copy_tokens": 0}, "fused", (1, 1), 0),
        ({"copy_tokens": 4}, "fused", (1, 1, 0, 0, 0, 0), 4),
        ({"mode": "two_pass"}, "two_pass", (2, 2, 2), 0),
        ({"mode": "plain", "copy_tokens": 3}, "plain", (0,), 0),
        ({"asked": 2}, "fused", (2, 2, 2), 0),
        ({"asked": 0, "copy_tokens": 3}, "fused", (0, 0, 0, 0), 3),
    ):
        given = {"mode": None, "asked": None, "block_lengths": None, "use_head": None} | asked
        found = engines.drafting(**given)
        assert (found.mode, found.block_lengths, found.copy_tokens) == (mode, blocks, copies), asked
    engines.choices = [choice(block_lengths=(0,))]
    assert engines.drafting(None, None, None, None).mode == "plain"
    found = engines.drafting(None, None, None, None, copy_tokens=2)
    assert (found.mode, found.block_lengths) == ("fused", (0, 0, 0))


def test_a_tuned_choice_is_set_aside_by_drafts_that_it_does_not_make():
    model = tiny_model("llama")
    engines = SelfSpeculativeModel(model, None, make_adapter(model, K, head_width=6, shortlist=3)).engines
    headless_tree = DraftTree((0, 0, 1), (0, 5, 0), (2, 2, 2, 2))  # rank 5 is on no shortlist of the head
    whole = (*(K,) * (K + 1),)
    for tuned, asked, drafts in (
        (choice(block_lengths=(0,), mode="plain"), {"use_head": True}, True),
        (choice(block_lengths=(0,), mode="plain"), {"use_head": False}, False),
        (choice(block_lengths=(0,)), {"mode": "fused"}, True),
        (choice(block_lengths=(0, 0, 0), copy_tokens=2), {"use_head": True}, True),
        (choice(block_lengths=(0, 0, 0), copy_tokens=2), {"mode": "fused"}, False),
        (choice(block_lengths=(0, 0, 0), copy_tokens=2), {"mode": "fused", "copy_tokens": 0}, True),
        (choice(block_lengths=(0, 0, 0), copy_tokens=2), {"copy_tokens": 0}, False),
        (choice(block_lengths=whole, use_head=False, tree=headless_tree), {"use_head": True}, True),
    ):
        engines.choices = [tuned]
        found = engines.drafting(**{"mode": None, "asked": None, "block_lengths": None, "use_head": None} | asked)
        assert (found.tree, found.block_lengths == whole) == (None, drafts), (tuned, asked)
        assert (found.head is not None) is drafts
    assert engines.drafting(None, None, None, None).tree == headless_tree
    assert engines.drafting(None, None, None, False).tree == headless_tree


def test_generation_goes_by_the_choice_for_its_batch_and_law():
    model = tiny_model("llama")
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K))
    ours.engines.choices = [
        choice(block_lengths=(1, 1)),
        choice(block_lengths=(0,), batch_size=2),
        choice(block_lengths=(2, 2, 2, 0), temperature=0.8, copy_tokens=1),
    ]
    row, asked = [5, 9, 2, 7, 5, 9], {"max_new_tokens": 12}

    def drafted(prompts, **options) -> int:
        return max(out for counts in ours.generate(prompts, **asked, **options).counts for out in counts.drafted)

    assert drafted([row]) == 1
    assert drafted([row] * 2) == drafted([row] * 3) == drafted(row, num_return_sequences=2) == 0
    assert drafted([row] * 2, temperature=1.0) == 2
    chunks = list(ours.stream(row, temperature=1.0, seed=0, **asked))
    assert [token for chunk in chunks for token in chunk.token_ids] == ours.generate(
        row, temperature=1.0, seed=0, **asked
    ).token_ids[0]
    ids, steps = torch.tensor([row] * 2), []
    lend = ours.engines.lend
    ours.engines.lend = lambda *given, **named: steps.append(given[3].mode) or lend(*given, **named)
    for batch in (ids[:1], ids):
        model.generate(batch, do_sample=False, custom_generate=ours, **asked)
    assert steps == ["fused", "plain"]
    assert ours.tuned is ours.engines.choices[0]


@pytest.fixture
def llama_engines():
    model = tiny_model("llama")
    return SelfSpeculativeModel(model, None, make_adapter(model, K)).engines


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"copy_tokens": -1}, "copy_tokens: expected an integer from 0 to 128, found -1"),
        ({"copy_tokens": 129}, "copy_tokens: expected an integer from 0 to 128, found 129"),
        ({"copy_tokens": 2.5}, "copy_tokens: expected an integer from 0 to 128, found 2.5"),
        (
            {"copy_tokens": 1, "block_lengths": (1, 1, 0, 0)},
            r"block_lengths: expected K \+ 1 \+ 1 numbers from 0 to K of which K is the largest, found \(1, 1, 0, 0\)",
        ),
        ({"copy_tokens": 1, "block_lengths": (2, 2)}, r"block_lengths: expected K \+ 1 numbers .* found \(2, 2\)"),
    ],
)
def test_what_cannot_be_copied_is_refused(ours, options, words):
    with pytest.raises(ValueError, match=words):
        ours.generate([5, 6, 7], **options)


def test_a_choice_whose_blocks_do_not_go_with_its_copies_is_refused():
    with pytest.raises(ValueError, match=r"block_lengths: expected K \+ 1 \+ 3 numbers"):
        choice(block_lengths=(1, 1), copy_tokens=3)
    assert choice(block_lengths=(0, 0, 0), copy_tokens=2).num_speculative_tokens == 0
    with pytest.raises(ValueError, match="copy_tokens: expected an integer from 0 to 128, found -1"):
        replace(choice(block_lengths=(1, 1)), copy_tokens=-1)


def test_a_cache_that_does_not_hold_the_copies_is_refused_in_one_line(ours, prompts, monkeypatch):
    asked = {"max_new_tokens": 8, "num_speculative_tokens": 0}
    seen = []
    monkeypatch.setattr(engine_module, "check_memory", lambda *given: seen.append(given[-1]))
    for copies in (1, 100):
        ours.generate(prompts[1], copy_tokens=copies, **asked)
    assert seen[1] - seen[0] == 99


def test_copies_are_coloured_on_the_command_line(packaged_adapter, tmp_path, monkeypatch):
    save_adapter(packaged_adapter(K), tmp_path / "adapter")
    monkeypatch.setattr(program, "load_model", lambda *options: pardec.load(tmp_path / "adapter"))
    asked = ["--prompt", "x = 1\n" * 9, "--max-new-tokens", "16", "--num-speculative-tokens", "0"]
    result = CliRunner().invoke(app, ["generate", "adapter", *asked, "--copy-tokens", "4", "--show-drafts"])
    assert result.exit_code == 0, result.output
    assert "\x1b[1;36m" in result.output
    assert "0 drafted tokens accepted in" in result.output
    assert "copied tokens besides, cyan" in result.output
