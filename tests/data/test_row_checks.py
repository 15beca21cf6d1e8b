"""What a row must be, and what is said of one that is not."""

import pytest
from data_samples import CHAT, write_jsonl

from pardec.data.reading import read_rows
from pardec.data.row_checks import DataError, check_row


def test_older_conversation_keys_are_understood(tmp_path):
    old = [
        {"from": "system", "value": "Be short"},
        {"from": "human", "value": "Say hi"},
        {"from": "gpt", "value": "hi"},
    ]
    path = write_jsonl(tmp_path / "old.jsonl", [{"conversations": old}])
    assert read_rows(path, "auto")[0]["conversations"] == [
        {"role": "system", "content": "Be short"},
        {"role": "user", "content": "Say hi"},
        {"role": "assistant", "content": "hi"},
    ]


def test_an_empty_column_does_not_hide_another():
    """Tables have every column in every row, null where there is nothing."""
    row = check_row({"text": None, "input_ids": None, "conversations": None, "messages": CHAT[:2]}, "here")
    assert row["conversations"] == CHAT[:2]
    row = check_row({"text": "plain", "input_ids": None, "conversations": None, "messages": None}, "here")
    assert row["text"] == "plain"


MALFORMED = {
    "not json": ("{'text': 1}", "expected one JSON object"),
    "cut off": ('{"text": "a', "expected one JSON object"),
    "two objects": ('{"text": "a"} {"text": "b"}', "expected one JSON object"),
    "not utf-8": (b'{"text": "\xff"}', "expected UTF-8 text, found invalid start byte at byte 10"),
    "utf-16": ('{"text": "a"}'.encode("utf-16"), "expected UTF-8 text, found invalid start byte at byte 0"),
    "utf-16 without a mark": ('{"text": "a"}'.encode("utf-16-le"), "expected one JSON object"),
    "a list": ('["text"]', "expected a JSON object, found list"),
    "a string": ('"text"', "expected a JSON object, found str"),
    "null": ("null", "expected a JSON object, found NoneType"),
    "no keys": ("{}", "found no keys"),
    "other keys": ('{"prompt": "a", "answer": "b"}', "expected non-empty 'text', .*found prompt, answer"),
    "empty text": ('{"text": "  "}', "expected non-empty 'text', .*found text ' '$"),
    "text of numbers": ('{"text": [1]}', "expected non-empty 'text', .*found text \\[1\\]$"),
    "null text": ('{"text": null}', "expected non-empty 'text'"),
    "ids without mask": ('{"input_ids": [1, 2]}', "expected a loss_mask of 2 entries, found None"),
    "short mask": ('{"input_ids": [1, 2], "loss_mask": [1]}', "expected a loss_mask of 2 entries, found 1"),
    "mask of text": ('{"input_ids": [1, 2], "loss_mask": "11"}', "expected a loss_mask of 2 entries"),
    "mask of strings": ('{"input_ids": [1, 2], "loss_mask": ["a", "0"]}', "expected a loss_mask"),
    "mask all 0": ('{"input_ids": [1, 2], "loss_mask": [0, 0]}', "expected a loss_mask with at least one"),
    "no ids": ('{"input_ids": [], "loss_mask": []}', "expected input_ids as a list of token ids"),
    "ids of text": ('{"input_ids": "12", "loss_mask": [1, 1]}', "expected input_ids as a list of token ids"),
    "float ids": ('{"input_ids": [1.5], "loss_mask": [1]}', "expected input_ids as a list of token ids"),
    "negative ids": ('{"input_ids": [-1], "loss_mask": [1]}', "expected input_ids as a list of token ids"),
    "boolean ids": ('{"input_ids": [true], "loss_mask": [1]}', "expected input_ids as a list of token ids"),
    "ids beyond 32 bits": ('{"input_ids": [4294967296], "loss_mask": [1]}', "expected input_ids"),
    "conversation of text": ('{"conversations": "hi"}', "expected turns with role and content, found 'hi'"),
    "turn of text": ('{"conversations": ["hi"]}', "expected turns with role and content, found 'hi'"),
    "turn without role": ('{"messages": [{"content": "hi"}]}', "expected turns with role and content"),
    "turn without content": ('{"messages": [{"role": "user"}]}', "expected turns with role and content"),
    "content in parts": ('{"messages": [{"role": "user", "content": [{}]}]}', "expected turns with role and"),
    "an image": (
        '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "expected turns of text, found a part"
    ),
    "null content": ('{"messages": [{"role": "user", "content": null, "name": "n"}]}', "expected turns with role"),
    "tools of text": ('{"messages": [{"role": "gpt", "content": "a"}], "tools": "x"}', "expected tools as a list"),
    "a tool of text": ('{"messages": [{"role": "gpt", "content": "a"}], "tools": ["x"]}', "expected tools as a list"),
    "half a character": (
        '{"messages": [{"role": "gpt", "content": "", "reasoning": "\\ud800"}]}', "expected Unicode text, found half"
    ),
    "too deep": ("[" * 200_000, "expected one JSON object"),
    "no assistant": ('{"messages": [{"role": "user", "content": "hi"}]}', "expected at least one assistant"),
    "no turns": ('{"conversations": []}', "expected at least one assistant turn"),
}  # fmt: skip


TURNS_BY_TURN = {
    "keys": ({"role": "assistant", "content": "x", "reasoning_content": "y", "name": "z"}, None),
    "older keys": ({"from": "gpt", "value": "x", "weight": 1}, {"role": "assistant", "content": "x", "weight": 1}),
    "older keys of a table": (
        {"from": "gpt", "value": "x", "role": None, "content": None},
        {"role": "assistant", "content": "x"},
    ),
    "older role": ({"role": "gpt", "content": "x"}, {"role": "assistant", "content": "x"}),
    "null beside calls": ({"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}, None),
    "calls alone": ({"role": "assistant", "tool_calls": [{"id": "c"}]}, None),
    "parts": ({"role": "assistant", "content": [{"type": "text", "text": "x"}]}, None),
    "keys of a table": (
        {"role": "assistant", "content": "x", "tool_calls": None, "name": None, "from": None},
        {"role": "assistant", "content": "x"},
    ),
}


@pytest.mark.parametrize("case", TURNS_BY_TURN)
def test_turns_keep_what_they_have(case):
    turn, expected = TURNS_BY_TURN[case]
    question = {"role": "user", "content": "q"}
    row = check_row({"messages": [question, turn]}, "here")
    assert row["conversations"] == [question, expected or turn]


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'], ids=["list", "JSON of a list"])
def test_tools_of_a_row_are_kept(tools):
    assert check_row({"messages": CHAT, "tools": tools}, "here")["tools"] == [{"name": "f"}]
    assert check_row({"messages": CHAT, "tools": None}, "here")["tools"] is None


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, case):
    line, message = MALFORMED[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: .*{message}") as caught:
        read_rows(str(path), "auto")
    assert "\n" not in str(caught.value)


def test_a_system_prompt_beside_a_conversation_stands_in_front_of_it(tmp_path):
    turns = [{"from": "human", "value": "hi"}, {"from": "chatgpt", "value": "ho"}]
    row = check_row({"system": "You are a pirate.", "conversations": turns}, "here")
    assert [(turn["role"], turn["content"]) for turn in row["conversations"]] == [
        ("system", "You are a pirate."),
        ("user", "hi"),
        ("assistant", "ho"),
    ]
    both = [{"role": "system", "content": "x"}, *turns]
    with pytest.raises(DataError, match="here: expected one system prompt, found one beside the conversation"):
        check_row({"system": "y", "conversations": both}, "here")
    with pytest.raises(DataError, match="here: expected system as text, found 3"):
        check_row({"system": 3, "conversations": turns}, "here")
