"""What stands between two answers, against the template's rendering of the whole."""

import random

import chat_templates
import pytest

from pardec.data.responses.follow_ups import between_answers, drawn_follow_up
from pardec.data.responses.response_file import Prompt


def ids_of(text, tokenizer):
    return tokenizer(text, add_special_tokens=False).input_ids


def asked(tokenizer, follow_up="Why?"):
    turns = [{"role": "user", "content": "Say hi"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return Prompt(ids_of(text, tokenizer), "questions", turns, follow_up)


def test_tokens_between_are_those_of_the_template(chat_tokenizer):
    prompt = asked(chat_tokenizer)
    response = ids_of("hi there", chat_tokenizer)
    between = between_answers(prompt, response, chat_tokenizer, [0])
    assert chat_tokenizer.decode([*prompt.input_ids, *response, *between]) == (
        "<|user|>Say hi\n<|assistant|>hi there\n<|user|>Why?\n<|assistant|>"
    )


def test_the_end_that_the_model_wrote_is_not_written_again(chat_tokenizer):
    end = chat_tokenizer.eos_token
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace("}}\n", "}}" + end)
    prompt = asked(chat_tokenizer)
    response = ids_of("hi", chat_tokenizer)
    assert chat_tokenizer.eos_token_id == 0
    cut_off = between_answers(prompt, response, chat_tokenizer, [0])
    ended = between_answers(prompt, [*response, 0], chat_tokenizer, [0])
    assert cut_off == [0, *ended]
    assert chat_tokenizer.decode(ended) == f"<|user|>Why?{end}<|assistant|>"


def test_an_end_that_the_template_does_not_write_has_nothing_behind_it(chat_tokenizer):
    response = [*ids_of("hi", chat_tokenizer), 0]
    assert between_answers(asked(chat_tokenizer), response, chat_tokenizer, [0]) is None


@pytest.mark.parametrize("template", ["SKIPS_THOUGHTS", "TRIMS"])
def test_templates_that_render_past_answers_otherwise_have_no_second_one(chat_tokenizer, template):
    trims = chat_tokenizer.chat_template.replace("message.content }}", "message.content | trim }}")
    chat_tokenizer.chat_template = trims if template == "TRIMS" else getattr(chat_templates, template)
    assert between_answers(asked(chat_tokenizer), ids_of(" hi", chat_tokenizer), chat_tokenizer, [0]) is None


def test_there_are_a_dozen_follow_ups():
    assert len({drawn_follow_up(random.Random(seed)) for seed in range(200)}) == 12
