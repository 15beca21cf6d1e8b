"""What of documents is kept, counted, refused, and which prompts are left out."""

import numpy as np
import pytest
from data_samples import write_jsonl

from pardec.data.corpus import load_corpus, prompts_with_room
from pardec.data.fitting import RowCounts, told_long, windows
from pardec.data.row_checks import DataError
from pardec.data.tokenising import Document


def example(num_prompt: int, num_answer: int, where: str = "") -> Document:
    mask = np.array([False] * num_prompt + [True] * num_answer)
    return Document(np.arange(num_prompt + num_answer, dtype=np.int32), mask, where)


def anchors_of(document: Document) -> list[int]:
    """Places behind which the next two tokens are the model's own, counted by hand."""
    mask = document.loss_mask
    assert mask is not None
    return [s for s in range(len(mask) - 2) if mask[s + 1] and mask[s + 2]]


@pytest.mark.parametrize("seed", range(40))
def test_every_useful_anchor_is_one_of_exactly_one_window(seed):
    source = np.random.default_rng(seed)
    T, length = int(source.integers(8, 24)), int(source.integers(3, 120))
    turns = source.random(length) < source.choice([0.02, 0.3, 0.9])
    mask = np.logical_xor.accumulate(turns) if seed % 2 else turns
    document = Document(np.arange(length, dtype=np.int32), mask, "rows.jsonl:7")
    found = windows(document, T)
    for one in found:
        first = int(one.input_ids[0])
        assert len(one.input_ids) == min(T, length)
        assert one.input_ids.tolist() == list(range(first, first + len(one.input_ids)))
        assert one.where == "rows.jsonl:7"
        assert anchors_of(one)
        assert one.loss_mask is not None
        assert not (one.loss_mask & ~mask[first : first + len(one.input_ids)]).any()
    assert sorted(int(w.input_ids[0]) + s for w in found for s in anchors_of(w)) == anchors_of(document)


def test_windows_begin_a_quarter_of_their_length_before_what_they_are_for():
    (first, second) = windows(example(10, 40), 32)
    assert first.input_ids.tolist() == list(range(32))
    assert second.input_ids[0] == 50 - 32  # it reaches to the end, and begins earlier still
    (only,) = windows(example(60, 3), 32)
    assert only.input_ids.tolist() == list(range(63 - 32, 63))
    late = windows(example(60, 60), 32)
    assert late[0].input_ids[0] == 59 - 8  # the last token of the prompt is the first anchor
    assert windows(example(3, 5), 32)[0].loss_mask is not None


def test_each_row_is_counted_with_what_became_of_its_examples():
    counts = RowCounts()
    text = Document(np.arange(30, dtype=np.int32))
    rows = [[example(4, 4)], [example(4, 8)], [example(8, 4)], [example(40, 1)], [example(4, 1)], [text]]
    rows += [[example(2, 4), example(20, 4), example(2, 8)]]  # one for each answer
    used = [counts.add(documents, 8) for documents in rows]
    assert [[len(one.input_ids) for one in documents] for documents in used] == [
        [8], [8, 8], [8], [], [], [30], [6, 8, 8, 8]
    ]  # fmt: skip
    assert counts == RowCounts(read=7, kept=5, long=5, windows=6, too_short=2)
    assert counts.told(8) == (
        "7 rows read, 5 of them used; 5 examples longer than 8 tokens (data.max_length) cut into 6 windows; "
        "2 dropped, as their answers are shorter than two tokens"
    )


def test_rows_that_are_not_read_yet_are_told():
    counts = RowCounts(available=190, read=11, kept=10, unusable=1)
    assert counts.told(8) == (
        "11 of 190 rows read before the first step, 10 of them used; 1 left out, as they cannot be tokenised"
    )


def rows_of(tmp_path, num_useless: int, num_rows: int = 20) -> tuple[str, str]:
    rows = [{"input_ids": [n] * 30, "loss_mask": [0] * 29 + [1]} for n in range(num_useless)]
    rows += [{"input_ids": [n] * 30, "loss_mask": [0] * 4 + [1] * 26} for n in range(num_useless, num_rows)]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows[-1:])
    return write_jsonl(tmp_path / "rows.jsonl", rows), held_out


def test_a_corpus_tells_how_many_rows_it_is_made_of(tmp_path, tokenizer):
    path, held_out = rows_of(tmp_path, num_useless=5)
    corpus = load_corpus(path, tokenizer, max_length=24, validation_path=held_out, min_kept_share=0.75)
    assert len(corpus.train) == 30
    assert corpus.counts == RowCounts(available=20, read=20, kept=15, long=20, windows=30, too_short=5)


def test_data_of_which_too_little_is_kept_are_refused(tmp_path, tokenizer):
    path, held_out = rows_of(tmp_path, num_useless=11)
    with pytest.raises(DataError) as caught:
        load_corpus(path, tokenizer, max_length=32, validation_path=held_out, min_kept_share=0.5)
    assert str(caught.value) == (
        f"{path}: expected something to learn in at least 50% of the rows (data.min_kept_share), found 20 rows read, "
        "9 of them used; 11 dropped, as their answers are shorter than two tokens"
    )
    allowed = load_corpus(path, tokenizer, max_length=32, validation_path=held_out, min_kept_share=0.45)
    assert len(allowed.train) == 9


def test_nothing_kept_tells_why(tmp_path, tokenizer):
    path, held_out = rows_of(tmp_path, num_useless=20)
    with pytest.raises(DataError, match=r"expected a token to learn, found none: 20 rows read, 0 of them used; 20 dro"):
        load_corpus(path, tokenizer, max_length=32, validation_path=held_out)


def test_the_digest_tells_data_apart(tmp_path, tokenizer):
    def digest(rows, held_out):
        paths = [write_jsonl(tmp_path / f"{name}.jsonl", one) for name, one in (("a", rows), ("b", held_out))]
        return load_corpus(paths[0], tokenizer, max_length=8, validation_path=paths[1]).digest()

    row = {"input_ids": [1, 2, 3, 4, 5], "loss_mask": [0, 1, 1, 1, 1]}
    first = digest([row], [row])
    assert digest([row], [row]) == first
    others = [
        digest([{**row, "input_ids": [1, 2, 3, 4, 6]}], [row]),
        digest([{**row, "loss_mask": [0, 0, 1, 1, 1]}], [row]),
        digest([row], [{**row, "input_ids": [1, 2, 3, 4, 6]}]),
        digest([row, row], [row]),
        digest([row], [row, row]),
    ]
    assert len({first, *others}) == 6


# ---------------------------------------------------------------------- held-out prompts


def prompts(documents: list[Document], max_positions: int | None = 30, num_prompts: int | None = None):
    return prompts_with_room(
        documents, num_prompts, max_new_tokens=10, max_positions=max_positions, where="held_out.jsonl"
    )


def test_prompts_without_room_behind_them_are_left_out_and_named():
    documents = [example(length, 2, f"held_out.jsonl:{n}") for n, length in enumerate((20, 21, 5, 2000, 8))]
    found, too_long = prompts(documents)
    assert [len(one) for one in found] == [20, 5, 8]
    assert told_long(too_long) == (
        "held-out prompts too long for the base are left out: held_out.jsonl:1 (21 tokens), "
        "held_out.jsonl:3 (2,000 tokens)"
    )
    assert told_long(too_long * 3).endswith("held_out.jsonl:1 (21 tokens) and 3 more")
    assert len(prompts(documents, num_prompts=3)[0]) == 3  # taken of those that have room
    assert len(prompts(documents, max_positions=None)[0]) == 5


@pytest.mark.parametrize("lengths", [(21, 22, 5), (40,)])
def test_more_than_half_of_the_prompts_are_never_left_out(lengths):
    with pytest.raises(
        DataError, match=rf"^held_out\.jsonl: expected .* at most 20 tokens, .* of {len(lengths)} longer"
    ):
        prompts([example(length, 2) for length in lengths])


def test_prompts_of_text_without_room_are_refused():
    text = [Document(np.arange(300, dtype=np.int32))]
    assert len(prompts(text, 138)[0][0]) == 128
    with pytest.raises(
        DataError, match=r"^eval\.max_new_tokens: expected at most 9 behind validation prompts .* found 10"
    ):
        prompts(text, 137)
