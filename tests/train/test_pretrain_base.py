"""train/pretrain_base.py: what a run leaves behind, what it can be continued from, and what it refuses."""

import json
import random
import re
import sys
from pathlib import Path

import pretrain_base
import programs
import pytest
import torch
import yaml
from programs import Ended
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pardec.config.pretrain_recipe import PretrainRecipe
from pardec.config.recipe_files import load_recipe
from pardec.data.pretrain_data import encode, example_order, first_texts, held_out_windows, train_tokenizer
from pardec.data.python_sources import TEST, TRAIN, VALIDATION, split_of
from pardec.data.tokenising import Document
from pardec.training.pretraining import set_rates

ROOT = Path(__file__).parents[2]
MAX_LENGTH = 24


def source_text(seed: int) -> str:
    draw = random.Random(seed)
    names = ["value", "total", "index", "größe", "result"]
    lines = [f"def step_{seed}(value, index):"]
    for _ in range(12):
        a, b, c = (draw.choice(names) for _ in range(3))
        lines.append(f"    {a} = {b} + {c} * {draw.randrange(10)}")
    return "\n".join([*lines, "    return value"]) + "\n"


def write_sources(folder: Path, counts: dict[str, int]) -> Path:
    """Files whose names fall into the splits, so many of each."""
    folder.mkdir(parents=True)
    left, number = dict(counts), 0
    while any(left.values()):
        name = f"m{number}.py"
        if left.get(split_of(name), 0):
            left[split_of(name)] -= 1
            (folder / name).write_text(source_text(number), encoding="utf-8")
        number += 1
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = write_sources(tmp_path_factory.mktemp("data") / "sources", {TRAIN: 16, VALIDATION: 2, TEST: 2})
    train_file = next(f for f in sorted(folder.iterdir()) if split_of(f.name) == TRAIN)
    train_file.write_text(train_file.read_text(encoding="utf-8") + "END = '<|endoftext|>'\n", encoding="utf-8")
    return folder


def recipe_values(sources: Path, output: Path) -> dict:
    return {
        "output_dir": str(output),
        "data": {"path": str(sources), "max_length": MAX_LENGTH},
        "tokenizer": {"vocab_size": 300},
        "model": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
        },
        "train": {
            "steps": 20,
            "batch_size": 4,
            "gradient_accumulation_steps": 2,
            "mixed_precision": "no",
            "log_every": 5,
            "checkpoint_every": 10,
        },
        "eval": {"every": 10, "max_tokens": 100_000},
    }


def run(sources: Path, output: Path, *overrides: str) -> Ended:
    recipe = output.parent / f"{output.name}.yaml"
    recipe.write_text(yaml.safe_dump(recipe_values(sources, output)))
    return programs.run(pretrain_base.main, recipe, *overrides)


@pytest.fixture(scope="module")
def finished(sources, tmp_path_factory) -> Path:
    """The folder that an uninterrupted run leaves, on a machine without the package datasets."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(sys.modules, "datasets", None)
        assert run(sources, output).code == 0
    return output


def metrics_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def plain_loss(model, tokenizer, files: list[Path]) -> float:
    """Nats per token, one file and one piece after another."""
    nats, tokens = 0.0, 0
    for file in files:
        ids = [0, *tokenizer(file.read_text(encoding="utf-8")).input_ids]
        for first in range(0, len(ids) - 1, MAX_LENGTH - 1):
            piece = torch.tensor([ids[first : first + MAX_LENGTH]])
            with torch.no_grad():
                log_probs = model(piece).logits[0].log_softmax(-1)
            for row in range(piece.shape[1] - 1):
                nats -= float(log_probs[row, piece[0, row + 1]])
                tokens += 1
    return nats / tokens


def test_a_run_leaves_a_folder_that_transformers_loads(finished, sources):
    expected = {"config.json", "generation_config.json", "model.safetensors", "README.md", "metrics.jsonl"}
    expected |= {"tokenizer.json", "tokenizer_config.json", "checkpoints"}
    assert {file.name for file in finished.iterdir()} == expected
    assert all(t.dtype == torch.bfloat16 for t in load_file(finished / "model.safetensors").values())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.vocab_size) == (0, 0, 300)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.decode([0])) == (0, 0, "<|endoftext|>")
    text = source_text(1000) + "x = 'ü€'  #  two  spaces\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("split", [VALIDATION, TEST])
def test_the_reported_held_out_loss_is_plain_cross_entropy_of_the_stored_weights(finished, sources, split):
    model = AutoModelForCausalLM.from_pretrained(finished, dtype=torch.float32)
    files = [file for file in sorted(sources.iterdir()) if split_of(file.name) == split]
    expected = plain_loss(model, AutoTokenizer.from_pretrained(finished), files)
    assert metrics_of(finished)[-1][f"held_out_loss/{split}"] == pytest.approx(expected, abs=1e-4)
    row = re.search(rf"\| {split} \| 2 \| .* \| (\S+) \|", (finished / "README.md").read_text())
    assert float(row[1]) == pytest.approx(expected, abs=2e-4)


def test_the_loss_falls(finished):
    losses = [line["loss"] for line in metrics_of(finished) if "loss" in line]
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 1


def test_no_file_names_a_folder_of_this_machine(finished, sources):
    for file in finished.rglob("*"):
        if file.suffix in (".json", ".md", ".jsonl"):
            assert str(sources.parent) not in file.read_text()
            assert str(finished.parent) not in file.read_text()
    card = (finished / "README.md").read_text()
    assert "`pretrain_base.py finished.yaml`" in card
    assert "16 training files" in card


def test_a_finished_run_started_again_changes_nothing(finished, sources):
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*")}
    assert "already holds" in run(sources, finished).out
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*")} == before


def test_a_killed_run_continues_to_the_same_weights(finished, sources, tmp_path, monkeypatch):
    output, save_state = tmp_path / "killed", pretrain_base.save_state

    def save_and_die(folder, step, *rest):
        save_state(folder, step, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrain_base, "save_state", save_and_die)
        assert run(sources, output).code == 130  # what a shell says of Ctrl-C
    assert not (output / "model.safetensors").exists()
    left = sorted(file.name for file in (output / "checkpoints" / "step-000000010").iterdir())
    assert left == ["optimizer.safetensors", "parameters.safetensors", "state.json"]

    assert "at step 10" in run(sources, output).out
    assert metrics_of(output) == metrics_of(finished)
    for name in ("model.safetensors", "checkpoints/step-000000020/optimizer.safetensors"):
        ours, theirs = load_file(output / name), load_file(finished / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_checkpoint_is_not_continued_on_other_text(sources, tmp_path):
    other = write_sources(tmp_path / "sources", {TRAIN: 17, VALIDATION: 2, TEST: 2})
    assert run(sources, tmp_path / "run", "train.steps=2").code == 0
    (tmp_path / "run" / "README.md").unlink()
    ended = run(other, tmp_path / "run", "train.steps=2")
    assert ended.code == 2
    assert "expected the text, tokenizer and number of processes (sha256) that it was begun with" in ended.error


def test_a_checkpoint_is_not_continued_by_another_number_of_processes(sources, tmp_path):
    assert run(sources, tmp_path / "run", "train.steps=2").code == 0
    (tmp_path / "run" / "README.md").unlink()
    (file,) = (tmp_path / "run").glob("checkpoints/step-*/state.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_processes": 2}))
    ended = run(sources, tmp_path / "run", "train.steps=2")
    assert "expected the number of processes that it was begun with, 2, found 1" in ended.error


def test_a_loss_that_is_not_finite_ends_with_one_line(sources, tmp_path):
    ended = run(sources, tmp_path / "run", "train.muon_learning_rate=1e30")
    assert ended.code == 2
    assert ended.err.splitlines()[-1].startswith("error: step 2: expected a finite loss")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stesp=3", "unknown key: expected one such as 'train.steps', found 'train.stesp'"),
        ("outptu_dir=x", "unknown key: expected one such as 'output_dir', found 'outptu_dir'"),
        ("tokenizer.vocab_size=256", "tokenizer.vocab_size: expected a number greater than or equal to 257"),
        ("tokenizer.vocab_size=9000", "tokenizer.vocab_size: expected at most"),
        ("model.num_attention_heads=5", "model.hidden_size: expected a multiple of 2 x 5"),
        ("model.num_key_value_heads=3", "model.num_attention_heads: expected a multiple of 3"),
        ("data.max_length=65", "data.max_length: expected at most 64"),
        ("data.max_characters=10", "data.max_characters: expected room for at least one file, found 10"),
        ("data.path=EMPTY", "expected Python sources of 200 B to 400 kB, found none"),
        ("data.path=NOWHERE", "expected python-stdlib or a folder of Python sources, found nothing"),
        ("data.path=UNSPLIT", "found none of validation among 3"),
        ("train.mixed_precision=fp16", "train.mixed_precision: expected 'auto', 'no' or 'bf16'"),
        ("train.steps=[", "expected YAML"),
    ],
)
def test_unusable_input_is_refused_in_one_line_before_output_dir(override, message, sources, tmp_path, monkeypatch):
    (tmp_path / "EMPTY").mkdir()
    write_sources(tmp_path / "UNSPLIT", {TRAIN: 3})
    monkeypatch.chdir(tmp_path)
    ended = run(sources, tmp_path / "output", override)
    assert message in ended.error
    assert ended.err == f"{ended.error}\n"
    assert not (tmp_path / "output").exists()


def test_a_folder_with_another_model_is_refused(sources, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "model.safetensors").write_bytes(b"theirs")
    assert "expected a new folder or a run to continue, found a model" in run(sources, tmp_path / "output").error
    assert (tmp_path / "output" / "model.safetensors").read_bytes() == b"theirs"


def test_separators_in_sources_are_text():
    texts = [source_text(i) for i in range(4)] + ["a = '<|endoftext|>'\n"]
    documents = encode(texts, train_tokenizer(texts, 300))
    assert [document.input_ids[0] for document in documents] == [0] * 5
    assert not any((document.input_ids[1:] == 0).any() for document in documents)


def test_windows_predict_every_token_once_and_are_limited_evenly():
    documents = [Document(torch.arange(start, start + n).numpy()) for start, n in ((0, 9), (100, 2), (200, 5))]
    windows = held_out_windows(documents, 5, 1000)
    assert max(map(len, windows)) == 5
    predicted = [int(token) for window in windows for token in window[1:]]
    assert predicted == [*range(1, 9), 101, *range(201, 205)]
    assert sum(len(window) - 1 for window in held_out_windows(documents, 5, 8)) <= 8


def test_each_pass_over_the_sequences_is_another_permutation():
    order = example_order(6, (3, 1, 2, 2), seed=3)
    assert order.shape == (3, 1, 2, 2)
    first, second = order.flatten()[:6].tolist(), order.flatten()[6:].tolist()
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second
    assert (example_order(6, (3, 1, 2, 2), seed=3) == order).all()


def test_rates_are_constant_and_then_fall_linearly():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    rates = []
    for step in range(1, 11):
        set_rates([optimizer], step, 10, 0.4)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([2.0] * 7 + [1.5, 1.0, 0.5])


def test_texts_are_taken_up_to_a_number_of_characters():
    assert first_texts(["aaa", "bb", "c"], 5) == ["aaa", "bb"]
    assert first_texts(["aaa"], 2) == []


@pytest.mark.parametrize(("name", "parameters"), [("pretrain_tiny_python", 5_476_608), ("pretrain_100m_gpu", 102e6)])
def test_recipes_have_the_sizes_that_they_name(name, parameters):
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", (), PretrainRecipe)
    with torch.device("meta"):
        model = pretrain_base.build_model(recipe)
    assert model.num_parameters() == pytest.approx(parameters, rel=0.01)
