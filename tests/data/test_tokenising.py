"""Token ids and loss masks of rows, with chat templates good and bad."""

import numpy as np
import pytest
from data_samples import CHAT, CHAT_TEMPLATE, write_jsonl
from transformers import ByT5Tokenizer

from pardec.data.corpus import load_corpus
from pardec.data.reading import read_rows
from pardec.data.row_checks import DataError
from pardec.data.tokenising import tokenise


def test_text_is_tokenised_behind_one_separator(tokenizer):
    (document,) = tokenise({"text": "def f():\n    return 1\n"}, tokenizer)
    assert document.loss_mask is None
    assert document.input_ids.dtype == np.int32
    assert document.input_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(document.input_ids[1:]) == "def f():\n    return 1\n"


def test_a_separator_that_the_tokenizer_writes_itself_is_not_doubled(tokenizer):
    ids = tokenise({"text": "<|endoftext|>x = 1"}, tokenizer)[0].input_ids.tolist()
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "x = 1"


def test_a_bos_that_a_template_has_written_is_not_put_in_front_again(bos_tokenizer):
    rendered = bos_tokenizer.bos_token + "<|user|>hi"
    with pytest.warns(UserWarning, match="begins with '<|endoftext|>' already"):
        (document,) = tokenise({"text": rendered}, bos_tokenizer)
    assert bos_tokenizer.decode(document.input_ids) == rendered
    (other,) = tokenise({"text": "<|user|>hi"}, bos_tokenizer)
    assert other.input_ids.tolist() == document.input_ids.tolist()


def test_token_ids_and_their_mask_are_taken_as_they_are(tokenizer):
    (document,) = tokenise({"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}, tokenizer)
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
        "expected an assistant turn with something to learn, found none of it rendered: ''",
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
    assert tokenise(fine, chat_tokenizer, path)[0].loss_mask is None
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{message}"):
        tokenise(unusable, chat_tokenizer, path)
    write_jsonl(tmp_path / "rows.jsonl", [row, {"text": "fine"}, row])
    with pytest.raises(DataError, match=rf"rows\.jsonl:[13]: .*{message}"):
        load_corpus(path, chat_tokenizer, max_length=16)


def learned(document, tokenizer):
    assert document.loss_mask is not None
    return tokenizer.decode(document.input_ids[document.loss_mask])


def test_only_what_the_assistant_says_is_learned(chat_tokenizer):
    (document,) = tokenise({"conversations": CHAT}, chat_tokenizer)
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
    assert learned(*tokenise({"conversations": greeting}, chat_tokenizer), chat_tokenizer) == "hello\n"
    system = [{"role": "system", "content": "Be short"}, *CHAT[:2]]
    assert learned(*tokenise({"conversations": system}, chat_tokenizer), chat_tokenizer) == "hi there!\n"


def test_of_a_conversation_that_begins_with_the_assistant_nothing_of_the_template_is_learned(chat_tokenizer):
    """As of ShareGPT, under templates that bring a system prompt of their own where there is none."""
    chat_tokenizer.chat_template = (
        "{% if messages and messages[0].role != 'system' %}<|system|>Be a model\n{% endif %}" + CHAT_TEMPLATE
    )
    greeting = {"role": "assistant", "content": "hello"}
    asked = [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "hi there!"}]
    by_system = [{"role": "system", "content": "Be a model"}, greeting]
    for turns, said in (
        ([greeting], "hello\n"),
        ([greeting, *asked], "hi there!\n"),
        (asked, "hi there!\n"),
        (by_system, "hello\n"),
        ([*by_system, *asked], "hi there!\n"),
    ):
        (document,) = tokenise({"conversations": turns}, chat_tokenizer)
        assert chat_tokenizer.decode(document.input_ids).startswith("<|system|>Be a model\n")
        assert learned(document, chat_tokenizer) == said


def test_answers_are_tokenised_apart_from_what_stands_before_as_decoding_does(chat_tokenizer):
    chat_tokenizer.chat_template = CHAT_TEMPLATE.replace("<|assistant|>", "<|assistant|>=").replace(
        "<|{{ message.role }}|>", "<|{{ message.role }}|>{% if message.role == 'assistant' %}={% endif %}"
    )
    turns = [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "= 1"}]
    (document,) = tokenise({"conversations": turns}, chat_tokenizer)
    assert chat_tokenizer.decode(document.input_ids) == "<|user|>Say hi\n<|assistant|>== 1\n"
    assert learned(document, chat_tokenizer) == "= 1\n"
    before = chat_tokenizer("<|user|>Say hi\n<|assistant|>=").input_ids
    assert document.input_ids[: len(before)].tolist() == before  # not the token ==, which stands on both sides


def test_turns_that_data_exclude_from_learning_are_not_learned(chat_tokenizer):
    said_no = [{"weight": 0}, {"weight": 0.0}, {"weight": "0.0"}, {"train": False}, {"train": 0}, {"train": "False"}]
    for excluded in said_no:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bad", **excluded}]
        turns += [{"role": "user", "content": "b"}, {"role": "assistant", "content": "good", "weight": 1}]
        (document,) = tokenise({"conversations": turns}, chat_tokenizer)
        assert learned(document, chat_tokenizer) == "good\n"
        with pytest.raises(DataError, match="expected an assistant turn to learn, found only those of weight 0"):
            tokenise({"conversations": turns[:2]}, chat_tokenizer)


def test_what_a_row_says_to_the_template_reaches_it(chat_tokenizer):
    chat_tokenizer.chat_template = "{% if loud %}LOUD {% endif %}" + CHAT_TEMPLATE
    (document,) = tokenise({"conversations": CHAT, "chat_template_kwargs": {"loud": True}}, chat_tokenizer)
    assert chat_tokenizer.decode(document.input_ids).startswith("LOUD ")


def test_a_rendering_that_is_all_or_nothing_the_assistants_is_refused(chat_tokenizer):
    chat_tokenizer.chat_template = "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}"
    with pytest.raises(
        DataError, match=r"talk\.jsonl: expected some of the rendered tokens .*, found 100 % of 'hi there!"
    ):
        tokenise({"conversations": CHAT}, chat_tokenizer, "talk.jsonl")
    chat_tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="with something to learn, found none of it rendered: 'Say hi"):
        tokenise({"conversations": CHAT}, chat_tokenizer)


def test_conversations_need_a_chat_template(tokenizer):
    with pytest.raises(DataError, match=r"talk\.jsonl: expected a tokenizer with a chat template .*, found none"):
        tokenise({"conversations": CHAT}, tokenizer, "talk.jsonl")


def test_conversations_need_a_tokenizer_that_knows_the_characters_of_its_tokens():
    slow = ByT5Tokenizer()
    slow.chat_template = CHAT_TEMPLATE
    with pytest.raises(DataError, match=r"^here: expected a fast tokenizer for conversations, .*found ByT5Tokenizer$"):
        tokenise({"conversations": CHAT}, slow, "here")
