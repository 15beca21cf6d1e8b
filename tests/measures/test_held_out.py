"""What training measures and stores, and that measuring again tells the same from the changed."""

import json
import shutil
from pathlib import Path

import acceptance
import pytest
import torch
from data_samples import code_text
from programs import Ended, run
from tiny_models import make_adapter, tiny_model

import pardec.data.python_sources
from pardec.adapters.files import save_adapter
from pardec.adapters.tuned import TunedChoice
from pardec.config.adapter_recipe import DataConfig, Recipe
from pardec.data.corpus import load_corpus, standard_prompts
from pardec.measures.acceptance import measure_acceptance
from pardec.measures.held_out import Comparison, compare, measure_again, measure_held_out, validation_prompts
from pardec.measures.ranks import measure_ranks
from pardec.model import SelfSpeculativeModel

K = 2
PROMPTS = [[5, 9, 2, 4, 7], [3], [11, 12, 10, 1, 2, 3]]
ROOM = {"max_new_tokens": 16, "max_positions": 2048}
SETTINGS = {"max_new_tokens": 16, "temperature": 0.8, "top_k": 10, "seed": 4}


def tiny(**adapter) -> SelfSpeculativeModel:
    base = tiny_model("llama", vocab_size=13)
    return SelfSpeculativeModel(base, None, make_adapter(base, K, lora_rank=2, **adapter))


# ---------------------------------------------------------------------- measuring


@pytest.fixture(scope="module")
def with_head():
    model = tiny(head_width=8)
    return model, measure_held_out(model, PROMPTS, batch_size=2, categories=["a", "b", "a"], **SETTINGS)


def test_figures_are_those_of_the_decoder(with_head):
    model, found = with_head
    options = {"max_new_tokens": 16, "seed": 4, "batch_size": 2, "categories": ["a", "b", "a"]}
    sampling = {"temperature": 0.8, "top_k": 10}
    expected = {
        "sampled": measure_acceptance(model, PROMPTS, **options, **sampling),
        "greedy": measure_acceptance(model, PROMPTS, **options),
        "sampled_without_head": measure_acceptance(model, PROMPTS, use_head=False, **options, **sampling),
    }
    for name, one in expected.items():
        assert getattr(found, name).to_dict() == one.to_dict()
    assert found.sampled_without_head.to_dict() != found.sampled.to_dict()
    for name in ("sampled", "greedy"):
        ranks = measure_ranks(model, PROMPTS, expected[name].token_ids, stride=2)
        assert getattr(found, f"{name}_ranks") == ranks


def test_trackers_get_numbers_and_one_list(with_head):
    _, found = with_head
    values = found.to_log()
    lists = [name for name, value in values.items() if not isinstance(value, int | float | None)]
    assert lists == ["acceptance/sampled_per_position"]
    rates = found.sampled.stats.acceptance_rate_per_position
    assert values["acceptance/sampled_per_position"] == rates["unconditional"]
    assert values["acceptance/sampled_position_2"] == rates["unconditional"][1]
    assert values["acceptance/sampled_conditional_2"] == rates["conditional"][1]
    assert values["acceptance/greedy_position_1"] == found.greedy.stats.acceptance_rate_per_position["unconditional"][0]
    assert values["acceptance/sampled_without_head"] == found.sampled_without_head.mean_acceptance_length
    assert values["rank/sampled_top5_position_2"] == found.sampled_ranks.unconditional[5][1]
    assert values["rank/greedy_top1_position_1"] == found.greedy_ranks.unconditional[1][0]
    assert "acceptance/sampled_position_3" not in values


def test_the_record_is_json_with_all_settings(with_head):
    _, found = with_head
    record = json.loads(json.dumps(found.to_dict()))
    assert {key: record[key] for key in ("num_prompts", "max_new_tokens", "seed", "batch_size")} == {
        "num_prompts": 3,
        "max_new_tokens": 16,
        "seed": 4,
        "batch_size": 2,
    }
    assert record["num_speculative_tokens"] == K
    for name in ("sampled", "sampled_without_head"):
        assert (record[name]["temperature"], record[name]["top_k"]) == (0.8, 10)
    assert set(record["greedy"]["by_category"]) == {"a", "b"}
    assert record["greedy"]["ranks"]["unconditional"].keys() == {"top1", "top5", "top10"}


def test_training_goes_on_with_the_random_numbers_that_it_had(with_head):
    model, found = with_head
    state = torch.get_rng_state()
    again = measure_held_out(model, PROMPTS, batch_size=2, categories=["a", "b", "a"], **SETTINGS)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.to_dict() == found.to_dict()


def test_a_head_that_is_left_out_is_not_measured():
    found = measure_held_out(tiny(head_width=8), PROMPTS, use_head=False, **SETTINGS)
    without = measure_held_out(tiny(), PROMPTS, **SETTINGS)
    assert found.sampled_without_head is None
    assert found.to_log() == without.to_log()


def test_block_verification_is_measured_and_told_and_changes_no_greedy_figure(with_head):
    model, token = with_head
    options = {"batch_size": 2, "categories": ["a", "b", "a"], "verification": "block"}
    found = measure_held_out(model, PROMPTS, **options, **SETTINGS)
    record = found.to_dict()
    assert (record["verification"], token.to_dict()["verification"]) == ("block", "token")
    for name in ("sampled", "sampled_without_head"):
        assert record[name]["tokens_sha256"] != token.to_dict()[name]["tokens_sha256"]
    assert record["greedy"] == token.to_dict()["greedy"]


def test_what_was_trained_is_measured_and_not_what_was_tuned():
    model = tiny()
    expected = measure_held_out(model, PROMPTS, **SETTINGS).to_dict()
    model.tuned = TunedChoice("cpu", "float32", False, (1, 1), {}, 1.0, 2.0, 2.0, 1.0, [0.5])
    assert len(model.generate(PROMPTS, max_new_tokens=16).stats.acceptance_rate_per_position["unconditional"]) == 1
    assert measure_held_out(model, PROMPTS, **SETTINGS).to_dict() == expected
    fewer = measure_held_out(model, PROMPTS, num_speculative_tokens=1, **SETTINGS)
    assert len(fewer.to_dict()["greedy"]["acceptance_rate_per_position"]["unconditional"]) == 1


# ---------------------------------------------------------------------- the same prompts


@pytest.fixture
def python_library(tmp_path, monkeypatch):
    folder = tmp_path / "lib"
    folder.mkdir()
    for n in range(300):
        (folder / f"m{n}.py").write_text(f"# module {n}\n" + "".join(f"x_{i} = {n} + {i}\n" for i in range(20)))
    monkeypatch.setattr(pardec.data.python_sources, "stdlib_folder", lambda: folder)


def data_of(kind: str, folder: Path) -> dict:
    """The data section of a recipe."""
    rows = [{"text": " ".join(f"word {n} of {i}" for i in range(60))} for n in range(50)]
    learned = [{"input_ids": list(range(1, 9 + n)), "loss_mask": [0] * (2 + n) + [1] * 6} for n in range(50)]
    (folder / "one.txt").write_text("\n".join(row["text"] for row in rows))
    for name, lines in (("rows", rows), ("learned", learned)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "one text": {"path": str(folder / "one.txt")},
        "rows": {"path": str(folder / "rows.jsonl")},
        "rows with a mask": {"path": str(folder / "learned.jsonl"), "format": "jsonl"},
        "a file of its own": {"path": str(folder / "rows.jsonl"), "validation_path": str(folder / "one.txt")},
        "the library": {"path": "python-stdlib"},
        "the library for validation": {"path": str(folder / "one.txt"), "validation_path": "python-stdlib"},
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["one text", "rows", "rows with a mask", "a file of its own", "the library", "the library for validation"],
)
@pytest.mark.parametrize("num_prompts", [3, 40])
def test_prompts_are_those_that_training_takes(kind, num_prompts, tmp_path, tokenizer, python_library):
    data = DataConfig(**data_of(kind, tmp_path), max_length=16)
    corpus = load_corpus(data.path, tokenizer, format=data.format, validation_path=data.validation_path, max_length=16)
    expected = standard_prompts(corpus.validation, num_prompts=num_prompts)
    assert validation_prompts(data.model_dump(), tokenizer, num_prompts, **ROOM) == expected


# ---------------------------------------------------------------------- the same again


@pytest.fixture(scope="module")
def recorded(tiny_base, tokenizer, packaged_adapter, tmp_path_factory):
    """A folder with an adapter, and a function that loads it as training would have left it."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "code.txt").write_text(code_text(700))
    data = {"path": str(folder / "code.txt")}
    adapter = packaged_adapter(K, lora_rank=2)
    recipe = Recipe(base="tiny-python", output_dir="-", data=DataConfig(**data)).model_dump()
    recipe["eval"]["num_prompts"] = 3
    adapter.metadata.training.update(recipe=recipe)
    model = SelfSpeculativeModel(tiny_base, tokenizer, adapter)
    prompts = validation_prompts(recipe["data"], tokenizer, 3, **ROOM)
    adapter.metadata.measured.update(split="validation", **measure_held_out(model, prompts, **SETTINGS).to_dict())
    save_adapter(adapter, folder / "run")
    return folder / "run"


def change(run: Path, folder: Path, keys: str, value) -> Path:
    """A copy of the adapter with one value of its pardec.json changed, or with None, removed."""
    shutil.copytree(run, folder / "changed")
    path = folder / "changed" / "pardec.json"
    raw = json.loads(path.read_text())
    *outer, last = keys.split(".")
    section = raw
    for key in outer:
        section = section[key]
    if value is None:
        del section[last]
    else:
        section[last] = value(section[last]) if callable(value) else value
    path.write_text(json.dumps(raw))
    return folder / "changed"


def test_measuring_again_gives_the_stored_record(recorded):
    model = pardec.load(recorded)
    found, rows = measure_again(model)
    stored = {key: value for key, value in model.adapter.metadata.measured.items() if key != "split"}
    assert found.to_dict() == stored
    assert [(row.figure, row.found, row.same_tokens, row.agrees) for row in rows] == [
        (name, stored[name]["mean_acceptance_length"], True, True) for name in ("sampled", "greedy")
    ]


def test_records_of_older_versions_are_measured_again(recorded, tmp_path):
    """They name neither the prompts' digest nor the continuations', batch size and K."""
    model = pardec.load(recorded)
    measured = model.adapter.metadata.measured
    for key in ("prompts_sha256", "batch_size", "num_speculative_tokens", "use_head", "verification"):
        del measured[key]
    measured["sampled"].pop("tokens_sha256")
    _, rows = measure_again(model)
    assert [(row.relative_difference, row.same_tokens) for row in rows] == [(0, None), (0, True)]


def comparison(stored: float, found: float, same_tokens: bool | None) -> Comparison:
    return Comparison("greedy", stored, found, same_tokens, (1.4, 1.6))


@pytest.mark.parametrize(
    ("one", "agrees"),
    [
        (comparison(1.5, 1.5, True), True),
        (comparison(1.5, 1.529, True), True),
        (comparison(1.5, 1.471, True), True),
        (comparison(1.5, 1.531, True), False),
        (comparison(1.5, 1.469, True), False),
        (comparison(1.5, 1.59, False), True),  # another sample
        (comparison(1.5, 1.41, None), True),
        (comparison(1.5, 1.61, False), False),
        (comparison(1.5, 1.39, None), False),
    ],
)
def test_two_percent_of_the_same_sample_or_what_chance_explains_of_another(one, agrees):
    assert one.agrees is agrees


def test_each_stored_figure_is_compared(with_head):
    _, found = with_head
    stored = found.to_dict()
    rows = compare(stored, found)
    assert [row.figure for row in rows] == ["sampled", "greedy", "sampled_without_head"]
    assert all(row.same_tokens and row.found == row.stored for row in rows)
    del stored["sampled_without_head"]
    assert [row.figure for row in compare(stored, found)] == ["sampled", "greedy"]


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (
            "measured.prompts_sha256",
            "0" * 64,
            r"code\.txt: expected the 3 validation .* \(sha256 000000000000\)",
        ),
        ("training.recipe.eval.num_prompts", 2, "found 2"),
        ("measured.greedy", None, "expected a measurement and the recipe that it belongs to, found no greedy"),
        ("training.recipe", None, "found no recipe"),
        ("training.recipe.data.path", "/nowhere.txt", "found nothing at /nowhere.txt"),
    ],
)
def test_what_cannot_be_measured_again_is_refused(recorded, tmp_path, keys, value, words):
    model = pardec.load(change(recorded, tmp_path, keys, value))
    with pytest.raises(ValueError, match=words):
        measure_again(model)


# ---------------------------------------------------------------------- the proof for users


def evaluate(directory: Path, *options: str) -> Ended:
    return run(acceptance.main, directory, *options)


def test_what_was_measured_under_block_verification_is_measured_so_again(recorded, tmp_path):
    options = ("--split", "validation", "--num-prompts", "1", "--max-new-tokens", "8")
    results = [evaluate(recorded, *options, "--verification", name).result for name in ("token", "block")]
    assert [result["verification"] for result in results] == ["token", "block"]
    changed = pardec.load(change(recorded, tmp_path, "measured.verification", lambda value: "block"))
    assert measure_again(changed)[0].settings["verification"] == "block"


def test_an_adapter_that_gives_what_is_stored_is_verified(recorded):
    ended = evaluate(recorded, "--verify")
    assert ended.code == 0
    assert ended.result["verified"]
    rows = ended.result["rows"]
    assert {row["figure"]: row["relative_difference"] for row in rows} == {"sampled": 0, "greedy": 0}


@pytest.mark.parametrize("figure", ["sampled", "greedy"])
def test_a_stored_figure_that_is_3_percent_off_is_found_out(recorded, tmp_path, figure):
    changed = change(recorded, tmp_path, f"measured.{figure}.mean_acceptance_length", lambda value: value * 1.03)
    ended = evaluate(changed, "--verify")
    assert ended.code == 1
    assert not ended.result["verified"]
    assert {row["figure"]: row["agrees"] for row in ended.result["rows"]} == {
        name: name != figure for name in ("sampled", "greedy")
    }


def test_other_options_beside_verify_are_refused(recorded):
    said = evaluate(recorded, "--verify", "--max-new-tokens", "5").error
    assert "expected no options beside it, as it takes what is stored, found --max-new-tokens" in said


def test_a_head_that_is_not_there_is_refused(recorded):
    said = evaluate(recorded, "--head", "on", "--num-prompts", "1", "--max-new-tokens", "4").error
    assert "use_head: expected an adapter with a sampler head, found none" in said
