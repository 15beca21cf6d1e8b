"""Sequences on the disk: the same as those of rows in memory, made once, whole or not there at all."""

import copy
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from data_samples import CHAT, write_jsonl

import pardec.all_cores
import pardec.data.tokenised
import pardec.run
from pardec.data.corpus import load_corpus
from pardec.data.examples import AnchoredSequences
from pardec.data.fitting import pack
from pardec.data.row_checks import DataError
from pardec.data.rows import open_rows
from pardec.data.shards import open_shard
from pardec.data.tokenised import Tokenising, tokenised
from pardec.data.tokenising import tokenise

NUM_ROWS = 120


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(pardec.data.tokenised, "SHARD_BYTES", 1000)
    monkeypatch.setattr(pardec.data.tokenised, "num_cores", lambda: 1)


@pytest.fixture
def path(tmp_path):
    rows = [{"text": f"number {n} " * (n % 7 + 1)} for n in range(NUM_ROWS)]
    rows[3::4] = [{"input_ids": [n, *range(20)], "loss_mask": [0] * 5 + [1] * 16} for n in range(3, NUM_ROWS, 4)]
    rows[2::4] = [{"messages": [{**CHAT[0], "content": f"Say {n}"}, *CHAT[1:]]} for n in range(2, NUM_ROWS, 4)]
    return write_jsonl(tmp_path / "rows.jsonl", rows)


def make(path, tokenizer, folder, max_length=16):
    rows = open_rows(path, "auto", "train", None, folder)
    return tokenised(rows, Tokenising(tokenizer, max_length, None, path), folder)


def plain(documents):
    masks = (None if one.loss_mask is None else one.loss_mask.tolist() for one in documents)
    return [(one.input_ids.tolist(), mask) for one, mask in zip(documents, masks, strict=True)]


def test_shards_hold_the_sequences_of_their_rows(path, chat_tokenizer, tmp_path):
    train = make(path, chat_tokenizer, tmp_path / "cache")
    assert len(train.pieces) > 5
    assert sorted(np.concatenate(train.pieces).tolist()) == list(range(NUM_ROWS))
    expected = []
    for piece in train.pieces:
        documents = [one for n in piece for one in tokenise(train.rows[int(n)], chat_tokenizer)]
        expected += pack(documents, 16)
    assert plain(train) == plain(expected)
    assert len(train) == len(expected)
    assert train.counts.read == train.counts.available == NUM_ROWS


def test_what_was_tokenised_once_is_read(path, chat_tokenizer, tmp_path, monkeypatch):
    first = plain(make(path, chat_tokenizer, tmp_path / "cache"))

    def never(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(pardec.data.tokenised, "tokenise", never)
    again = make(path, chat_tokenizer, tmp_path / "cache")
    assert plain(again) == first
    assert again.counts.read == NUM_ROWS


def test_other_data_tokenizers_and_lengths_have_sequences_of_their_own(path, chat_tokenizer, tmp_path):
    def folder(tokenizer=chat_tokenizer, max_length=16, path=path):
        return make(path, tokenizer, tmp_path / "cache", max_length).kept.folder

    template, separator = copy.deepcopy(chat_tokenizer), copy.deepcopy(chat_tokenizer)
    template.chat_template = "{# another #}" + template.chat_template
    separator.bos_token = "<|other|>"
    others = {folder(), folder(template), folder(separator), folder(max_length=17)}
    others.add(folder(path=write_jsonl(tmp_path / "other.jsonl", [{"text": "x"}])))
    assert len(others) == 5
    copied = tmp_path / "copied.jsonl"
    copied.write_bytes(Path(path).read_bytes())
    assert folder(path=str(copied)) in others
    chat_tokenizer.backend_tokenizer.enable_truncation(2)  # which belongs to a call, not to the tokenizer
    chat_tokenizer.backend_tokenizer.enable_padding()
    assert folder() in others


def test_only_the_shards_that_a_run_comes_to_are_tokenised(path, chat_tokenizer, tmp_path, monkeypatch):
    for cores in (1, 3):
        monkeypatch.setattr(pardec.data.tokenised, "num_cores", lambda: cores)  # noqa: B023
        cache = tmp_path / f"cache-{cores}"
        corpus = load_corpus(path, chat_tokenizer, max_length=16, num_prompts=2, seed=5, cache=str(cache))
        order = corpus.train.shards(5, 0)
        assert len(order) > 5
        there = {int(file.stem.removeprefix("shard-")) for file in cache.glob("*/shard-*")}
        assert there == set(order[:cores])
        examples = AnchoredSequences(corpus.train, 10_000, 2, seed=5, examples_per_step=4)
        examples[len(corpus.train.opened(order[0]))]
        assert len(list(cache.glob("*/shard-*"))) == max(2, cores)


def test_examples_are_the_same_whether_shards_are_there_or_not(path, chat_tokenizer, tmp_path):
    def examples(cache, wanted):
        corpus = load_corpus(path, chat_tokenizer, max_length=16, num_prompts=2, cache=str(tmp_path / cache))
        of_run = AnchoredSequences(corpus.train, 1000, 2, seed=0, examples_per_step=4)
        return [{key: value.tolist() for key, value in of_run[n].items()} for n in wanted]

    everything = examples("a", range(700))
    assert examples("a", range(650, 700)) == everything[650:]  # as a run that goes on asks for them
    assert examples("b", range(650, 700)) == everything[650:]


def test_a_row_that_cannot_be_tokenised_is_refused_before_a_run_and_left_out_in_it(
    path, chat_tokenizer, tmp_path, capsys
):
    whole = load_corpus(path, chat_tokenizer, max_length=16, cache=str(tmp_path / "cache"))
    order = whole.train.shards(0, 0)
    numbers = [int(whole.train.rows.numbers[whole.train.pieces[shard][0]]) for shard in (order[0], order[3])]
    for number, is_first in zip(numbers, (True, False), strict=True):
        lines = Path(path).read_text().splitlines()
        size = len(lines[number])
        row = '{"input_ids": [5, 4096], "loss_mask": [0, 1], "x": "'  # of the same size, so that shards stay
        assert size > len(row) + 2
        lines[number] = row + "x" * (size - len(row) - 2) + '"}'
        bad = tmp_path / f"bad-{number}.jsonl"
        bad.write_text("\n".join(lines) + "\n")
        fault = f"{bad}:{number + 1}: expected token ids below 4096, those of the tokenizer, found 4096"
        if is_first:
            with pytest.raises(DataError) as caught:
                load_corpus(str(bad), chat_tokenizer, max_length=16, cache=str(tmp_path / "cache"))
            assert str(caught.value) == fault
            continue
        corpus = load_corpus(str(bad), chat_tokenizer, max_length=16, cache=str(tmp_path / "cache"), show_progress=True)
        list(corpus.train)
        assert (corpus.counts.read, corpus.counts.unusable) == (corpus.counts.available, 1)
        assert f"left out: {fault}\n" in capsys.readouterr().out


def test_token_ids_that_the_base_does_not_have_are_refused(path, chat_tokenizer, tmp_path):
    with pytest.raises(DataError, match="expected token ids below 300, those of the base, found"):
        load_corpus(path, chat_tokenizer, max_length=16, num_embeddings=300, cache=str(tmp_path))


def test_a_full_disk_is_one_line_and_leaves_nothing_that_is_read(path, chat_tokenizer, tmp_path, monkeypatch):
    def no_room(tensors, file, metadata=None):
        file.write_bytes(b"half")
        raise pardec.run.SafetensorError("I/O error: No space left on device (os error 28)")

    train = make(path, chat_tokenizer, tmp_path / "cache")
    monkeypatch.setattr(pardec.run, "save_file", no_room)
    with pytest.raises(OSError, match=r"shard-000002.*: expected room for [\d,]+ bytes, found .*No space left"):
        train.opened(2)
    assert [file.name for file in train.kept.folder.iterdir()] == ["lock"]
    monkeypatch.undo()
    assert len(train.opened(2)) > 0


def test_a_shard_that_is_damaged_is_made_again(path, chat_tokenizer, tmp_path):
    expected = plain(make(path, chat_tokenizer, tmp_path / "cache"))
    for number, damage in enumerate((lambda content: content[:100], lambda content: b"", lambda content: b"x" * 40)):
        train = make(path, chat_tokenizer, tmp_path / "cache")
        file = train.kept.folder / f"shard-{number:06d}.safetensors"
        file.write_bytes(damage(file.read_bytes()))
        assert open_shard(file) is None
        assert plain(train) == expected


def test_a_kill_at_any_moment_leaves_whole_shards_and_no_lock(path, chat_tokenizer, tmp_path):
    expected = plain(make(path, chat_tokenizer, tmp_path / "whole"))
    forked, source, counts = multiprocessing.get_context("fork"), np.random.default_rng(0), []
    for _ in range(12):
        train = make(path, chat_tokenizer, tmp_path / "cache")
        writer = forked.Process(target=list, args=(train,))
        writer.start()
        time.sleep(float(source.uniform(0, 0.1)))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        files = list(train.kept.folder.glob("shard-*"))
        assert all(open_shard(file) is not None for file in files)
        counts.append(len(files))
    train = make(path, chat_tokenizer, tmp_path / "cache")
    train.kept.folder.mkdir(parents=True, exist_ok=True)  # on a busy machine nobody may have come so far
    (train.kept.folder / ".writing-1-shard-000001.safetensors").write_bytes(b"half")
    train.kept.folder.joinpath("shard-000001.safetensors").unlink(missing_ok=True)
    assert plain(train) == expected
    assert not list(train.kept.folder.glob(".writing-*"))


def test_processes_that_want_the_same_shards_make_each_once(path, chat_tokenizer, tmp_path):
    train = make(path, chat_tokenizer, tmp_path / "cache")
    forked = multiprocessing.get_context("fork")
    others = [forked.Process(target=list, args=(make(path, chat_tokenizer, tmp_path / "cache"),)) for _ in range(3)]
    for one in others:
        one.start()
    found = plain(train)
    times = {file.name: file.stat().st_mtime_ns for file in train.kept.folder.glob("shard-*")}
    for one in others:
        one.join()
        assert one.exitcode == 0
    assert {file.name: file.stat().st_mtime_ns for file in train.kept.folder.glob("shard-*")} == times
    assert found == plain(make(path, chat_tokenizer, tmp_path / "whole"))


@pytest.mark.parametrize("cores", [1, 2])
def test_all_cores_make_the_same_shards(path, chat_tokenizer, tmp_path, monkeypatch, cores):
    for module in (pardec.all_cores, pardec.data.tokenised):
        monkeypatch.setattr(module, "num_cores", lambda: cores)
    train = make(path, chat_tokenizer, tmp_path / "cache")
    train.shards(0, 0)
    assert plain(train) == plain(make(path, chat_tokenizer, tmp_path / "cache"))
