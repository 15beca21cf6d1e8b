"""Chains and trees side by side: the program's table and JSON, and the figures that it computes."""

import json

import pytest
import trees
from programs import run
from timing.baselines import Setting, ways_for
from timing.tree_shapes import gain_over

import pardec
from pardec.adapters.tuned import TunedChoice
from pardec.decoding.stats import SequenceCounts
from pardec.measures.acceptance import summarise

KEYS = {
    "law", "kind", "rows", "nodes", "depth", "block_lengths", "expected", "measured", "interval", "outside_repetition",
    "tokens_per_step", "gain", "gain_interval", "over_tree", "ms_per_step", "times_plain",
}  # fmt: skip


@pytest.fixture(scope="module")
def ended(adapters, tmp_path_factory):
    output = tmp_path_factory.mktemp("trees") / "found"
    few = ("--quick", "--timed-prompts", 1, "--output", output)
    found = run(trees.main, adapters / "lora", *few)
    assert found.code == 0, found.err[-2000:]
    return found, output


def test_every_shape_has_a_row_for_each_way_to_choose_tokens_and_greedy_lengths_are_those_expected(ended):
    found, output = ended
    result = found.result
    assert json.loads(output.with_suffix(".json").read_text()) == result
    assert {row["law"] for row in result["rows"]} == {"greedy", "sampled"}
    for row in result["rows"]:
        assert set(row) == KEYS
        assert row["rows"] <= 9 or row["kind"] == "full chain"
        if row["law"] == "greedy":
            assert row["measured"] == pytest.approx(row["expected"], abs=1e-4)
        assert (row["over_tree"] is not None) == ("dynamic" in row["kind"])
    kinds = {row["kind"] for row in result["rows"]}
    assert {"tree", "dynamic tree", "tree of 2", "dynamic tree of 2"} <= kinds
    assert {"plain", "tree"} <= {one["kind"] for one in result["costs"]} <= {"plain", *kinds}
    full = [row for row in result["rows"] if row["kind"] == "full chain"]
    assert all(row["gain"] == 0 for row in full)
    assert result["costs"][0]["rows"] == 1


def test_of_shapes_with_more_rows_than_are_decoded_what_is_expected_stands_alone(adapters, tmp_path):
    few = ("--quick", "--laws", "greedy", "--decoded-rows", 4, "--timed-prompts", 0, "--output", tmp_path / "few")
    whole = ("--quick", "--laws", "greedy", "--timed-prompts", 0, "--output", tmp_path / "whole")
    found, every = (run(trees.main, adapters / "lora", *options).result for options in (few, whole))
    assert {row["measured"] is None for row in found["rows"]} == {True, False}
    assert all((row["measured"] is None) == (row["rows"] > 4) for row in found["rows"])
    assert found["costs"] == []
    # greedy texts are what is decoded, so all that is said of them is the same
    changed = [{**row, "measured": None} for row in found["rows"]]
    assert changed == [{**row, "measured": None} for row in every["rows"]]


def test_on_paper_there_is_a_best_shape_for_every_batch(ended):
    found, output = ended
    assert {row["batch_size"] for row in found.result["paper"]} == {1, 4, 16}
    assert found.out.count("*") >= 3
    assert "PREDICTED, not measured: H100 SXM" in output.with_suffix(".md").read_text()
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--laws", "greedy,beam"], "laws: expected some of greedy, sampled, found 'beam'"),
        (["--rows", "4,x"], "rows: expected integers >= 1 with commas between them, found '4,x'"),
        (["--shape", "llama-9b"], "shape: expected one of"),
    ],
)
def test_bad_input_is_one_line(adapters, options, words):
    found = run(trees.main, adapters / "lora", "--quick", *options)
    assert found.code == 2
    assert words in found.err
    assert "Traceback" not in found.err


def test_a_gain_is_that_of_sums_over_the_same_prompts():
    def acceptance(accepted: list[list[int]]):
        counts = [SequenceCounts(one, [3] * len(one), 1 + sum(one) + len(one)) for one in accepted]
        outputs = [list(range(1000 * i, 1000 * i + 1 + sum(one) + len(one))) for i, one in enumerate(accepted)]
        return summarise([[5000 + i] for i in range(len(accepted))], outputs, counts, 1.0)

    one, other = acceptance([[1, 0, 1], [0, 0]]), acceptance([[2, 1], [1]])
    found = gain_over(one, other)
    assert found["gain"] == pytest.approx((1 + 4 / 3) / (1 + 2 / 5) - 1, abs=1e-4)
    low, high = found["gain_interval"]
    assert low <= found["gain"] <= high
    same = gain_over(one, one)
    assert (same["gain"], same["gain_interval"]) == (0.0, [0.0, 0.0])


def test_a_tuned_tree_is_timed_as_it_was_chosen_and_its_rows_are_counted(adapters):
    model = pardec.load(adapters / "lora")
    tree = pardec.DraftTree((0, 0, 1), (0, 1, 0), (2, 1, 1, 1))
    facts = {"device": "here", "dtype": "float32", "compile": False, "weights": {}, "conditional_acceptance": []}
    speeds = dict.fromkeys(("ms_per_step", "predicted_tokens_per_second", "measured_tokens_per_second"), 1.0)
    ways = {("fused", ()): 9, ("two_pass", ()): 3 + 4, ("fused", (2, 0)): 9 + 4, ("two_pass", (0, 0)): 3 + 6}
    for (mode, behind), rows in ways.items():
        blocks, copies = (*(2,) * 3, *(behind if mode == "fused" else ())), len(behind)
        model.tuned = TunedChoice(
            **facts,
            **speeds,
            plain_tokens_per_second=1.0,
            block_lengths=blocks,
            mode=mode,
            tree=tree,
            copy_tokens=copies,
        )
        found, _ = ways_for({"lora": model}, None, None, Setting("greedy", 6), 2, tuned_only=True)
        (way,) = [one for one in found if one.name == f"{mode}{' + copies' if copies else ''} tuned"]
        decoded = way.decode([[1, 2, 3], [4, 5, 6]], 0)
        assert decoded.num_rows == rows * decoded.num_steps
        assert way.tree == tree
        assert way.block_lengths is None
        assert decoded.token_ids == model.generate([[1, 2, 3], [4, 5, 6]], max_new_tokens=6, mode="plain").token_ids
