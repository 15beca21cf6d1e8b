"""Questions that a model asks itself: where the user speaks, and what of the written is a question."""

import pytest
from chat_templates import GEMMA3_LIKE, MISTRAL_LIKE, QWEN3_LIKE

from pardec.data.responses.own_questions import questions_of, user_turn
from pardec.data.row_checks import DataError

QUESTION = "What is it that a compiler does?"


@pytest.mark.parametrize("template", [None, GEMMA3_LIKE, MISTRAL_LIKE, QWEN3_LIKE])
def test_front_question_and_end_render_what_the_template_renders(chat_tokenizer, template):
    chat_tokenizer.chat_template = template or chat_tokenizer.chat_template
    turn = user_turn(chat_tokenizer)
    rendered = chat_tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    front, behind = rendered.split(QUESTION)
    assert chat_tokenizer.decode(turn.input_ids) == front
    assert behind.strip() == turn.end


def test_a_question_ends_with_eos_or_with_the_text_of_the_template(chat_tokenizer):
    turn, eos = user_turn(chat_tokenizer), chat_tokenizer.eos_token_id

    def ids(text):
        return chat_tokenizer(text, add_special_tokens=False).input_ids

    written = [
        [*ids(QUESTION), eos],
        ids(f" {QUESTION}{turn.end} And an answer"),
        ids(QUESTION),  # cut off
        [*ids("Why?"), eos],  # too short
        [eos],
    ]
    assert questions_of(written, turn, chat_tokenizer, {eos}) == [QUESTION, QUESTION]


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (None, "found none"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "found 'aquestionoftheuser'"),
        ("no words", "found 'no words'"),
        ("<{{ messages[0].content }}> or <{{ messages[0].content }}>", "or <aquestion"),
        ("{{ raise_exception('nobody may speak') }}", "nobody may speak"),
    ],
)
def test_templates_that_give_the_user_no_place_are_told(chat_tokenizer, template, found):
    chat_tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"^base: expected .*") as error:
        user_turn(chat_tokenizer)
    assert found in str(error.value)
