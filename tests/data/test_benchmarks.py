"""Prompts of evaluations: what each kind of source gives, and what is said of those that cannot be read."""

import json
from collections import Counter
from pathlib import Path

import pytest

from pardec.data.benchmarks import read_prompts
from pardec.data.corpus import held_out_prompts
from pardec.decoding.asking.messages import message_ids
from pardec.target.base import load_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def read(tokenizer):
    def read(source, num_prompts=None, max_prompt_tokens=None, tokenizer=tokenizer, as_chat=False):
        limits = {"num_prompts": num_prompts, "max_prompt_tokens": max_prompt_tokens}
        return read_prompts(str(source), tokenizer, split="validation", as_chat=as_chat, **limits)

    return read


def write_lines(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_python_stdlib_gives_the_standard_prompts_of_the_split(read, tokenizer):
    found = read("python-stdlib", num_prompts=4)
    assert [one.token_ids for one in found] == held_out_prompts(tokenizer, "validation", num_prompts=4)
    assert {one.category for one in found} == {"code"}
    assert len({one.name for one in found}) == 4


def test_what_is_taken_as_it_stands_is_a_message_if_asked_for(read, tokenizer, chat_tokenizer, tmp_path):
    (message,) = message_ids([{"role": "user", "content": "Hello"}], chat_tokenizer)
    (tmp_path / "hello.txt").write_text("Hello")
    rows = write_lines(tmp_path / "rows.jsonl", {"prompt": "Hello"}, {"prompt": "Hello", "task_id": "a"})
    for path in (tmp_path / "hello.txt", rows):
        assert {tuple(one.token_ids) for one in read(path, tokenizer=chat_tokenizer, as_chat=True)} == {tuple(message)}
        with pytest.raises(ValueError, match=r"^messages: expected a tokenizer with a chat template"):
            read(path, as_chat=True)
    with pytest.raises(ValueError, match=r"^chat: expected a file of prompts, found python-stdlib"):
        read("python-stdlib", tokenizer=chat_tokenizer, as_chat=True)


def test_any_other_file_is_one_prompt_as_a_whole(read, tokenizer, tmp_path):
    path = tmp_path / "notes.rst"
    path.write_text("first line\n\nlast line\n")
    (found,) = read(path)
    assert (found.category, found.name) == ("text", "notes.rst")
    assert tokenizer.decode(found.token_ids) == path.read_text()


@pytest.mark.parametrize(("name", "content"), [("a.txt", "x = 1"), ("a.jsonl", '{"prompt": "x = 1"}')])
def test_a_byte_order_mark_is_no_part_of_a_prompt(read, tokenizer, tmp_path, name, content):
    (tmp_path / name).write_text("\ufeff" + content, encoding="utf-8")
    assert [one.token_ids for one in read(tmp_path / name)] == [tokenizer("x = 1").input_ids]


def test_rows_of_jsonl_are_told_apart_by_their_keys(read, tokenizer, tmp_path):
    path = write_lines(
        tmp_path / "mixed.jsonl",
        {"prompt": "a\u2028b", "other": 1},  # a line separator for str.splitlines, none for JSON
        {"task_id": "HumanEval/0", "prompt": "def f():\n", "test": "", "entry_point": "f"},
        {"question_id": 81, "category": "writing", "turns": ["Compose a post.", "Rewrite it."], "reference": []},
    )
    found = read(path)
    assert [(one.category, one.name) for one in found] == [
        ("text", "mixed.jsonl:1"),
        ("code", "HumanEval/0"),
        ("writing", "81"),
    ]
    assert [tokenizer.decode(one.token_ids) for one in found] == ["a\u2028b", "def f():\n", "Compose a post."]


def test_the_first_turn_goes_through_the_chat_template(read, tmp_path):
    chat = load_tokenizer("tiny-python")
    chat.chat_template = TEMPLATE
    row = {"question_id": 1, "category": "qa", "turns": ["Why?", "And then?"]}
    found = read(write_lines(tmp_path / "chat.jsonl", row, {"prompt": "Why?"}), tokenizer=chat)
    assert chat.decode(found[0].token_ids) == chat.bos_token + "<user>Why?<assistant>"
    assert found[0].token_ids[0] == chat.bos_token_id
    assert chat.decode(found[1].token_ids, skip_special_tokens=True) == "Why?"


def test_fewer_prompts_are_taken_evenly(read, tmp_path):
    rows = [{"question_id": i, "category": "abcde"[i // 2], "turns": ["x"]} for i in range(10)]
    found = read(write_lines(tmp_path / "many.jsonl", *rows), num_prompts=5)
    assert [one.category for one in found] == list("abcde")


@pytest.mark.parametrize("num_prompts", [12, 40, 47])
def test_fewer_prompts_of_categories_that_take_turns_leave_none_out(read, tmp_path, num_prompts):
    rows = [{"question_id": i, "category": f"kind {i % 12}", "turns": ["x"]} for i in range(48)]
    found = read(write_lines(tmp_path / "turns.jsonl", *rows), num_prompts=num_prompts)
    assert len({one.name for one in found}) == num_prompts
    counts = Counter(one.category for one in found).values()
    assert len(counts) == 12
    assert max(counts) - min(counts) <= 1


def test_long_prompts_keep_their_end(read, tokenizer, tmp_path):
    path = write_lines(tmp_path / "long.jsonl", {"prompt": "import os\n" * 20}, {"prompt": "x"})
    whole, cut = read(path), read(path, max_prompt_tokens=7)
    assert cut[0].token_ids == whole[0].token_ids[-7:]
    assert cut[1].token_ids == whole[1].token_ids


def test_names_stay_apart_where_ids_repeat(read, tmp_path):
    row = {"question_id": 1, "category": "qa", "turns": ["x"]}
    found = read(write_lines(tmp_path / "joined.jsonl", row, row, row))
    assert [one.name for one in found] == ["1", "1 (joined.jsonl:2)", "1 (joined.jsonl:3)"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "x"}\n\n{"prompt": \n', r":3: expected one JSON object, found Expecting value"),
        (b"[1, 2]\n", r":1: expected one JSON object, found list"),
        (b'{"prompt": "\xff"}\n', r":1: expected UTF-8 text, found invalid start byte at byte 12"),
        (b'{"prompt": "\\ud800"}\n', r":1: expected Unicode text, found half of a surrogate pair"),
        (b'{"text": "x"}\n', r":1: expected one of 'prompt', 'task_id' with .* and 'turns', found 'text'$"),
        (b"{}\n", r":1: expected one of .*, found no keys"),
        (b'{"prompt": "x", "question_id": 1, "category": "c", "turns": ["x"]}', r":1: expected one of .*, found 'prom"),
        (b'{"turns": ["x"], "category": "c"}\n', r":1: expected one of .*, found 'turns', 'category'"),
        (b'{"question_id": 1, "category": "c", "turns": []}\n', r":1: expected turns as a list of texts, found '\[\]'"),
        (b'{"question_id": 1, "category": 2, "turns": ["x"]}\n', r":1: expected a category as text, found '2'"),
        (
            b'{"question_id": [], "category": "c", "turns": ["x"]}\n',
            r":1: expected question_id as a text or an integer",
        ),
        (b'{"task_id": null, "prompt": "x"}\n', r":1: expected task_id as a text or an integer, found 'None'"),
        (b'{"prompt": 3}\n', r":1: expected the prompt as text, found int"),
        (b'{"prompt": " \\n"}\n', r":1: expected some text to continue, found an empty prompt"),
        (b"\n", r"jsonl: expected at least one prompt, found an empty file"),
    ],
)
def test_unusable_lines_are_named(read, tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_unusable_sources_and_limits_are_named(read, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    for name, message in {
        ".": "found a directory",
        "none.jsonl": "expected python-stdlib or a file of prompts, found nothing there",
        "empty.txt": "found an empty prompt",
        "latin.txt": "expected UTF-8 text, found invalid continuation byte at byte 3",
    }.items():
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name)
    with pytest.raises(ValueError, match="num_prompts: expected an integer >= 1, found 0"):
        read("python-stdlib", num_prompts=0)
    with pytest.raises(ValueError, match="max_prompt_tokens: expected an integer >= 1, found -1"):
        read("python-stdlib", max_prompt_tokens=-1)
