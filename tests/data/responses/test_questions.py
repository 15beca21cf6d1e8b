"""Questions of JSONL files: where they stand, which of them are held out, and what is no question."""

import pytest
from data_samples import CHAT, write_jsonl

from pardec.data.responses.questions import training_questions
from pardec.data.row_checks import DataError


def user(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("key", ["prompt", "question", "instruction", "text"])
def test_a_text_is_one_turn_of_the_users(tmp_path, key):
    path = write_jsonl(tmp_path / "q.jsonl", [{"answer": "4", key: " What is 2 + 2?\n", "id": None}])
    assert training_questions(path) == [user("What is 2 + 2?")]


def test_turns_end_with_the_last_of_the_users(tmp_path):
    older = [{"from": "human", "value": "Say"}, {"from": "gpt", "value": "hi"}]
    rows = [{}, {"messages": CHAT}, {"conversations": older}, {"messages": user("alone")}]
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": "held out"}, *rows[1:]])
    assert training_questions(path) == [CHAT[:3], user("Say"), user("alone")]


def test_one_question_in_twenty_is_held_out(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [{"question": f"q{n}"} for n in range(45)])
    assert training_questions(path) == [user(f"q{n}") for n in range(45) if n % 20]


def test_the_key_may_be_named(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "not this", "problem": "this"}])
    assert training_questions(path, "problem") == [user("this")]


@pytest.mark.parametrize(
    ("row", "key", "message"),
    [
        ({"answer": "4"}, None, "expected a question under prompt or question or .*, found answer$"),
        ({"question": "x"}, "problem", "expected a question under problem, found question$"),
        ({}, None, "expected a question under .*, found no keys$"),
        ({"question": 3}, None, "expected question as text or turns with one of the user's, found 3$"),
        ({"question": " "}, None, "expected question as text or turns with one of the user's, found ' '$"),
        ({"question": "\ud800"}, None, "expected Unicode text, found half of a surrogate pair$"),
        ({"messages": CHAT[1:2]}, None, "expected messages as text or turns with one of the user's, found "),
        ({"messages": [{"role": "user"}]}, None, "expected turns with role and content, found "),
        ({"messages": [{"role": "user", "tool_calls": [1]}]}, None, "expected messages as text or turns with one of"),
        ([1], None, "expected a JSON object, found list$"),
    ],
)
def test_a_row_without_a_question_is_named(tmp_path, row, key, message):
    path = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "a", "problem": "b"}, row])
    with pytest.raises(DataError, match=rf"q\.jsonl:2: {message}"):
        training_questions(path, key)


def test_a_file_without_questions_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, message in (("empty.jsonl", "expected at least one question, found none"), ("no.jsonl", "found nothing")):
        with pytest.raises(DataError, match=message):
            training_questions(str(tmp_path / name))
