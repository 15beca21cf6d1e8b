"""What is accepted, aimed at and possible: figures of the public API, minutes of all trainings, the floor."""

import json
import shutil

import acceptance_targets
import pytest
from programs import run

import pardec
from pardec.adapters.files import load_adapter, save_adapter
from pardec.data.corpus import held_out_prompts

LAW = {"temperature": 0.8, "top_k": 10}


@pytest.fixture(scope="module")
def trained(packaged_adapter, tmp_path_factory):
    """Folder of an adapter with a LoRA, and one that went on from it and has a head; both say what they took."""
    folder = tmp_path_factory.mktemp("trained")
    lora, head = packaged_adapter(lora_rank=2), packaged_adapter(lora_rank=2, head_width=8)
    lora.metadata.training = {"cpu_minutes": 2.5, "recipe": {"adapter": {"start_from": None}}}
    head.metadata.training = {"cpu_minutes": 1.25, "recipe": {"adapter": {"start_from": str(folder / "lora")}}}
    save_adapter(lora, folder / "lora")
    head.metadata.training["started_from"] = load_adapter(folder / "lora").metadata.files
    save_adapter(head, folder / "head")
    return folder


def floor_file(path, **changed):
    """As eval/floor.py leaves one, of two drafted tokens."""
    row = {"blind": {"mean": [0.5, 0.25], "mean_acceptance_length": 1.75}}
    row["behind_one"] = {"mean": [1.0, 0.5], "mean_acceptance_length": 2.5}
    facts = {"base": "tiny-python", "data": "python-stdlib", "split": "test", "num_futures": 4, **LAW}
    path.write_text(json.dumps({**facts, "rows": [row], **changed}))
    return path


@pytest.fixture(scope="module")
def ended(trained, adapters, tmp_path_factory):
    stem = tmp_path_factory.mktemp("found") / "found"
    floor = floor_file(stem.with_name("floor.json"))
    arguments = (adapters / "embeddings", trained / "head", "--floor", floor, "--quick", "--output", stem)
    ended = run(acceptance_targets.main, *arguments)
    assert ended.code == 0, ended.err[-2000:]
    return ended, stem


def test_figures_are_those_of_generate(ended, trained):
    model = pardec.load(trained / "head")
    prompts = held_out_prompts(model.tokenizer, "test", num_prompts=2)
    embeddings, without, with_head = ended[0].result["rows"]
    for row, use_head in ((without, False), (with_head, True)):
        for way, law in (("sampled", {**LAW, "seed": 0}), ("greedy", {})):
            stats = model.generate(prompts, max_new_tokens=8, use_head=use_head, **law).stats
            assert row[way]["mean_acceptance_length"] == pytest.approx(stats.mean_acceptance_length, abs=1e-4)
            assert len(row[way]["pairs"]) == 2
    assert embeddings["parts"] == "mask embeddings"


def test_minutes_are_those_of_all_trainings_and_unknown_without_a_record(ended):
    assert [row["cpu_minutes"] for row in ended[0].result["rows"]] == [None, 3.75, 3.75]


def test_what_a_run_went_on_from_may_have_moved_with_it_but_not_have_changed(trained, packaged_adapter, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    (trained / "lora").rename(trained / "elsewhere")
    try:
        assert acceptance_targets.training_minutes(moved / "head") == 3.75
        other = packaged_adapter(lora_rank=3)
        other.metadata.training = {"cpu_minutes": 100.0}
        save_adapter(other, moved / "lora")
        assert acceptance_targets.training_minutes(moved / "head") is None
        shutil.rmtree(moved / "lora")
        assert acceptance_targets.training_minutes(moved / "head") is None
    finally:
        (trained / "elsewhere").rename(trained / "lora")


def test_floor_is_that_of_drafts_that_see_as_much(ended):
    embeddings, without, with_head = ended[0].result["rows"]
    assert [row["floor"] for row in (embeddings, without, with_head)] == [1.75, 1.75, 2.5]
    for row in (embeddings, without, with_head):
        reached = row["sampled"]["mean_acceptance_length"] - 1
        assert row["share"] == pytest.approx(reached / (row["floor"] - 1), abs=1e-4)


def test_page_has_aims_beside_what_was_reached(ended):
    page = ended[1].with_suffix(".md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| head | LoRA and head | 2 | 3.8 |"))
    assert "| 2.70 | 2.90 | 89 | 2.50 |" in row


def test_a_floor_of_other_drafts_is_left_out_and_of_another_law_refused(trained, tmp_path):
    deeper = {"blind": {"mean": [0.5] * 3, "mean_acceptance_length": 2.0}}
    deeper["behind_one"] = deeper["blind"]
    arguments = (trained / "lora", "--quick", "--output", tmp_path / "x", "--floor")
    ended = run(acceptance_targets.main, *arguments, floor_file(tmp_path / "deeper.json", rows=[deeper]))
    assert [row["floor"] for row in ended.result["rows"]] == [None]
    ended = run(acceptance_targets.main, *arguments, floor_file(tmp_path / "hot.json", temperature=1.0))
    assert ended.error.endswith("expected temperature 0.8, as adapters are measured, found 1.0")
    ended = run(acceptance_targets.main, *arguments, tmp_path / "none.json")
    assert "expected a file that eval/floor.py has written, found nothing at" in ended.error
    (tmp_path / "other.json").write_text("{}")
    ended = run(acceptance_targets.main, *arguments, tmp_path / "other.json")
    assert "expected a file that eval/floor.py has written, found another at" in ended.error
