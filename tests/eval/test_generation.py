"""eval/generation.py: what is counted of a pair, and a run on the packaged model."""

import json

import generation
import pytest
import torch
import yaml
from generation import Pair, Subject, row_of, up_to_end
from programs import run

from pardec.config.responses_recipe import ResponsesRecipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("recipe")
    texts = "".join(f"def f_{n}({n % 7 * 'long_'}x):\n    return x + {n}\n\n\n" for n in range(400))
    (folder / "texts.txt").write_text(texts)
    values = {
        "base": "tiny-python", "output": "unused.jsonl", "data": {"path": str(folder / "texts.txt")},
        "prompt_tokens": 12, "max_new_tokens": 8,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "recipe.yaml")


@pytest.mark.parametrize(
    ("text", "own"), [([5, 1, 7, 7], [5, 1]), ([9, 8], [9, 8]), ([2, 1], [2]), ([5, 7, 1], [5, 7, 1])]
)
def test_padding_behind_an_end_is_not_counted(text, own):
    assert up_to_end(text, {1, 2}) == own


def test_a_ratio_is_one_of_tokens_per_cpu_second():
    pairs = [Pair((100, 50), (2.0, 4.0), 3), Pair((60, 60), (1.0, 1.0), 4), Pair((30, 60), (1.0, 4.0), 4)]
    row = row_of("greedy", 4, pairs)
    assert [pair.ratio for pair in pairs] == [4.0, 1.0, 2.0]
    assert (row["ratio"], row["ratio_quartiles"]) == (2.0, [1.5, 3.0])
    assert row["tokens_per_cpu_second"] == 190 / 4
    assert row["tokens_per_cpu_second_of_generate"] == round(170 / 9, 2)
    assert (row["num_same"], row["num_texts"]) == (11, 12)
    assert row_of("sampled", 4, pairs)["num_same"] is None


def test_both_ways_write_the_same_greedy_texts_with_their_own_ends():
    values = {"base": "tiny-python", "output": "unused.jsonl", "data": {"path": "unused"}, "max_new_tokens": 24}
    subject = Subject(ResponsesRecipe.model_validate(values))
    subject.model.base_model.generation_config.eos_token_id = [0, 199]
    batch = [[0, 9, 8, 7, 6], [0, 50], [0, 51, 9, 4]]
    ours = subject.ours(batch, sampled=False)
    assert ours == subject.theirs(batch, sampled=False)
    assert len({len(text) for text in ours}) > 1
    torch.manual_seed(0)
    for texts in (subject.ours(batch, sampled=True), subject.theirs(batch, sampled=True)):
        assert all(0 < len(text) <= 24 and not {0, 199} & set(text[:-1]) for text in texts)


def test_a_run_leaves_table_and_json_with_a_pair_for_each_batch(recipe, tmp_path):
    options = ("--batch-sizes", "1,2", "--num-batches", 2, "--max-prompts", 3, "--threads", torch.get_num_threads())
    ended = run(generation.main, recipe, "seed=1", *options, "--output", tmp_path / "found")
    assert ended.code == 0, ended.err[-2000:]
    result = ended.result
    assert json.loads((tmp_path / "found.json").read_text()) == result
    assert "| greedy | 1 | 2 |" in (tmp_path / "found.md").read_text()
    assert [(row["setting"], row["batch_size"], len(row["pairs"])) for row in result["rows"]] == [
        ("greedy", 1, 2), ("sampled", 1, 2), ("greedy", 2, 1), ("sampled", 2, 1),
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["tokens_per_cpu_second"] > 0
        if row["setting"] == "greedy":
            assert row["num_same"] == row["num_texts"]
    assert (result["max_new_tokens"], result["prompt_tokens"], result["dtype"]) == (8, [12, 12], "float32")
    greedy_only = run(generation.main, recipe, "temperature=0", *options, "--output", tmp_path / "greedy").result
    assert {row["setting"] for row in greedy_only["rows"]} == {"greedy"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch-sizes", "0"), "batch_sizes: expected integers >= 1"),
        (("--batch-sizes", "9", "--max-prompts", "8"), "batch_sizes: expected at most 8, max_prompts, found 9"),
        (("--num-batches", "0"), "num_batches: expected an integer >= 1, found 0"),
        (("--threads", "-1"), "threads: expected an integer >= 1, found -1"),
    ],
)
def test_unusable_options_are_refused_in_one_line(options, message, recipe):
    assert message in run(generation.main, recipe, *options).error


def test_a_recipe_that_is_not_there_is_refused():
    assert "nowhere.yaml: expected a recipe file" in run(generation.main, "nowhere.yaml").error
