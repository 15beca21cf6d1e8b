"""Prompts of text whose beginning the tokenizer and a chat template both write."""

import warnings

import pytest

from pardec.decoding.asking.prompts import text_ids, token_ids
from pardec.model import SelfSpeculativeModel

TURNS = [{"role": "user", "content": "hi"}]


def rendered(tokenizer) -> tuple[str, list[int]]:
    """A conversation as text and as its template's own token ids."""
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    text = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    return text, tokenizer.apply_chat_template(TURNS, add_generation_prompt=True)["input_ids"]


def test_a_rendered_chat_keeps_its_one_bos(bos_tokenizer):
    text, expected = rendered(bos_tokenizer)
    assert bos_tokenizer(text).input_ids == [bos_tokenizer.bos_token_id, *expected]  # what it does by itself
    with pytest.warns(UserWarning, match="^text that begins with '<|endoftext|>' already: none is put in front of it$"):
        assert token_ids([text, "x = 1"], bos_tokenizer, 4096) == [expected, bos_tokenizer("x = 1").input_ids]


def test_text_that_the_tokenizer_adds_nothing_to_stays(tokenizer, bos_tokenizer):
    bos = tokenizer.bos_token
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in (bos + "x", bos + bos + "x", "\t\t\t\tx", "(" * 40, ""):
            assert text_ids(text, tokenizer) == tokenizer(text).input_ids
        for text in ("x = 1", "((((((((", "\n\n\n\n"):
            assert text_ids(text, bos_tokenizer) == bos_tokenizer(text).input_ids


def test_of_several_bos_in_a_text_none_is_lost(bos_tokenizer):
    bos = bos_tokenizer.bos_token_id
    for count in (1, 2, 3):
        with pytest.warns(UserWarning, match="none is put in front"):
            assert text_ids("<|endoftext|>" * count, bos_tokenizer) == [bos] * count


def test_generate_and_stream_decode_what_the_template_writes(tiny_base, bos_tokenizer):
    text, ids = rendered(bos_tokenizer)
    model = SelfSpeculativeModel(tiny_base, bos_tokenizer, None)
    expected = model.generate(ids, max_new_tokens=6, mode="plain").token_ids[0]
    with pytest.warns(UserWarning, match="none is put in front"):
        assert model.generate(text, max_new_tokens=6, mode="plain").token_ids[0] == expected
    with pytest.warns(UserWarning, match="none is put in front"):
        chunks = list(model.stream(text, max_new_tokens=6, mode="plain"))
    assert [token for chunk in chunks for token in chunk.token_ids] == expected
