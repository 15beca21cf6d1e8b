"""Corpora, packing, prompts and anchors, against files made here and loops from the definitions."""

import json

import numpy as np
import pytest
from data_samples import masked, text, write_jsonl

import pardec.data.python_sources
from pardec.data.corpus import held_out_documents, held_out_prompts, load_corpus, standard_prompts
from pardec.data.fitting import pack
from pardec.data.python_sources import STDLIB, TEST, TRAIN, VALIDATION, python_sources
from pardec.data.row_checks import DataError


@pytest.mark.parametrize("lengths", [[3, 4, 5], [25], [8], [7, 1], [1] * 17, [8, 8, 3], [20, 1, 30]])
def test_texts_are_joined_and_cut_and_the_rest_dropped(lengths):
    stream = list(range(sum(lengths)))
    documents, start = [], 0
    for length in lengths:
        documents.append(text(stream[start : start + length]))
        start += length
    packed = pack(documents, 8)
    assert [piece.input_ids.tolist() for piece in packed] == [stream[i : i + 8] for i in range(0, len(stream) - 7, 8)]
    assert all(piece.loss_mask is None and piece.input_ids.dtype == np.int32 for piece in packed)


def test_masked_documents_stay_alone():
    packed = pack([text([1, 2, 3]), masked(range(8), [0] * 5 + [1] * 3), text([4, 5, 6, 7, 8])], 8)
    assert [piece.input_ids.tolist() for piece in packed] == [list(range(8)), [1, 2, 3, 4, 5, 6, 7, 8]]
    assert packed[0].loss_mask is not None
    assert packed[0].loss_mask.tolist() == [False] * 5 + [True] * 3


def test_masked_documents_without_anything_a_mask_token_could_learn_are_dropped():
    """An anchor at 0 predicts token 2 behind the bonus token 1."""
    assert pack([masked([1, 2, 3], [1, 1, 0])], 8) == []
    assert pack([masked([1, 2, 3], [0, 0, 1])], 8) == []
    assert len(pack([masked([1, 2, 3], [0, 1, 1])], 8)) == 1


def test_a_corpus_of_sources_keeps_the_splits_apart(source_folder, tokenizer, monkeypatch):
    monkeypatch.setattr(pardec.data.python_sources, "stdlib_folder", lambda: source_folder)
    corpus = load_corpus("python-stdlib", tokenizer, max_length=64)
    texts = {split: list(python_sources(source_folder, split)) for split in (TRAIN, VALIDATION, TEST)}
    for documents, split in ((corpus.validation, VALIDATION), (corpus.test, TEST)):
        assert [tokenizer.decode(document.input_ids[1:]) for document in documents] == texts[split]
    stream = np.concatenate([document.input_ids for document in corpus.train])
    seen = set(tokenizer.decode(stream).split("<|endoftext|>")[1:-1])
    assert seen <= set(texts[TRAIN])
    assert len(seen) > len(texts[TRAIN]) - 3  # the last pieces do not fill a sequence


def test_the_sequences_of_a_corpus_are_the_same_for_every_seed(tmp_path, tokenizer):
    """Their order is that of examples, and what is kept on the disk serves every run."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"number {n} " * 10} for n in range(40)])
    one, other = (load_corpus(path, tokenizer, max_length=16, seed=seed) for seed in (1, 2))
    ids = [[document.input_ids.tolist() for document in corpus.train] for corpus in (one, other)]
    assert ids[0] == ids[1]
    first = [tokenizer.decode(piece) for piece in ids[0]]
    assert not first[0].startswith("<|endoftext|>number 1 ")  # rows are mixed


def test_without_a_validation_file_one_row_in_twenty_is_held_out(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"row {n} end"} for n in range(45)])
    corpus = load_corpus(path, tokenizer, max_length=8)
    held_out = [tokenizer.decode(document.input_ids[1:]) for document in corpus.validation]
    assert held_out == ["row 0 end", "row 20 end", "row 40 end"]
    learned_text = tokenizer.decode(np.concatenate([document.input_ids for document in corpus.train]))
    assert not any(row in learned_text for row in held_out)
    assert corpus.test == []


def test_a_single_text_is_cut_near_its_end(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("".join(f"{n:04d}\n" for n in range(200)))
    corpus = load_corpus(str(tmp_path / "a.txt"), tokenizer, max_length=8)
    held_out = "".join(tokenizer.decode(document.input_ids[1:]) for document in corpus.validation)
    assert held_out == "".join(f"{n:04d}\n" for n in range(190, 200))
    assert "0190" not in tokenizer.decode(np.concatenate([d.input_ids for d in corpus.train]))


def test_files_of_their_own_are_used_for_validation_and_test(tmp_path, tokenizer):
    paths = {
        name: write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {n}"} for n in range(9)])
        for name in ("train", "validation", "test")
    }
    corpus = load_corpus(
        paths["train"], tokenizer, validation_path=paths["validation"], test_path=paths["test"], max_length=8
    )
    for documents, name in ((corpus.validation, "validation"), (corpus.test, "test")):
        assert [tokenizer.decode(d.input_ids[1:]) for d in documents] == [f"{name} {n}" for n in range(9)]


def test_a_single_row_without_a_validation_file_is_refused(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [1] * 20, "loss_mask": [1] * 20}])
    with pytest.raises(DataError, match=r"expected at least 2 rows or data\.validation_path, found 1 row"):
        load_corpus(path, tokenizer, max_length=8)


def test_too_little_text_for_one_sequence_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(
        DataError, match=r"a\.txt: expected at least 64 tokens \(data\.max_length\) of text, found fewer"
    ):
        load_corpus(str(tmp_path / "a.txt"), tokenizer, max_length=64)


def test_prompts_are_the_first_128_tokens_at_every_4000th():
    documents = [text(range(start, start + length)) for start, length in ((0, 5000), (5000, 2999), (7999, 4130))]
    prompts = standard_prompts(documents)
    stream, expected, start = list(range(12129)), [], 0
    while start + 128 <= len(stream):
        expected.append(stream[start : start + 128])
        start += 4000
    assert prompts == expected
    assert [prompt[0] for prompt in prompts] == [0, 4000, 8000, 12000]
    assert len(standard_prompts([text(range(12128))])) == 4
    assert len(standard_prompts([text(range(12127))])) == 3  # one token short of the fourth


def test_some_of_many_prompts_are_spread_evenly():
    documents = [text(range(40_000))]
    assert [prompt[0] for prompt in standard_prompts(documents, num_prompts=5)] == [
        0,
        8000,
        16000,
        24000,
        32000,
    ]
    assert [prompt[0] for prompt in standard_prompts(documents, num_prompts=3)] == [0, 12000, 24000]


def test_a_short_stream_gives_as_many_prompts_as_are_asked_for():
    prompts = standard_prompts([text(range(4000))], num_prompts=10)
    assert [prompt[0] for prompt in prompts] == [400 * n for n in range(10)]
    assert [prompt[0] for prompt in standard_prompts([text(range(300))], num_prompts=10)] == [0, 128]


def test_of_very_many_held_out_rows_no_more_are_tokenised_than_prompts_need(tokenizer):
    class Counted(list):
        asked = 0

        def __getitem__(self, n):
            self.asked += 1
            return super().__getitem__(n)

    rows = Counted({"input_ids": [n % 4000, 1, 2, 3], "loss_mask": [0, 1, 1, 1]} for n in range(5000))
    documents = held_out_documents(rows, tokenizer, 4, "here")
    assert rows.asked == len(documents) == 256
    spread = [document.input_ids[0] for document in documents[:: 256 // 4]]
    assert spread == [0, 1250, 2500, 3750]
    few = Counted(rows[:250])
    assert (
        len(held_out_documents(few, tokenizer, 4, "here")) == len(held_out_documents(few, tokenizer, None, "")) == 250
    )


def test_prompts_of_conversations_end_where_the_answer_begins():
    documents = [masked(range(10), [0] * 6 + [1] * 4), masked(range(20, 25), [1] * 5)]
    assert standard_prompts(documents) == [list(range(6)), [20]]


@pytest.mark.parametrize("documents", [[], [text(range(127))]])
def test_too_little_held_out_text_is_refused(documents):
    with pytest.raises(DataError, match="held-out data: expected at least 128 tokens for a prompt, found fewer"):
        standard_prompts(documents)


def test_held_out_prompts_come_from_the_split_or_the_file(source_folder, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(pardec.data.python_sources, "stdlib_folder", lambda: source_folder)
    for split in (VALIDATION, TEST):
        texts = "".join("<|endoftext|>" + source for source in python_sources(source_folder, split))
        (prompt,) = held_out_prompts(tokenizer, split)
        assert len(prompt) == 128
        assert texts.startswith(tokenizer.decode(prompt))
    (tmp_path / "a.txt").write_text("y = 2\n" * 400)
    prompts = held_out_prompts(tokenizer, TEST, str(tmp_path / "a.txt"), num_prompts=2)
    assert [tokenizer.decode(prompt).count("<|endoftext|>") for prompt in prompts] == [1, 0]
    assert all("y = 2\ny = 2\n" in tokenizer.decode(prompt) for prompt in prompts)


def test_held_out_data_may_be_that_of_python_itself(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"input_ids": list(range(100, 120)), "loss_mask": [0] * 10 + [1] * 10}
    path.write_text(json.dumps(row) + "\n")
    corpus = load_corpus(str(path), tokenizer, max_length=32, validation_path=STDLIB, test_path=STDLIB)
    assert len(corpus.train) == 1
    for documents, split in ((corpus.validation, "validation"), (corpus.test, "test")):
        assert standard_prompts(documents) == held_out_prompts(tokenizer, split)
