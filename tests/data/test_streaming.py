"""Streams, from folders on this disk as `datasets` streams them, against the same rows in memory."""

import pytest
from data_samples import CHAT, write_jsonl
from datasets import Dataset

import pardec.all_cores
import pardec.data.reading
import pardec.data.streaming
from pardec.data.corpus import load_corpus
from pardec.data.examples import AnchoredSequences
from pardec.data.fitting import pack
from pardec.data.row_checks import DataError
from pardec.data.tokenising import tokenise

NUM_ROWS = 90


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(pardec.data.streaming, "SHARD_BYTES", 1500)
    monkeypatch.setattr(pardec.data.streaming, "num_cores", lambda: 1)


@pytest.fixture
def rows():
    return [{"messages": [{**CHAT[0], "content": f"Say {n} " * (n % 5 + 1)}, *CHAT[1:]]} for n in range(NUM_ROWS)]


@pytest.fixture
def folder(rows, tmp_path):
    for part in range(3):  # files that are streamed one after another
        some = Dataset.from_list(rows[30 * part : 30 * part + 30])
        some.to_parquet(tmp_path / "data" / f"train-{part:05d}-of-00003.parquet")
    return str(tmp_path / "data")


@pytest.fixture
def held_out(rows, tmp_path):
    return write_jsonl(tmp_path / "held_out.jsonl", rows[:3])


def load(folder, tokenizer, held_out, cache, **options):
    return load_corpus(
        folder, tokenizer, max_length=16, validation_path=held_out, streamed=True, cache=str(cache), **options
    )


def everything(corpus):
    found = []
    for shard in corpus.train.shards(0, 0):
        opened = corpus.train.opened(shard)
        found += [(s.input_ids.tolist(), s.loss_mask.tolist()) for s in map(opened.sequence, range(len(opened)))]
    return found


def of_rows(rows, tokenizer):
    documents = [one for row in rows for one in tokenise({"conversations": row["messages"]}, tokenizer)]
    return [(s.input_ids.tolist(), s.loss_mask.tolist()) for s in pack(documents, 16)]


@pytest.mark.parametrize("cores", [1, 2])
def test_a_stream_has_the_sequences_of_its_rows_in_their_order(
    folder, rows, held_out, chat_tokenizer, tmp_path, cores, monkeypatch
):
    for module in (pardec.all_cores, pardec.data.streaming):
        monkeypatch.setattr(module, "num_cores", lambda: cores)
    corpus = load(folder, chat_tokenizer, held_out, tmp_path / "cache")
    assert everything(corpus) == of_rows(rows, chat_tokenizer)
    assert len(list(corpus.train.shards(0, 0))) > 5
    assert corpus.counts.read == NUM_ROWS
    assert corpus.train.opened(2).position["rows"] < NUM_ROWS


class Recorded:
    """A stream that tells which rows it gave."""

    def __init__(self, stream, given):
        self.stream, self.given = stream, given

    def __iter__(self):
        for row in self.stream:
            self.given.append(row["messages"][0]["content"])
            yield row

    def state_dict(self):
        return self.stream.state_dict()

    def load_state_dict(self, state):
        self.stream.load_state_dict(state)


def test_rows_are_read_when_training_comes_to_them_and_never_again(
    folder, rows, held_out, chat_tokenizer, tmp_path, monkeypatch
):
    given, load_dataset = [], pardec.data.streaming.hub_dataset

    def recorded(*args, **options):
        return Recorded(load_dataset(*args, **options), given)

    monkeypatch.setattr(pardec.data.streaming, "hub_dataset", recorded)
    corpus = load(folder, chat_tokenizer, held_out, tmp_path / "cache")
    first = corpus.counts.read
    assert 1 < first < 20
    assert len(given) == first
    examples = AnchoredSequences(corpus.train, 1000, 2, seed=0, examples_per_step=2)
    seen = [examples[n]["input_ids"].tolist() for n in range(40)]
    read = len(given)
    assert first < read < NUM_ROWS
    # another process goes on from a position in examples
    again = AnchoredSequences(load(folder, chat_tokenizer, held_out, tmp_path / "cache").train, 1000, 2, 0, 2)
    assert [again[n]["input_ids"].tolist() for n in range(20, 40)] == seen[20:]
    assert len(given) == read
    length = len(of_rows(rows, chat_tokenizer))
    order = [again[n]["input_ids"].tolist() for n in range(2 * length)]
    assert sorted(order[:length]) == sorted(order[length:]) == sorted(ids for ids, _ in of_rows(rows, chat_tokenizer))
    assert given == [row["messages"][0]["content"] for row in rows]  # each once, over both processes and epochs


def test_a_shard_that_is_lost_is_read_again_from_the_one_before(folder, rows, held_out, chat_tokenizer, tmp_path):
    corpus = load(folder, chat_tokenizer, held_out, tmp_path / "cache")
    assert everything(corpus) == of_rows(rows, chat_tokenizer)
    for lost in ((3,), (0, 1), (2, 4)):
        for shard in lost:
            corpus.train.kept.file(shard).unlink()
        assert everything(load(folder, chat_tokenizer, held_out, tmp_path / "cache")) == of_rows(rows, chat_tokenizer)


def test_a_malformed_row_is_refused_before_a_run_and_left_out_in_it(rows, held_out, chat_tokenizer, tmp_path, capsys):
    for number in (1, 70):
        bad = [*rows]
        bad[number] = {"messages": [{"role": "user", "content": "no answer " * 9}]}
        folder = tmp_path / f"bad-{number}"
        Dataset.from_list(bad).to_parquet(folder / "train.parquet")
        fault = f"{folder}:train:{number + 1}: expected at least one assistant turn, found none"
        if number == 1:
            with pytest.raises(DataError) as caught:
                load(str(folder), chat_tokenizer, held_out, tmp_path / "cache")
            assert str(caught.value) == fault
            continue
        corpus = load(str(folder), chat_tokenizer, held_out, tmp_path / "cache", show_progress=True)
        assert len(everything(corpus)) == len(of_rows([*rows[:70], *rows[71:]], chat_tokenizer))
        assert corpus.counts.unusable == 1
        assert f"left out: {fault}\n" in capsys.readouterr().out


def test_streams_need_a_hub_dataset_and_held_out_data(folder, held_out, chat_tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"data\.streamed: expected a hub dataset, found .*held_out\.jsonl"):
        load(held_out, chat_tokenizer, held_out, tmp_path)
    with pytest.raises(DataError, match=r"data\.streamed: expected a hub dataset, found python-stdlib"):
        load("python-stdlib", chat_tokenizer, held_out, tmp_path)
    with pytest.raises(DataError, match=r"data\.streamed: expected data\.validation_path beside a stream"):
        load(folder, chat_tokenizer, None, tmp_path)


def test_other_streams_have_sequences_of_their_own(folder, held_out, chat_tokenizer, tmp_path):
    one = load(folder, chat_tokenizer, held_out, tmp_path)
    chat_tokenizer.chat_template = "{# another #}" + chat_tokenizer.chat_template
    other = load(folder, chat_tokenizer, held_out, tmp_path)
    assert one.digest() != other.digest()
    assert one.train.kept.folder != other.train.kept.folder


def test_a_folder_that_is_changed_is_another_stream(folder, rows, held_out, chat_tokenizer, tmp_path):
    before = load(folder, chat_tokenizer, held_out, tmp_path / "cache")
    old = everything(before)
    assert load(folder, chat_tokenizer, held_out, tmp_path / "cache").digest() == before.digest()
    rows[70] = {"messages": [CHAT[0], {"role": "assistant", "content": "Not any more."}]}
    Dataset.from_list(rows[60:]).to_parquet(f"{folder}/train-00002-of-00003.parquet")
    corpus = load(folder, chat_tokenizer, held_out, tmp_path / "cache")
    assert everything(corpus) == of_rows(rows, chat_tokenizer) != old
    assert corpus.digest() != before.digest()
