"""Rows that are read by number, against the lists of `read_rows`."""

import json

import numpy as np
import pytest
from data_samples import CHAT, write_jsonl
from datasets import Dataset

import pardec.data.python_sources
import pardec.data.rows
from pardec.data.python_sources import TRAIN, python_sources
from pardec.data.reading import hold_out, read_rows
from pardec.data.row_checks import DataError
from pardec.data.rows import hold_out_rows, open_rows
from pardec.data.shards import pieces_of


def opened(path, folder, format="auto"):
    return open_rows(str(path), format, "train", None, folder / "checked")


ROWS = [{"text": "one"}, {"messages": CHAT}, {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}, {"text": "zwölf"}]


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(map(json.dumps, ROWS)),
        "\n".join(map(json.dumps, ROWS)) + "\n",
        "\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
        "\n\n  \n".join(map(json.dumps, ROWS)) + "\n\n",
        "\r\n".join(map(json.dumps, ROWS)) + "\r\n \t\r\n",
        "\n".join(
            [" " * 99, *map(json.dumps, ROWS), " \t" * 20 + "\r", "  " + json.dumps(ROWS[0]), "\ufeff" + " " * 40]
        ),
        json.dumps(ROWS[0]),
        '{"text": "a\u2028b"}\n{"text":"c"}',
    ],
)
@pytest.mark.parametrize("block", [7, 1 << 24])
def test_lines_are_those_that_are_read_at_once(tmp_path, content, block, monkeypatch):
    monkeypatch.setattr(pardec.data.rows, "_BLOCK_BYTES", block)
    (tmp_path / "rows.jsonl").write_text(content, newline="")
    rows = opened(tmp_path / "rows.jsonl", tmp_path)
    assert [rows[n] for n in range(len(rows))] == read_rows(str(tmp_path / "rows.jsonl"), "auto")


def test_texts_of_a_folder_and_sources_are_read_when_they_are_asked_for(source_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pardec.data.python_sources, "stdlib_folder", lambda: source_folder)
    (source_folder / "a" / "m.py").write_bytes(b"x = 1\n" * 50 + b"\xff")
    rows = opened("python-stdlib", tmp_path)
    assert [rows[n]["text"] for n in range(len(rows))] == list(python_sources(source_folder, TRAIN))
    (source_folder / "a" / "m.py").unlink()
    (source_folder / "empty.txt").write_text(" \n")
    rows = opened(source_folder, tmp_path)
    assert [rows[n] for n in range(len(rows))] == read_rows(str(source_folder), "auto")
    assert rows.sizes.tolist() == [len(row["text"].encode()) for row in read_rows(str(source_folder), "auto")]


def test_a_table_is_read_row_by_row(tmp_path):
    Dataset.from_list([{"text": f"row {n}"} for n in range(5)]).to_parquet(tmp_path / "data" / "train.parquet")
    rows = opened(tmp_path / "data", tmp_path)
    assert [rows[n] for n in range(len(rows))] == [{"text": f"row {n}"} for n in range(5)]
    assert opened(tmp_path / "data", tmp_path).digest == rows.digest
    Dataset.from_list([{"text": f"row {n}"} for n in range(6)]).to_parquet(tmp_path / "data" / "train.parquet")
    assert opened(tmp_path / "data", tmp_path).digest != rows.digest


@pytest.mark.parametrize("num_rows", [2, 3, 20, 21, 45])
def test_the_same_rows_are_held_out(tmp_path, num_rows):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"row {n}"} for n in range(num_rows)])
    for found, expected in zip(hold_out_rows(opened(path, tmp_path)), hold_out(read_rows(path, "auto")), strict=True):
        assert [found[n] for n in range(len(found))] == expected
        assert len(found.sizes) == len(expected)


def test_parts_of_a_single_text_are_those_of_before(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{n:04d}\n" for n in range(200)))
    found = hold_out_rows(opened(tmp_path / "a.txt", tmp_path))
    assert tuple([one[0]] for one in found) == hold_out(read_rows(str(tmp_path / "a.txt"), "auto"))
    assert found[0].digest != found[1].digest


@pytest.mark.parametrize("bad", ['{"text": 1}', "{", '{"messages": []}', "[]", '{"text": "\\ud800"}'])
def test_a_malformed_row_is_named_before_anything_is_made_of_them(tmp_path, bad):
    lines = [json.dumps({"text": f"row {n}"}) for n in range(30)]
    lines[17] = bad
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"rows\.jsonl:18: expected"):
        opened(tmp_path / "rows.jsonl", tmp_path)
    with pytest.raises(DataError, match=r"rows\.jsonl:18: expected"):  # nor is it forgotten
        opened(tmp_path / "rows.jsonl", tmp_path)


def test_rows_that_were_found_good_are_not_looked_at_again(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"row {n}"} for n in range(30)])
    digest = opened(path, tmp_path).digest
    looked_at = []
    monkeypatch.setattr(pardec.data.rows, "check_row", lambda row, where: looked_at.append(where))
    assert opened(path, tmp_path).digest == digest
    assert looked_at == []
    write_jsonl(tmp_path / "rows.jsonl", [{"text": f"row {n}"} for n in range(31)])
    assert opened(path, tmp_path).digest != digest
    assert len(looked_at) == 31


@pytest.mark.parametrize("missing", ["nothing.jsonl", "nothing.txt"])
def test_data_that_are_not_there_are_refused(tmp_path, missing):
    with pytest.raises(DataError, match="data: expected a file or folder, found nothing at"):
        opened(tmp_path / missing, tmp_path)
    (tmp_path / missing).write_text("\n")
    with pytest.raises(DataError, match="expected at least one row of data, found none"):
        opened(tmp_path / missing, tmp_path)


def test_pieces_are_of_one_size_and_hold_every_row():
    sizes = np.random.default_rng(0).integers(1, 1000, 5000)
    for num_bytes in (100, 10_000, 10**9):
        pieces = pieces_of(sizes, num_bytes)
        assert np.concatenate(pieces).tolist() == list(range(5000))
        held = [int(sizes[piece].sum()) for piece in pieces]
        assert max(held) <= num_bytes + 1000
        if num_bytes == 10_000:
            assert min(held) > 8000
    assert len(pieces_of(sizes, 10**9)) == 1


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_a_file_that_is_written_to_during_a_run_ends_it(tmp_path, suffix):
    """What is kept under its digest would be of something else."""
    path = tmp_path / f"rows.{suffix}"
    content = "\n".join(json.dumps({"text": f"row {n}"}) for n in range(30))
    path.write_text(content)
    rows = opened(path, tmp_path)
    assert "row 0" in rows[0]["text"]
    path.write_text(content.replace("row 2", "rows 2"))
    with pytest.raises(OSError, match=r"expected the file as it was when the run began, 5\d\d bytes, found it changed"):
        rows[0]
    assert "row 0" in opened(path, tmp_path)[0]["text"]


@pytest.mark.parametrize("cache", ["file", "file/below", "/proc/nothing"])
def test_a_folder_that_nothing_can_be_written_to_is_named(tmp_path, cache):
    (tmp_path / "file").write_text("")
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"row {n}"} for n in range(3)])
    with pytest.raises(OSError, match=r"data\.cache: expected a folder that can be written to at .*, found "):
        open_rows(str(path), "auto", "train", None, tmp_path / cache)
