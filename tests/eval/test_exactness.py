"""The exactness check: planted differences are told apart, and a decoder that is wrong is found out."""

import json
from functools import partial
from pathlib import Path

import exactness
import pytest
import torch
from programs import Ended, run

import pardec
from pardec.measures.divergence import examine
from pardec.model import SelfSpeculativeModel

ROOT = Path(__file__).parents[2]
TEXT = str(ROOT / "Makefile")
EOS, A, B, C = 0, 1, 2, 3


@pytest.fixture
def adapter(adapters):
    return str(adapters / "lora")


def check(*arguments: object) -> Ended:
    return run(exactness.main, *arguments)


def examined(found, reference, logits, dtype=torch.float32, eos_ids=(EOS,)):
    asked = []

    def logits_after(prefix):
        asked.append(list(prefix))
        return torch.tensor(logits, dtype=torch.float64)

    one = examine("p", found, reference, logits_after, dtype, eos_ids)
    assert len(asked) <= 1
    return one, asked[0] if asked else None


# ---------------------------------------------------------------------- planted differences


def test_equal_sequences_need_no_forward():
    assert examined([A, B], [A, B], None) == (None, None)


@pytest.mark.parametrize(
    ("gap", "dtype", "explained"),
    [
        (0.9e-9, torch.float64, True),
        (1.1e-9, torch.float64, False),
        (0.9e-4, torch.float32, True),
        (1.1e-4, torch.float32, False),
        # largest |logit| is 16, so 8 roundings are 8 * 2^-7 * 16 = 1 in bfloat16 and 8 * 2^-10 * 16 = 1/8 in float16
        (1.0, torch.bfloat16, True),
        (1.0625, torch.bfloat16, False),
        (0.125, torch.float16, True),
        (0.1328125, torch.float16, False),
    ],
)
def test_ties_are_measured_by_the_dtype(gap, dtype, explained):
    logits = [-16.0, 4.0, 4.0 - gap, -3.0]
    one, prefix = examined([C, A, C], [C, B, A], logits, dtype)
    assert prefix == [C]
    assert (one.prompt, one.index, one.tokens, one.explained) == ("p", 1, (A, B), explained)
    assert one.top2_gap == one.token_gap == one.shortfall == pytest.approx(gap)
    assert one.relative_gap == pytest.approx(gap / 16)


def test_both_tokens_must_be_near_the_largest_logit():
    best_two_tie = [5.0, 5.0, 1.0, 1.0]
    one, _ = examined([B], [C], best_two_tie)  # a tie with each other, far below the best
    assert (one.top2_gap, one.token_gap, one.shortfall, one.explained) == (0.0, 0.0, 4.0, False)
    one, _ = examined([A], [C], best_two_tie)
    assert (one.token_gap, one.shortfall, one.explained) == (4.0, 4.0, False)
    three_near = [5.0, 4.75, 4.5, 0.0]
    one, _ = examined([A], [B], three_near, torch.bfloat16)  # tolerance 0.3125, below the best two
    assert (one.top2_gap, one.token_gap, one.shortfall, one.explained) == (0.25, 0.25, 0.5, False)


@pytest.mark.parametrize(
    ("found", "reference", "logits", "explained", "tokens"),
    [
        ([A], [A, B], [1.0, 0.0, 1.0, 0.0], True, (None, B)),  # ended where EOS ties with what went on
        ([A, B], [A], [1.0, 0.0, 1.0, 0.0], True, (B, None)),
        ([A], [A, B], [0.5, 0.0, 1.0, 0.0], False, (None, B)),  # ended where EOS was no choice
        ([A, EOS], [A, EOS, B], [1.0, 0.0, 1.0, 0.0], False, (None, B)),  # went on behind EOS
        ([A], [A, EOS], [1.0, 0.0, 1.0, 0.0], False, (None, EOS)),  # lost its EOS: not a choice between two tokens
        ([], [A], [1.0, 1.0, 0.0, 0.0], True, (None, A)),
    ],
)
def test_a_sequence_that_ends_earlier_is_explained_by_a_tie_with_eos_alone(found, reference, logits, explained, tokens):
    one, prefix = examined(found, reference, logits)
    shared = min(len(found), len(reference))
    assert (one.index, prefix, one.tokens, one.explained) == (shared, reference[:shared], tokens, explained)
    without_eos, _ = examined(found, reference, logits, eos_ids=())
    assert not without_eos.explained


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_explain_nothing(wrong):
    one, _ = examined([A], [B], [0.0, 1.0, wrong, 1.0], torch.float16)
    assert not one.explained
    one, _ = examined([A], [B], [wrong] * 4, torch.float16)
    assert not one.explained


def test_compare_counts_prompts_tokens_and_divergences():
    prompts = [exactness.Prompt([7 + i], "code", f"p{i}") for i in range(4)]
    found = [[A, A, A], [A, B, A], [A, A, B], [B, B, B]]
    reference = [[A, A, A], [A, A, A], [A, A, A], [B, B, B]]
    gaps = {8: 1e-6, 9: 0.5}  # of A over B, by the prompt's token

    def logits_after(prompt, new):
        return torch.tensor([0.0, 2.0, 2.0 - gaps[prompt[0]], 0.0], dtype=torch.float64)

    def diverges(prompt, ours, theirs):
        after = partial(logits_after, prompt.token_ids)
        return examine(prompt.name, ours, theirs, after, torch.float32, [EOS])

    row = exactness.compare(prompts, found, reference, diverges)
    places = [(one["prompt"], one["index"], one["explained"]) for one in row.pop("divergences")]
    assert places == [("p1", 1, True), ("p2", 2, False)]
    assert row == {"num_prompts": 4, "num_tokens": 11, "identical": 0.5, "num_divergences": 2, "num_unexplained": 1}


# ---------------------------------------------------------------------- the script


def test_quick_look_at_a_fresh_adapter_writes_what_it_prints(adapter, tmp_path):
    ended = check(adapter, "--quick", "--dtypes", "bfloat16", "--output", tmp_path / "new")
    assert ended.code == 0, ended.err[-2000:]
    result = ended.result
    assert json.loads((tmp_path / "new" / "exactness.json").read_text()) == result
    assert (tmp_path / "new" / "exactness.md").read_text().startswith("# Exactness of ")
    assert result["exact"] is True
    assert result["num_speculative_tokens"] == 2
    runs = {(row["dtype"], row["mode"], row["batch_size"], row["reference"]) for row in result["rows"]}
    drafted = {("two_pass", 1), ("fused", 1), ("fused", 3)}
    floor = {("plain", 3, "plain"), ("plain", 1, "generate"), ("plain", 3, "generate"), ("generate", 3, "generate")}
    pairs = {(*run, reference) for run in drafted for reference in ("plain", "generate")} | floor
    assert {(row["mode"], row["batch_size"], row["reference"]) for row in result["rows"] if row["is_floor"]} == floor
    assert runs == {("bfloat16", *pair) for pair in pairs}
    assert {row["num_prompts"] for row in result["rows"]} == {3}
    assert max(row["num_tokens"] for row in result["rows"]) == 3 * 24
    assert {"torch", "transformers"} <= set(result["versions"])


def test_both_dtypes_are_identical_and_a_checkpoints_own_penalties_are_left_out(adapter, monkeypatch, tmp_path):
    load = pardec.load

    def load_with_penalty(*args, **options):
        model = load(*args, **options)
        model.base_model.generation_config.repetition_penalty = 5.0
        return model

    monkeypatch.setattr(pardec, "load", load_with_penalty)
    path = tmp_path / "here.json"
    few = ("--num-prompts", 2, "--max-new-tokens", 6)
    ended = check(adapter, "--dtypes", "float64,float32", *few, "--output", path)
    assert ended.code == 0, ended.err[-2000:]
    result = ended.result
    assert json.loads(path.read_text()) == result
    assert path.with_suffix(".md").exists()
    assert [row["dtype"] for row in result["rows"]] == ["float64"] * 10 + ["float32"] * 10
    assert result["identical_by_dtype"] == {key: {"floor": 1.0, "drafted": 1.0} for key in ("float64", "float32")}
    assert {(row["identical"], row["num_tokens"]) for row in result["rows"]} == {(1.0, 12)}


def test_the_floor_is_what_differs_where_nothing_is_drafted():
    rows = [
        {"dtype": dtype, "is_floor": is_floor, "identical": share}
        for dtype, is_floor, share in (
            ("bfloat16", True, 0.5), ("bfloat16", True, 1.0), ("bfloat16", False, 0.25), ("float32", True, 1.0),
            ("float32", False, 0.75),
        )
    ]  # fmt: skip
    expected = {"bfloat16": {"floor": 0.75, "drafted": 0.25}, "float32": {"floor": 1.0, "drafted": 0.75}}
    assert exactness.floors(rows) == expected


def test_a_decoder_that_changes_one_token_is_found_out(adapter, monkeypatch):
    generate = SelfSpeculativeModel.generate

    def sabotaged(self, prompts, **options):
        out = generate(self, prompts, **options)
        if options["mode"] == "fused" and len(prompts) > 1:
            out.token_ids[1][5] = (out.token_ids[1][5] + 1) % 4096
        return out

    monkeypatch.setattr(SelfSpeculativeModel, "generate", sabotaged)
    ended = check(adapter, "--dtypes", "float32", "--num-prompts", 2, "--max-new-tokens", 8)
    assert ended.code == 1
    assert ended.result["exact"] is False
    for row in ended.result["rows"]:
        is_sabotaged = (row["mode"], row["batch_size"]) == ("fused", 2)
        assert row["num_unexplained"] == row["num_divergences"] == is_sabotaged
        assert row["identical"] == (0.5 if is_sabotaged else 1.0)
        for one in row["divergences"]:
            assert (one["prompt"], one["index"]) == ("python-stdlib/test/1", 5)
            assert one["shortfall"] > one["tolerance"] == 1e-4


def test_a_decoder_that_stops_too_early_is_found_out(adapter, monkeypatch, tmp_path):
    generate = SelfSpeculativeModel.generate

    def sabotaged(self, prompts, **options):
        short = {**options, "max_new_tokens": options["max_new_tokens"] - (options["mode"] == "two_pass")}
        return generate(self, prompts, **short)

    monkeypatch.setattr(SelfSpeculativeModel, "generate", sabotaged)
    path = tmp_path / "one.txt"
    path.write_text("import os\n\ndef main():\n")
    few = ("--max-new-tokens", 6, "--num-speculative-tokens", 1)
    ended = check(adapter, "--dtypes", "float32", "--prompts", path, *few)
    assert ended.code == 1
    wrong = [(row["mode"], row["divergences"][0]) for row in ended.result["rows"] if row["divergences"]]
    assert [(mode, one["prompt"], one["index"], one["tokens"][0]) for mode, one in wrong] == [
        ("two_pass", "one.txt", 5, None)
    ] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtypes", "float31"], "dtypes: expected some of float64,float32,bfloat16,float16, found 'float31'"),
        (["--dtypes", ""], "dtypes: expected some of float64,float32,bfloat16,float16, found ''"),
        (["--device", "abacus"], "device: expected a torch device of this machine, found 'abacus'"),
        (["--num-speculative-tokens", "0"], "num_speculative_tokens: expected an integer >= 1, found 0"),
        (["--num-prompts", "0"], "num_prompts: expected an integer >= 1, found 0"),
        (["--max-new-tokens", "0"], "max_new_tokens: expected an integer >= 1, found 0"),
        (
            ["--max-new-tokens", "4000"],
            "prompt and new tokens: expected at most 2048 positions of the model, found",
        ),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl: expected python-stdlib or a file of prompts, found nothing"),
        (["--base", "nowhere"], "base 'nowhere': expected a folder or hub name"),
    ],
)
def test_unusable_input_is_one_line_and_exit_code_2(adapter, arguments, message):
    ended = check(adapter, "--prompts", TEXT, *arguments)
    assert ended.error.startswith(f"error: {message}")
    assert ended.err.strip() == ended.error
    assert ended.out == ""
