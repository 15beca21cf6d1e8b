"""train/generate_questions.py: what a run writes, what it is continued from, and what it refuses."""

import json
import shutil

import generate_questions
import programs
import pytest
from transformers import AutoTokenizer

from pardec.data.responses.questions import training_questions
from pardec.data.responses.response_file import only_writer
from pardec.model import SelfSpeculativeModel
from pardec.target.base import resolve_base

END = ")"  # a text that the packaged model writes soon
NUM = 48  # which take three batches


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The packaged model with a template of which the user's turn is the body of a function."""
    folder = tmp_path_factory.mktemp("base") / "chat"
    shutil.copytree(resolve_base("tiny-python"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "def f(self, x):\n    {{ messages[0].content }}" + END + "\n"
    tokenizer.save_pretrained(folder)
    return folder


def run(base, output, *options):
    return programs.run(
        generate_questions.main,
        base,
        "--output",
        output,
        *(() if "--max-new-tokens" in options else ("--max-new-tokens", 24)),
        *options,
    )


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """A run of several batches."""
    output = tmp_path_factory.mktemp("whole") / "own.jsonl"
    ended = run(base, output, "--num-questions", NUM)
    assert ended.code == 0, ended.err
    assert f"{NUM} questions" in ended.out
    return output


def test_questions_are_as_many_as_asked_for_and_differ(whole):
    rows = rows_of(whole)
    texts = [row["prompt"] for row in rows]
    assert len(texts) == len(set(texts)) == NUM
    assert all(len(text) >= 12 and END not in text for text in texts)
    assert rows[-1]["batch"] >= 2
    about = json.loads(whole.with_name("own.jsonl.json").read_text())
    assert about["recipe"]["temperature"] == 1.0
    asked = [turns[0]["content"] for turns in training_questions(str(whole))]
    assert set(asked) <= set(texts)
    assert len(asked) == NUM - 3  # one in twenty is held out


def test_a_run_that_was_cut_off_leaves_what_an_uninterrupted_one_does(base, whole, tmp_path):
    output = tmp_path / "own.jsonl"
    shutil.copy(whole.with_name("own.jsonl.json"), tmp_path)
    lines = whole.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:25]) + lines[25][:20])  # killed within a line
    assert run(base, output, "--num-questions", NUM).code == 0
    assert output.read_bytes() == whole.read_bytes()


def test_a_run_for_more_goes_on_from_fewer(base, whole, tmp_path):
    output = tmp_path / "own.jsonl"
    assert run(base, output, "--num-questions", 7).code == 0
    assert len(rows_of(output)) == 7
    assert run(base, output, "--num-questions", NUM).code == 0
    assert output.read_bytes() == whole.read_bytes()


def test_a_run_for_no_more_leaves_what_is_there(base, whole, tmp_path, monkeypatch):
    output = tmp_path / "own.jsonl"
    shutil.copy(whole.with_name("own.jsonl.json"), tmp_path)
    output.write_bytes(whole.read_bytes() + b'{"prom')  # another was killed while it went on
    monkeypatch.setattr(SelfSpeculativeModel, "generate", None)  # nothing is asked
    for fewer in (NUM, 7):
        ended = run(base, output, "--num-questions", fewer)
        assert (ended.code, ended.out.split()[0]) == (0, str(NUM))
        assert output.read_bytes() == whole.read_bytes()


def test_a_second_run_to_one_file_is_refused_while_the_first_writes(base, whole, tmp_path):
    output = tmp_path / "own.jsonl"
    shutil.copy(whole.with_name("own.jsonl.json"), tmp_path)
    shutil.copy(whole, output)
    with only_writer(output):
        assert "expected no other run that writes there, found one" in run(base, output, "--num-questions", 60).error
    assert output.read_bytes() == whole.read_bytes()


def test_questions_asked_eight_at_a_time_come_in_batches_of_eight_and_are_continued_so(base, whole, tmp_path):
    output = tmp_path / "own.jsonl"
    assert run(base, output, "--num-questions", 6, "--batch-size", 8).code == 0
    assert run(base, output, "--num-questions", 20, "--batch-size", 8).code == 0
    batches = [row["batch"] for row in rows_of(output)]
    assert len(batches) == 20
    assert max(map(batches.count, batches)) <= 8
    assert "batch_size = 32" in run(base, output, "--num-questions", NUM).error


def test_what_cannot_be_used_is_told_before_anything_is_written(base, whole, tmp_path):
    output = tmp_path / "own.jsonl"
    assert "expected an integer >= 1, found 0" in run(base, output, "--num-questions", 0).error
    assert "--batch-size: expected an integer >= 1, found 0" in run(base, output, "--batch-size", 0).error
    assert "ends in .jsonl, found" in run(base, tmp_path / "own.txt").error
    assert "temperature" in run(base, whole, "--temperature", 0.5).error
    assert "chat template" in run("tiny-python", output).error
    assert list(tmp_path.iterdir()) == []
    foreign = tmp_path / "own.jsonl"
    foreign.write_text('{"prompt": "Mine?"}\n')
    assert "found one without own.jsonl.json" in run(base, foreign).error
    shutil.copy(whole.with_name("own.jsonl.json"), tmp_path)
    assert "rows with prompt and batch" in run(base, foreign).error
    assert foreign.read_text() == '{"prompt": "Mine?"}\n'


def test_a_model_that_asks_nothing_new_is_told(base, tmp_path, monkeypatch):
    monkeypatch.setattr(generate_questions, "MAX_IN_VAIN", 2)
    ended = run(base, tmp_path / "own.jsonl", "--max-new-tokens", 1)
    assert "expected new questions where its template lets the user speak, found none in 64 tries" in ended.error
