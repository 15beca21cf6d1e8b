"""Reading, splitting, tokenising and packing, against files made here and loops from the definitions."""

import copy
import hashlib
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pardec import data
from pardec.data import (
    STDLIB,
    TEST,
    TRAIN,
    VALIDATION,
    AnchoredSequences,
    DataError,
    Document,
    collate,
    held_out_prompts,
    load_corpus,
    pack,
    python_files,
    python_sources,
    read_rows,
    split_of,
    standard_prompts,
    tokenise,
    tokenise_until,
    training_rows,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = [
    {"role": "user", "content": "Say hi"},
    {"role": "assistant", "content": "hi there!"},
    {"role": "user", "content": "And bye"},
    {"role": "assistant", "content": "bye"},
]


@pytest.fixture
def chat_tokenizer(tokenizer):
    """The packaged model's tokenizer with a chat template; changing it is safe."""
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = CHAT_TEMPLATE
    return chat


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---------------------------------------------------------------------- Python sources


def test_splits_go_by_the_hash_of_the_path():
    """First byte below 10 is held out; of these an even second byte is validation, an odd one test."""
    seen = {TRAIN: 0, VALIDATION: 0, TEST: 0}
    for number in range(3000):
        path = f"package/module_{number}.py"
        digest = hashlib.sha256(path.encode()).hexdigest()
        first, second = int(digest[:2], 16), int(digest[2:4], 16)
        expected = TRAIN if first >= 10 else (VALIDATION, TEST)[second % 2]
        assert split_of(path) == expected
        seen[expected] += 1
    assert min(seen.values()) > 30


def source_names():
    """60 modules of the training split and 3 of each other, in two folders."""
    wanted, names = {TRAIN: 60, VALIDATION: 3, TEST: 3}, []
    for number in itertools.count():
        name = f"{('a', 'b/deep')[number % 2]}/m{number}.py"
        if wanted[split_of(name)]:
            wanted[split_of(name)] -= 1
            names.append(name)
        if not any(wanted.values()):
            return names


@pytest.fixture
def source_folder(tmp_path):
    """Modules of every split, and what must be left out."""
    folder = tmp_path / "lib"
    for name in source_names():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# module {name}\n" + "x = 1\n" * 40)
    for left_out in ("encodings/e.py", "site-packages/s.py", "a/__pycache__/c.py", "b/site-packages/p/q.py"):
        (folder / left_out).parent.mkdir(parents=True, exist_ok=True)
        (folder / left_out).write_text("# left out\n" + "x = 1\n" * 40)
    (folder / "tiny.py").write_text("x" * 199)
    (folder / "huge.py").write_text("x" * 400_001)
    (folder / "notes.txt").write_text("x" * 300)
    (folder / "folder.py").mkdir()
    return folder


def test_python_files_are_the_sources_of_a_library(source_folder):
    (source_folder / "smallest.py").write_text("x" * 200)
    (source_folder / "largest.py").write_text("x" * 400_000)
    names = [path.relative_to(source_folder).as_posix() for path in python_files(source_folder)]
    assert sorted(names) == sorted([*source_names(), "smallest.py", "largest.py"])
    assert python_files(source_folder) == sorted(python_files(source_folder))


def test_folders_above_the_library_do_not_matter(tmp_path):
    """An interpreter may itself live below a folder called site-packages."""
    folder = tmp_path / "site-packages" / "python"
    folder.mkdir(parents=True)
    (folder / "module.py").write_text("x = 1\n" * 50)
    assert [path.name for path in python_files(folder)] == ["module.py"]


def test_python_sources_are_the_texts_of_one_split(source_folder):
    texts = {split: list(python_sources(source_folder, split)) for split in (TRAIN, VALIDATION, TEST)}
    for split, found in texts.items():
        expected = [
            path.read_text()
            for path in python_files(source_folder)
            if split_of(str(path.relative_to(source_folder))) == split
        ]
        assert found == expected
    assert {split: len(found) for split, found in texts.items()} == {TRAIN: 60, VALIDATION: 3, TEST: 3}
    assert len(set().union(*texts.values())) == 66


def test_sources_that_are_not_utf8_are_left_out(tmp_path):
    name = next(f"n{i}.py" for i in range(1000) if split_of(f"n{i}.py") == TRAIN)
    (tmp_path / name).write_bytes(b"\xff\xfe" * 200)
    assert python_files(tmp_path) == [tmp_path / name]
    assert list(python_sources(tmp_path, TRAIN)) == []


def test_the_standard_library_is_that_of_the_running_interpreter():
    assert (data.stdlib_folder() / "json" / "decoder.py").samefile(json.decoder.__file__)


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.rst"])
def test_a_text_file_is_one_row(tmp_path, name):
    (tmp_path / name).write_text("grüße\nzwei\n", encoding="utf-8")
    assert read_rows(str(tmp_path / name), "auto") == [{"text": "grüße\nzwei\n"}]


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
    row = data.check_row({"text": None, "input_ids": None, "conversations": None, "messages": CHAT[:2]}, "here")
    assert row["conversations"] == CHAT[:2]
    row = data.check_row({"text": "plain", "input_ids": None, "conversations": None, "messages": None}, "here")
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
    "conversation of text": ('{"conversations": "hi"}', "expected turns with role and content, found hi"),
    "turn of text": ('{"conversations": ["hi"]}', "expected turns with role and content, found hi"),
    "turn without role": ('{"messages": [{"content": "hi"}]}', "expected turns with role and content"),
    "turn without content": ('{"messages": [{"role": "user"}]}', "expected turns with role and content"),
    "content in parts": ('{"messages": [{"role": "user", "content": [{}]}]}', "expected turns with role and"),
    "no assistant": ('{"messages": [{"role": "user", "content": "hi"}]}', "expected at least one assistant"),
    "no turns": ('{"conversations": []}', "expected at least one assistant turn"),
}  # fmt: skip


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
    assert tokenise(rows[0], chat_tokenizer).loss_mask is not None
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
    monkeypatch.setattr(data, "stdlib_folder", lambda: source_folder)
    assert [row["text"] for row in training_rows(STDLIB)] == list(python_sources(source_folder, TRAIN))


def test_a_single_text_gives_its_beginning_and_a_single_conversation_itself(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 200)
    assert training_rows(str(tmp_path / "a.txt")) == [{"text": "x" * 190}]
    path = write_jsonl(tmp_path / "talk.jsonl", [{"text": None, "messages": CHAT}])
    assert [row["conversations"] for row in training_rows(path)] == [CHAT]


# ---------------------------------------------------------------------- tokenising


def test_text_is_tokenised_behind_one_separator(tokenizer):
    document = tokenise({"text": "def f():\n    return 1\n"}, tokenizer)
    assert document.loss_mask is None
    assert document.input_ids.dtype == np.int32
    assert document.input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(document.input_ids[1:]) == "def f():\n    return 1\n"


def test_a_separator_that_the_tokenizer_writes_itself_is_not_doubled(tokenizer):
    ids = tokenise({"text": "<|endoftext|>x = 1"}, tokenizer).input_ids.tolist()
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "x = 1"


def test_token_ids_and_their_mask_are_taken_as_they_are(tokenizer):
    document = tokenise({"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}, tokenizer)
    assert document.input_ids.tolist() == [5, 6, 7]
    assert document.loss_mask is not None
    assert document.loss_mask.tolist() == [False, True, True]


def test_token_ids_that_the_tokenizer_does_not_have_are_refused(tokenizer):
    """Said while data are validated, not as an index error of the embedding in the middle of a run."""
    with pytest.raises(DataError, match=r"ids\.jsonl: .*4096"):
        tokenise({"input_ids": [5, 4096], "loss_mask": [0, 1]}, tokenizer, "ids.jsonl")


UNUSABLE = {
    "ids": ({"input_ids": [5, 4096], "loss_mask": [0, 1]}, "expected token ids below 4096"),
    "roles": ({"messages": [{"role": "tool", "content": "x"}, *CHAT]}, "found tool, user, .*: no tools$"),
    "nothing to learn": (
        {"messages": [{"role": "assistant", "content": ""}, CHAT[0]]},
        "expected some of the rendered tokens to be the assistant's, found 0 % of '<|user|>Say hi",
    ),
    "everything": (
        {"messages": [{"role": "assistant", "content": "hi"}]},
        "expected some of the rendered tokens to be the assistant's, found 100 % of 'hi",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_row_that_cannot_be_tokenised_is_named_by_file_and_line(case, chat_tokenizer, tmp_path):
    row, message = UNUSABLE[case]
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools\nplease') }}{% endif %}"
        "{% if m.role == 'user' %}<|user|>{% endif %}{{ m.content }}{% endfor %}"
    )
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "fine"}, row])
    fine, unusable = read_rows(path, "auto")
    assert tokenise(fine, chat_tokenizer, path).loss_mask is None
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{message}"):
        tokenise(unusable, chat_tokenizer, path)
    write_jsonl(tmp_path / "rows.jsonl", [row, {"text": "fine"}, row])
    with pytest.raises(DataError, match=rf"rows\.jsonl:[13]: .*{message}"):
        load_corpus(path, chat_tokenizer, max_length=16)


def learned(document, tokenizer):
    assert document.loss_mask is not None
    return tokenizer.decode(document.input_ids[document.loss_mask])


def test_only_what_the_assistant_says_is_learned(chat_tokenizer):
    document = tokenise({"conversations": CHAT}, chat_tokenizer)
    assert document.loss_mask is not None
    said = "<|user|>Say hi\n<|assistant|>hi there!\n<|user|>And bye\n<|assistant|>bye\n"
    assert chat_tokenizer.decode(document.input_ids) == said
    assert learned(document, chat_tokenizer) == "hi there!\nbye\n"
    rest = chat_tokenizer.decode(document.input_ids[~document.loss_mask])
    assert rest == "<|user|>Say hi\n<|assistant|><|user|>And bye\n<|assistant|>"
    # by character spans, counted by hand on single-byte text
    start, end = said.index("hi there!"), said.index("hi there!") + len("hi there!\n")
    position, expected = 0, []
    for token in document.input_ids:
        length = len(chat_tokenizer.decode([token]))
        expected.append((start < position + length and position < end) or position >= said.rindex("bye"))
        position += length
    assert document.loss_mask.tolist() == expected


def test_a_conversation_may_begin_with_the_assistant_or_the_system(chat_tokenizer):
    greeting = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "Say hi"}]
    assert learned(tokenise({"conversations": greeting}, chat_tokenizer), chat_tokenizer) == "<|assistant|>hello\n"
    system = [{"role": "system", "content": "Be short"}, *CHAT[:2]]
    assert learned(tokenise({"conversations": system}, chat_tokenizer), chat_tokenizer) == "hi there!\n"


def test_a_token_that_only_begins_before_the_answer_is_learned(chat_tokenizer):
    chat_tokenizer.chat_template = CHAT_TEMPLATE.replace("<|assistant|>", "<|assistant|>=").replace(
        "<|{{ message.role }}|>", "<|{{ message.role }}|>{% if message.role == 'assistant' %}={% endif %}"
    )
    turns = [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "= 1"}]
    document = tokenise({"conversations": turns}, chat_tokenizer)
    assert chat_tokenizer.decode(document.input_ids) == "<|user|>Say hi\n<|assistant|>== 1\n"
    assert learned(document, chat_tokenizer) == "== 1\n"  # the token == stands on both sides


@pytest.mark.parametrize("reasons", ["loop.last", "loop.last and message.role == 'assistant'"])
def test_a_template_without_the_prefix_property_is_refused_with_what_it_renders(chat_tokenizer, reasons):
    """Some templates drop the reasoning of earlier turns: what was rendered is no beginning any more."""
    chat_tokenizer.chat_template = (
        "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
        f"{{% if {reasons} %}} (reasoning){{% endif %}}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(DataError) as caught:
        tokenise({"conversations": CHAT}, chat_tokenizer, "talk.jsonl")
    message = str(caught.value)
    assert message.startswith("talk.jsonl: expected a chat template that renders a conversation's beginning")
    assert repr("<|user|>Say hi\n<|assistant|>hi there!\n<|user|>And bye\n<|assistant|>bye (reasoning)\n") in message


def test_a_template_whose_generation_prompt_is_not_what_it_renders_is_refused(chat_tokenizer):
    chat_tokenizer.chat_template = CHAT_TEMPLATE.replace("<|assistant|>", "<|bot|>")
    with pytest.raises(DataError, match="expected a chat template that renders a conversation's beginning"):
        tokenise({"conversations": CHAT}, chat_tokenizer)


def test_a_rendering_that_is_all_or_nothing_the_assistants_is_refused(chat_tokenizer):
    chat_tokenizer.chat_template = "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}"
    with pytest.raises(
        DataError, match=r"talk\.jsonl: expected some of the rendered tokens .*, found 100 % of 'hi there!"
    ):
        tokenise({"conversations": CHAT}, chat_tokenizer, "talk.jsonl")
    chat_tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="found 0 % of 'Say hi"):
        tokenise({"conversations": CHAT}, chat_tokenizer)


def test_conversations_need_a_chat_template(tokenizer):
    with pytest.raises(DataError, match=r"talk\.jsonl: expected a tokenizer with a chat template .*, found none"):
        tokenise({"conversations": CHAT}, tokenizer, "talk.jsonl")


def test_tokenising_stops_with_the_document_that_completes_the_budget(tokenizer):
    rows = [{"input_ids": [1] * 10, "loss_mask": [1] * 10} for _ in range(5)]
    assert len(list(tokenise_until(iter(rows), tokenizer, 20, "here"))) == 2
    assert len(list(tokenise_until(iter(rows), tokenizer, 21, "here"))) == 3
    assert len(list(tokenise_until(iter(rows), tokenizer, None, "here"))) == 5


# ---------------------------------------------------------------------- packing


def text(ids):
    return Document(np.array(ids, dtype=np.int32))


def masked(ids, mask):
    return Document(np.array(ids, dtype=np.int32), np.array(mask, dtype=bool))


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


def test_masked_documents_stay_alone_and_are_cut():
    packed = pack([text([1, 2, 3]), masked(range(10), [0] * 5 + [1] * 5), text([4, 5, 6, 7, 8])], 8)
    assert [piece.input_ids.tolist() for piece in packed] == [list(range(8)), [1, 2, 3, 4, 5, 6, 7, 8]]
    assert packed[0].loss_mask is not None
    assert packed[0].loss_mask.tolist() == [False] * 5 + [True] * 3


def test_masked_documents_without_anything_a_mask_token_could_learn_are_dropped():
    """The first mask token behind an anchor at 0 predicts token 2; and what is cut off cannot be learned."""
    assert pack([masked([1, 2, 3], [1, 1, 0])], 8) == []
    assert pack([masked(range(10), [0] * 8 + [1, 1])], 8) == []
    assert len(pack([masked([1, 2, 3], [0, 0, 1])], 8)) == 1


# ---------------------------------------------------------------------- corpora


def test_a_corpus_of_sources_keeps_the_splits_apart(source_folder, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "stdlib_folder", lambda: source_folder)
    corpus = load_corpus("python-stdlib", tokenizer, max_length=64)
    texts = {split: list(python_sources(source_folder, split)) for split in (TRAIN, VALIDATION, TEST)}
    for documents, split in ((corpus.validation, VALIDATION), (corpus.test, TEST)):
        assert [tokenizer.decode(document.input_ids[1:]) for document in documents] == texts[split]
    stream = np.concatenate([document.input_ids for document in corpus.train])
    seen = set(tokenizer.decode(stream).split("<|endoftext|>")[1:-1])
    assert seen <= set(texts[TRAIN])
    assert len(seen) > len(texts[TRAIN]) - 3  # the last pieces do not fill a sequence


def test_the_order_of_a_corpus_is_that_of_its_seed(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"number {n} " * 10} for n in range(40)])
    first, again, other = (load_corpus(path, tokenizer, max_length=16, seed=seed) for seed in (1, 1, 2))
    ids = [[document.input_ids.tolist() for document in corpus.train] for corpus in (first, again, other)]
    assert ids[0] == ids[1]
    assert ids[0] != ids[2]


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


# ---------------------------------------------------------------------- prompts


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


def test_prompts_of_conversations_end_where_the_answer_begins():
    documents = [masked(range(10), [0] * 6 + [1] * 4), masked(range(20, 25), [1] * 5)]
    assert standard_prompts(documents) == [list(range(6)), [20]]


@pytest.mark.parametrize("documents", [[], [text(range(127))]])
def test_too_little_held_out_text_is_refused(documents):
    with pytest.raises(DataError, match="held-out data: expected at least 128 tokens for a prompt, found fewer"):
        standard_prompts(documents)


def test_held_out_prompts_come_from_the_split_or_the_file(source_folder, tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "stdlib_folder", lambda: source_folder)
    for split in (VALIDATION, TEST):
        texts = "".join("<|endoftext|>" + source for source in python_sources(source_folder, split))
        (prompt,) = held_out_prompts(tokenizer, split)
        assert len(prompt) == 128
        assert texts.startswith(tokenizer.decode(prompt))
    (tmp_path / "a.txt").write_text("y = 2\n" * 400)
    prompts = held_out_prompts(tokenizer, TEST, str(tmp_path / "a.txt"), num_prompts=2)
    assert [tokenizer.decode(prompt).count("<|endoftext|>") for prompt in prompts] == [1, 0]
    assert all("y = 2\ny = 2\n" in tokenizer.decode(prompt) for prompt in prompts)


# ---------------------------------------------------------------------- examples


def make_sequences(count=7, length=20):
    """Sequence n consists of token n; every other one has a loss mask."""
    source = np.random.default_rng(0)
    documents = []
    for n in range(count):
        mask = source.random(length) < 0.3
        mask[length // 2] = True
        documents.append(masked([n] * length, mask) if n % 2 else text([n] * length))
    return documents


def test_examples_do_not_depend_on_the_order_they_are_asked_for():
    sequences = make_sequences()
    forwards, backwards = (AnchoredSequences(sequences, 30, 4, seed=3) for _ in range(2))
    assert len(forwards) == 30
    there = [forwards[c] for c in range(30)]
    back = [backwards[c] for c in reversed(range(30))][::-1]
    for one, other in zip(there, back, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("input_ids", "loss_mask", "anchors"))


def test_another_seed_gives_other_examples():
    sequences = make_sequences()
    one, other = ([AnchoredSequences(sequences, 14, 4, seed=seed)[c] for c in range(14)] for seed in (3, 4))
    assert [e["input_ids"][0].item() for e in one] != [e["input_ids"][0].item() for e in other]
    assert [e["anchors"].tolist() for e in one] != [e["anchors"].tolist() for e in other]


def test_every_epoch_is_a_permutation_of_its_own():
    examples = AnchoredSequences(make_sequences(), 7 * 6, 4, seed=0)
    order = [examples[c]["input_ids"][0].item() for c in range(7 * 6)]
    epochs = [order[i : i + 7] for i in range(0, len(order), 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_anchors_are_drawn_anew_each_time():
    examples = AnchoredSequences([text(range(100))], 10, 5, seed=0)
    assert len({tuple(examples[c]["anchors"].tolist()) for c in range(10)}) == 10
    examples = AnchoredSequences([text(range(100))] * 10, 10, 5, seed=0)
    assert len({tuple(examples[c]["anchors"].tolist()) for c in range(10)}) == 10


@pytest.mark.parametrize("num_anchors", [1, 4, 30])
def test_the_first_target_of_an_anchor_counts_or_the_anchor_is_filling(num_anchors):
    """Anchor s trains the token at s + 2 first; filling sits at the last token, where no target is left."""
    for example in (AnchoredSequences(make_sequences(), 21, num_anchors, seed=1)[c] for c in range(21)):
        ids, mask, anchors = example["input_ids"], example["loss_mask"], example["anchors"].tolist()
        assert len(anchors) == num_anchors
        useful = [s for s in range(len(ids) - 2) if mask[s + 2]]
        chosen = [s for s in anchors if s != len(ids) - 1]
        assert set(chosen) <= set(useful)
        assert len(set(chosen)) == len(chosen) == min(num_anchors, len(useful))
        assert anchors[: len(chosen)] == chosen  # filling comes last


def test_anchors_come_in_random_order_so_that_the_first_are_any():
    """Token dropping keeps the first ones longest."""
    examples = AnchoredSequences([text(range(50))], 400, 8, seed=0)
    first, last = ([examples[c]["anchors"][place].item() for c in range(400)] for place in (0, -1))
    assert abs(sum(first) / 400 - sum(last) / 400) < 5  # means of 400 numbers from 0..47: standard error 0.7


def test_every_useful_anchor_is_chosen_sooner_or_later():
    sequences = [masked([1] * 12, [0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1])]
    examples = AnchoredSequences(sequences, 60, 1, seed=0)
    assert {examples[c]["anchors"].item() for c in range(60)} == {1, 4, 5, 9}


def test_examples_carry_the_tokens_and_the_mask_of_their_sequence():
    sequences = [text([1, 2, 3, 4]), masked([5, 6, 7], [0, 0, 1])]
    examples = AnchoredSequences(sequences, 2, 1, seed=0)
    found = {tuple(e["input_ids"].tolist()): e["loss_mask"].tolist() for e in (examples[0], examples[1])}
    assert found == {(1, 2, 3, 4): [True] * 4, (5, 6, 7): [False, False, True]}
    assert all(
        e["input_ids"].dtype == torch.int64 and e["loss_mask"].dtype == torch.bool for e in (examples[0], examples[1])
    )


def test_a_batch_is_padded_on_the_right_with_what_no_loss_counts():
    sequences = [text([1, 2, 3, 4, 5]), masked([6, 7, 8], [0, 0, 1])]
    examples = AnchoredSequences(sequences, 2, 2, seed=0)
    pair = sorted((examples[0], examples[1]), key=lambda e: e["input_ids"][0].item())
    batch = collate(pair)
    assert batch["input_ids"][:, :3].tolist() == [[1, 2, 3], [6, 7, 8]]
    assert batch["input_ids"].shape == (2, 5)
    assert batch["loss_mask"].tolist() == [[True] * 5, [False, False, True, False, False]]
    assert torch.equal(batch["anchors"], torch.stack([e["anchors"] for e in pair]))
    assert batch["anchors"][1].tolist() == [0, 2]  # one useful anchor, one filled in at the own last token
    for b, anchors in enumerate(batch["anchors"].tolist()):
        for anchor in anchors:
            for target in range(anchor + 2, batch["input_ids"].shape[1]):
                counted = bool(batch["loss_mask"][b, target])
                assert not counted or target < len(pair[b]["input_ids"])


def test_held_out_data_may_be_that_of_python_itself(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"input_ids": list(range(100, 120)), "loss_mask": [0] * 10 + [1] * 10}
    path.write_text(json.dumps(row) + "\n")
    corpus = load_corpus(str(path), tokenizer, max_length=16, validation_path=STDLIB, test_path=STDLIB)
    assert len(corpus.train) == 1
    for documents, split in ((corpus.validation, "validation"), (corpus.test, "test")):
        assert standard_prompts(documents) == held_out_prompts(tokenizer, split)
