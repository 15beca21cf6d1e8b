"""Reading rows of every kind of data, and what is said where there are none."""

import json
import os
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import CHAT, write_jsonl

import pardec.data.python_sources
from pardec.data.corpus import load_corpus
from pardec.data.python_sources import STDLIB, TRAIN, VALIDATION, python_sources
from pardec.data.reading import held_out_rows, read_rows, training_rows
from pardec.data.row_checks import DataError
from pardec.data.rows import open_rows
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


@pytest.mark.parametrize("name", ["train.jsonl", "data/train.json", "rows.jsonl.xz", "ROWS.CSV"])
def test_of_a_data_sets_folder_not_its_page_alone_is_read(name, tmp_path):
    """Nobody means the README that lies beside the rows."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"text": "one"}\n' * 9)
    (tmp_path / "README.md").write_text("Nine rows.")
    words = f"{tmp_path}: expected a folder of texts, found less in texts than in files of rows, such as {name}; "
    for read in (read_rows, lambda path, format: open_rows(path, format, "train", None, tmp_path / "checked")):
        with pytest.raises(DataError, match=f"^{re.escape(words)}name that file, or .* by data.format=text$"):
            read(str(tmp_path), "auto")
        assert read(str(tmp_path), "text")[0] == {"text": "Nine rows."}
    assert held_out_rows(str(tmp_path), "test", "text") == [{"text": "Nine rows."}]
    (tmp_path / "long.txt").write_text("a" * 1000)
    assert len(read_rows(str(tmp_path), "auto")) == 2


def test_a_pipe_is_no_file_of_rows(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"rows\.jsonl: expected a JSONL file, found no regular file$"):
        read_rows(str(tmp_path / "rows.jsonl"), "auto")


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


def test_a_key_that_stands_twice_in_a_row_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "first", "text": "second"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: expected one JSON object, found key 'text' twice"):
        read_rows(str(path), "jsonl")
