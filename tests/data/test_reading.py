"""Reading and validating rows, and what is said of those that cannot be used."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import CHAT, write_jsonl

import pardec.data.python_sources
from pardec.data.corpus import load_corpus
from pardec.data.python_sources import STDLIB, TRAIN, VALIDATION, python_sources
from pardec.data.reading import DataError, check_row, held_out_rows, read_rows, training_rows
from pardec.data.tokenising import tokenise


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.rst"])
def test_a_text_file_is_one_row(tmp_path, name):
    (tmp_path / name).write_text("grüße\nzwei\n", encoding="utf-8")
    assert read_rows(str(tmp_path / name), "auto") == [{"text": "grüße\nzwei\n"}]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "empty line.jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    content = {"a.txt": "hello", "a.jsonl": '{"text": "hello"}', "empty line.jsonl": '\n{"text": "hello"}'}[name]
    (tmp_path / name).write_text("\ufeff" + content, encoding="utf-8")
    assert read_rows(str(tmp_path / name), "auto") == [{"text": "hello"}]


def test_any_suffix_is_text_if_the_format_says_so(tmp_path):
    (tmp_path / "a.log").write_text("hello")
    assert read_rows(str(tmp_path / "a.log"), "text") == [{"text": "hello"}]
    with pytest.raises(
        DataError, match=r"a\.log: expected a file ending in \.txt, .*\.json or data\.format, found '\.log'"
    ):
        read_rows(str(tmp_path / "a.log"), "auto")


def test_a_folder_of_texts_is_read_in_order_of_paths(tmp_path):
    for name, text in (("b.txt", "two"), ("a/z.md", "one"), ("c.csv", "no"), ("d.py", " \n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_rows(str(tmp_path), "auto") == [{"text": "one"}, {"text": "two"}]


def test_a_folder_named_like_a_file_is_no_file(tmp_path):
    (tmp_path / "notes.md").mkdir()
    (tmp_path / "notes.md" / "a.txt").write_text("inside")
    assert read_rows(str(tmp_path), "auto") == [{"text": "inside"}]


def test_text_that_is_not_utf8_names_file_and_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"a\.txt: expected UTF-8 text, found .* at byte 3"):
        read_rows(str(tmp_path), "auto")


def test_jsonl_rows_of_every_kind(tmp_path):
    rows = [
        {"text": "plain"},
        {"conversations": CHAT[:2]},
        {"messages": CHAT[:2]},
        {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows))  # empty lines between
    found = read_rows(str(path), "auto")
    assert found[0] == rows[0]
    assert found[1]["conversations"] == found[2]["conversations"] == CHAT[:2]
    assert found[3].items() >= rows[3].items()
    assert [row.get("where") for row in found] == [None, *(f"{path}:{line}" for line in (3, 5, 7))]


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
    "not utf-8": (b'{"text": "\xff"}', "expected one JSON object"),
    "a list": ('["text"]', "expected a JSON object, found list"),
    "a string": ('"text"', "expected a JSON object, found str"),
    "null": ("null", "expected a JSON object, found NoneType"),
    "no keys": ("{}", "found no keys"),
    "other keys": ('{"prompt": "a", "answer": "b"}', "expected non-empty 'text', .*found prompt, answer"),
    "empty text": ('{"text": "  "}', "expected non-empty 'text'"),
    "text of numbers": ('{"text": [1]}', "expected non-empty 'text'"),
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


@pytest.mark.parametrize("format", ["auto", "text", "jsonl"])
def test_a_missing_path_is_named(tmp_path, format):
    with pytest.raises(DataError, match=r"data: expected a file or folder, found nothing at .*nowhere\.jsonl"):
        read_rows(str(tmp_path / "nowhere.jsonl"), format)


def test_a_folder_cannot_be_jsonl(tmp_path):
    with pytest.raises(DataError, match=str(tmp_path)):
        read_rows(str(tmp_path), "jsonl")


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.txt", "folder"])
def test_no_data_is_refused(tmp_path, name):
    if name == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("\n \n")
    with pytest.raises(DataError, match=rf"{name}: expected at least one row of data, found none"):
        read_rows(str(tmp_path / name), "auto")


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    """`datasets` writes its cache below the test's folder and stays off the network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def write_parquet(folder, rows, split="train"):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.mark.usefixtures("datasets_cache")
def test_a_folder_of_parquet_files_is_read_by_datasets(tmp_path):
    texts = [{"text": f"row {number}"} for number in range(5)]
    path = write_parquet(tmp_path / "texts", texts)
    write_parquet(tmp_path / "texts", [{"text": "held out"}], split="test")
    assert read_rows(path, "auto") == texts
    assert read_rows(path, "hub", split="test") == [{"text": "held out"}]


@pytest.mark.usefixtures("datasets_cache")
def test_conversations_and_token_ids_survive_parquet(tmp_path, chat_tokenizer):
    talk = [{"conversations": [{"from": "human", "value": "Say hi"}, {"from": "gpt", "value": "hi there!"}]}]
    rows = read_rows(write_parquet(tmp_path / "talk", talk), "auto")
    assert rows[0]["conversations"] == CHAT[:2]
    assert tokenise(rows[0], chat_tokenizer)[0].loss_mask is not None
    ids = [{"input_ids": [1, 2, 3], "loss_mask": [False, True, True]}]
    path = write_parquet(tmp_path / "ids", ids)
    assert read_rows(path, "auto") == [{**ids[0], "where": f"{path}:train:1"}]


@pytest.mark.usefixtures("datasets_cache")
def test_a_malformed_row_of_a_dataset_is_named_by_its_number(tmp_path):
    path = write_parquet(tmp_path / "texts", [{"text": "fine"}, {"text": ""}])
    with pytest.raises(DataError, match=r"texts:train:2: expected non-empty 'text'"):
        read_rows(path, "auto")


@pytest.mark.usefixtures("datasets_cache")
def test_what_datasets_cannot_load_is_one_line_with_the_path(tmp_path):
    path = write_parquet(tmp_path / "texts", [{"text": "fine"}])
    with pytest.raises(
        DataError, match=r"texts': expected a file, folder or hub dataset, found .*validation"
    ) as caught:
        read_rows(path, "auto", split="validation")
    assert "\n" not in str(caught.value)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"broken': expected a file, folder or hub dataset, found "):
        read_rows(str(tmp_path / "broken"), "auto")


@pytest.mark.usefixtures("datasets_cache")
def test_a_dataset_that_is_nowhere_is_refused():
    with pytest.raises(DataError, match=r"data 'nobody/nothing': expected a file, folder or hub dataset, found "):
        read_rows("nobody/nothing", "auto")


def test_training_rows_are_those_that_load_corpus_does_not_hold_out(source_folder, tokenizer, monkeypatch, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"row number {number}"} for number in range(45)])
    held_out = {tokenizer.decode(d.input_ids[1:]) for d in load_corpus(path, tokenizer, max_length=8).validation}
    found = [row["text"] for row in training_rows(path)]
    assert len(held_out) == 3
    assert sorted(found) == sorted({f"row number {number}" for number in range(45)} - held_out)
    monkeypatch.setattr(pardec.data.python_sources, "stdlib_folder", lambda: source_folder)
    assert [row["text"] for row in training_rows(STDLIB)] == list(python_sources(source_folder, TRAIN))


def test_a_single_text_gives_its_beginning_and_a_single_conversation_itself(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 200)
    assert training_rows(str(tmp_path / "a.txt")) == [{"text": "x" * 190}]
    path = write_jsonl(tmp_path / "talk.jsonl", [{"text": None, "messages": CHAT}])
    assert [row["conversations"] for row in training_rows(path)] == [CHAT]


def test_held_out_data_go_by_their_suffix_and_else_by_the_format_of_the_training_data(tmp_path):
    (tmp_path / "a.log").write_text("held out")
    assert held_out_rows(str(tmp_path / "a.log"), VALIDATION, "text") == [{"text": "held out"}]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a row"}])
    for format in ("auto", "text", "jsonl", "hub"):
        assert held_out_rows(path, VALIDATION, format) == [{"text": "a row"}]


@pytest.mark.parametrize("format", ["auto", "hub"])
def test_held_out_data_cannot_be_a_hub_dataset_whose_split_is_not_known(format):
    """Its default split would be the one that is trained on."""
    with pytest.raises(DataError, match=r"^held-out data: expected a file, a folder, .*found nothing at someone/texts"):
        held_out_rows("someone/texts", VALIDATION, format)


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


def test_a_key_that_stands_twice_in_a_row_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "first", "text": "second"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: expected one JSON object, found key 'text' twice"):
        read_rows(str(path), "jsonl")
