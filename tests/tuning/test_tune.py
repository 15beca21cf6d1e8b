"""`pardec tune` on the packaged model: what it prints, what it writes, and that loading uses it."""

import builtins
import json
import shutil

import pytest
from typer.testing import CliRunner

import pardec
from pardec.adapters.tuned import TUNED_FILE, read_tuned
from pardec.cli import app
from pardec.layout import PLAIN
from pardec.tuning.measuring import QUICK
from pardec.tuning.tune import prompts_to_tune_on, tune

K = 2


@pytest.fixture
def saved(adapters):
    return adapters / "lora"


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("def main():", "import os", "class A:")))
    return str(path)


def run(*arguments: str):
    return CliRunner().invoke(app, ["tune", *arguments])


def test_quick_tuning_writes_what_it_chose_and_prints_a_table(saved, tmp_path, prompts):
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    picture = tmp_path / "new" / "cost.png"
    few = ("--quick", "--prompt-file", prompts, "--max-new-tokens", "6", "--picture", str(picture))
    result = run(str(folder), *few)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    for words in ("3 prompts, 6 new tokens, batch 1, greedy", "plain", "prefill included", "without tuning: 2 2 2"):
        assert words in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    (choice,) = json.loads((folder / TUNED_FILE).read_text())["choices"]
    assert str(folder / TUNED_FILE) in result.stdout.replace("\n", "")
    assert len(choice["conditional_acceptance"]) == K
    # random mask tokens draft in vain, so nothing can be faster than plain decoding but by the clock's noise
    assert choice["measured_tokens_per_second"] >= choice["plain_tokens_per_second"]


def test_standard_prompts_batches_and_json(saved, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    result = run(
        str(folder), "--quick", "--num-prompts", "3", "--batch-size", "2", "--max-new-tokens", "4",
        "--temperature", "0.8", "--top-k", "10", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["num_prompts"] == 2  # the third fills no batch
    assert found["choice"]["temperature"] == 0.8
    assert found["choice"]["batch_size"] == 2
    shapes = [tuple(one["block_lengths"]) for one in found["measured"]]
    assert {PLAIN, (2, 2, 2)} <= set(shapes)
    assert found["measured"][0]["measured_tokens_per_second"] == max(
        one["measured_tokens_per_second"] for one in found["measured"]
    )
    tuned = pardec.load(folder).tuned
    assert tuned is not None
    assert tuned.block_lengths == tuple(found["choice"]["block_lengths"])


def test_generation_uses_the_choice_unless_told_otherwise(saved, tmp_path):
    from pardec.adapters.tuned import TunedChoice, weights_of, write_tuned
    from pardec.run import device_name

    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    model = pardec.load(folder)
    untuned = model.generate("def main():", max_new_tokens=8)
    assert untuned.stats.num_draft_tokens == K * untuned.stats.num_drafts
    name = device_name(model.target.device)
    choice = TunedChoice(name, "float32", False, (1, 1), weights_of(folder), 1.0, 2.0, 2.0, 1.0, [0.5, 0.5])
    write_tuned(folder, choice)
    tuned = pardec.load(folder)
    out = tuned.generate("def main():", max_new_tokens=8)
    assert out.stats.num_draft_tokens == out.stats.num_drafts > 0
    assert out.token_ids == untuned.token_ids
    told = tuned.generate("def main():", max_new_tokens=8, num_speculative_tokens=2)
    assert told.stats.num_draft_tokens == 2 * told.stats.num_drafts
    (folder / TUNED_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"tuned\.json: expected JSON, found"):
        pardec.load(folder)


def test_without_matplotlib_there_is_a_line_instead_of_a_picture(saved, tmp_path, prompts, monkeypatch):
    folder, imported = tmp_path / "adapter", builtins.__import__
    shutil.copytree(saved, folder)

    def without(name, *rest, **named):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return imported(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    picture = tmp_path / "cost.png"
    few = ("--quick", "--prompt-file", prompts, "--num-prompts", "1", "--max-new-tokens", "3")
    result = run(str(folder), *few, "--picture", str(picture))
    assert result.exit_code == 0, result.output
    assert "no picture: No module named 'matplotlib'; pip install 'pardec[plots]'" in result.stdout.replace("\n", " ")
    assert not picture.exists()
    assert read_tuned(folder, "another device", "float32") is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch-size", "5", "--num-prompts", "2"], "batch_size: expected 1 to 2, the number of prompts, found 5"),
        (["--num-prompts", "0"], "num_prompts: expected an integer >= 1, found 0"),
        (["--max-new-tokens", "1"], "max_new_tokens: expected at least 2, to time a step, found 1"),
        (["--temperature", "-1"], "temperature: expected"),
        (["--max-new-tokens", "2048"], "expected at most 2048 positions"),
        (["--prompt-file", "/nowhere"], "/nowhere: expected a prompt file, found nothing"),
        (["--dtype", "float31"], "dtype: expected a torch dtype"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(saved, prompts, arguments, words):
    result = run(str(saved), "--quick", "--prompt-file", prompts, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert not (saved / TUNED_FILE).exists()


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    result = run(str(tmp_path))
    assert result.exit_code == 2
    assert "expected an adapter directory with pardec.json" in result.stderr


def test_a_folder_that_cannot_be_written_to_is_refused_before_measuring(saved, prompts, monkeypatch):
    from pardec.tuning import tune as story

    def refuse(directory):
        raise OSError(f"{directory}: expected an adapter folder that can be written to, found Read-only file system")

    monkeypatch.setattr(story, "check_writable", refuse)
    monkeypatch.setattr(story, "measure", lambda *args: pytest.fail("measured"))
    result = run(str(saved), "--quick", "--prompt-file", prompts)
    assert result.exit_code == 2
    assert "Read-only file system" in result.stderr


def test_a_model_without_adapter_or_tokenizer_is_refused(tiny_base, saved):
    from pardec.model import SelfSpeculativeModel

    bare = SelfSpeculativeModel(tiny_base, None, None)
    with pytest.raises(ValueError, match="expected one with an adapter, found none"):
        tune(bare, saved, [[1, 2]], effort=QUICK)
    with pytest.raises(ValueError, match="expected a tokenizer beside the model, found none"):
        prompts_to_tune_on(bare, None, 1)
