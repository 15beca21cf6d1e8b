"""Prompts of the command line's files."""

import io
import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from pardec.data.prompt_files import read_prompts


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "-"])
def test_a_byte_order_mark_is_no_part_of_a_prompt(name, tmp_path, monkeypatch):
    text = json.dumps({"prompt": "def f():"}) if name.endswith("jsonl") else "def f():"
    (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeff" + text))
    assert read_prompts(None, None, "-" if name == "-" else str(tmp_path / name)) == ["def f():"]


def test_line_ends_of_other_systems_stay_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"def f(x):\r\n    return\rx")
    assert read_prompts(None, None, str(tmp_path / "a.txt")) == ["def f(x):\r\n    return\rx"]
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a\\r\\nb"}\r\n{"prompt": "c"}\r\n')
    assert read_prompts(None, None, str(tmp_path / "a.jsonl")) == ["a\r\nb", "c"]


def test_a_pipe_is_read_as_a_file_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        pool.submit((tmp_path / "pipe").write_text, "def f():")
        assert read_prompts(None, None, str(tmp_path / "pipe")) == ["def f():"]


def test_json_that_is_too_deep_names_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 200_000)
    with pytest.raises(ValueError, match=r"a\.jsonl:1: expected a JSON object, found "):
        read_prompts(None, None, str(tmp_path / "a.jsonl"))


def test_lines_with_turns_are_read_for_chats_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"turns": ["Hello", "And then?"]}) + "\n" + json.dumps({"prompt": "Hi"}) + "\n")
    assert read_prompts(None, None, str(path), as_chat=True) == ["Hello", "Hi"]
    with pytest.raises(ValueError, match=r"a\.jsonl:1: expected an object with .* \(turns are read with --chat\)$"):
        read_prompts(None, None, str(path))


@pytest.mark.parametrize("turns", [[], [""], [3], "Hello", [None, "Hello"], ["Hello", 3]])
def test_turns_that_are_not_texts_name_their_line(turns, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"turns": turns}))
    with pytest.raises(ValueError, match=r"a\.jsonl:1: expected an object with .* or with 'turns', found "):
        read_prompts(None, None, str(tmp_path / "a.jsonl"), as_chat=True)
