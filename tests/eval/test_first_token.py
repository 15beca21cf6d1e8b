"""eval/first_token.py: milliseconds to the first token of every way, captured or not."""

import json

import first_token
import pytest
from programs import run
from recorded_steps import tape

import pardec
from pardec.decoding.engine import Engine


def test_every_way_has_a_row_for_each_length_beside_transformers_own(adapters, tmp_path):
    sizes = ("--prompt-tokens", "5,40", "--batch-sizes", "1,2", "--repetitions", 1)
    ended = run(first_token.main, adapters / "lora", *sizes, "--output", tmp_path / "found")
    assert ended.code == 0, ended.err
    rows = ended.result["rows"]
    assert [(row["batch_size"], row["prompt_tokens"], row["way"]) for row in rows] == [
        (size, length, way) for size in (1, 2) for length in (5, 40) for way in ("generate", "plain", "fused")
    ]
    assert all(row["ratio_to_generate"] == 1 for row in rows if row["way"] == "generate")
    assert all(row["ms_quartiles"][0] <= row["ms"] <= row["ms_quartiles"][1] for row in rows)
    assert json.loads((tmp_path / "found.json").read_text()) == ended.result
    assert (tmp_path / "found.md").read_text().count("| fused |") == 4


def test_where_calls_are_captured_both_stand_side_by_side(adapters, tmp_path, monkeypatch):
    """A tape stands for the graphs: what is run in them is computed by replays."""
    recorded = []

    def recorder(run, generator, site):
        recorded.append(site)
        return tape(run, generator, site)

    monkeypatch.setitem(Engine.__init__.__kwdefaults__, "recorder", recorder)
    load = pardec.load

    def capturing(*arguments, **options):
        model = load(*arguments, **options)
        model.capture = True
        return model

    monkeypatch.setattr(pardec, "load", capturing)
    ended = run(first_token.main, adapters / "embeddings", "--quick", "--output", tmp_path / "found")
    assert ended.code == 0, ended.err
    names = ["generate", "plain", "plain, not captured", "fused", "fused, not captured"]
    assert [row["way"] for row in ended.result["rows"]] == names * 2
    assert len(recorded) == 2  # prompts of 8 and of 24 tokens share a graph, of plain and of fused calls one each


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt-tokens", "0"), "prompt_tokens: expected integers >= 1"),
        (("--batch-sizes", "x"), "batch_sizes: expected integers >= 1"),
        (("--repetitions", 0), "repetitions: expected an integer >= 1, found 0"),
        (("--prompt-tokens", "16,100000"), "prompt and new tokens: expected at most"),
    ],
    ids=lambda value: "",
)
def test_bad_input_is_one_line(adapters, options, words):
    assert words in run(first_token.main, adapters / "lora", *options).error
