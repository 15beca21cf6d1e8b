"""Messages as prompts: what training rendered, one BOS, and what cannot be answered told in one line."""

import pytest
from chat_templates import HERMES_LIKE, MISTRAL_LIKE, QWEN3_LIKE, TAKES_PARTS
from data_samples import CHAT
from malformed import is_one_line

from pardec.data.conversations import conversation_of
from pardec.decoding.asking.messages import message_ids
from pardec.model import SelfSpeculativeModel

USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
)
DROPS_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
)


def text_of(messages, tokenizer, options=None) -> str:
    [ids] = message_ids(messages, tokenizer, options)
    return tokenizer.decode(ids)


@pytest.mark.parametrize("template", [None, QWEN3_LIKE, MISTRAL_LIKE, HERMES_LIKE])
def test_messages_are_rendered_as_training_renders_what_stands_before_an_answer(chat_tokenizer, template):
    chat_tokenizer.chat_template = template or chat_tokenizer.chat_template
    conversation = conversation_of({"conversations": CHAT}, chat_tokenizer, "talk")
    for end in (1, 3):
        expected = conversation.render(CHAT[:end], add_generation_prompt=True)
        assert text_of(CHAT[:end], chat_tokenizer) == expected


def test_a_template_that_writes_bos_gets_no_second_one(bos_tokenizer):
    bos_tokenizer.chat_template = "{{ bos_token }}" + bos_tokenizer.chat_template
    [ids] = message_ids([USER], bos_tokenizer)
    assert ids.count(bos_tokenizer.bos_token_id) == 1
    assert ids == bos_tokenizer.apply_chat_template([USER], add_generation_prompt=True)["input_ids"]


def test_contents_of_parts_become_text_where_the_template_takes_none(chat_tokenizer):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert text_of([{"role": "user", "content": parts}], chat_tokenizer) == text_of([USER], chat_tokenizer)
    chat_tokenizer.chat_template = TAKES_PARTS
    assert "h+i+" in text_of([{"role": "user", "content": parts}], chat_tokenizer)


def test_options_reach_the_template(chat_tokenizer):
    chat_tokenizer.chat_template = QWEN3_LIKE
    assert "<think>" not in text_of([USER], chat_tokenizer)
    assert text_of([USER], chat_tokenizer, {"enable_thinking": False}).endswith("<think>\n\n</think>\n\n")
    assert "weather" in text_of([USER], chat_tokenizer, {"tools": TOOLS})


def test_generate_and_stream_answer_messages(tiny_base, chat_tokenizer):
    model = SelfSpeculativeModel(tiny_base, chat_tokenizer, None)
    options = {"max_new_tokens": 6, "mode": "plain"}
    chats = [[USER], [SYSTEM, *CHAT[:3]]]
    ids = [chat_tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    expected = model.generate(ids, **options).token_ids
    assert model.generate(messages=chats, **options).token_ids == expected
    assert model.generate(messages=chats[1], **options).token_ids == expected[1:]
    chunks = model.stream(messages=chats[1], **options)
    assert [token for chunk in chunks for token in chunk.token_ids] == expected[1]


def refused(call, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert is_one_line(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages: expected a list of messages with role and content, found []"),
        ("hi", "messages: expected a list of messages with role and content, found 'hi'"),
        (USER, "messages: expected a list of messages with role and content, found {"),
        ([[USER], []], "messages 1: expected a list of messages with role and content, found []"),
        ([[USER], "hi"], "messages 1: expected a list of messages with role and content, found 'hi'"),
        (["hi"], "messages 0: expected a list of messages with role and content, found 'hi'"),
        ([{"content": "hi"}], "messages: expected messages with role and content, found {'content': 'hi'}"),
        ([{"role": "user"}], "messages: expected messages with role and content, found {'role': 'user'}"),
        ([{"role": "user", "content": 3}], "messages: expected messages with role and content, found {"),
        ([USER, "hi"], "messages: expected messages with role and content, found 'hi'"),
        (CHAT, "messages: expected the last message to be the user's, found one of 'assistant'"),
        ([[USER], [SYSTEM]], "messages 1: expected the last message to be the user's, found one of 'system'"),
        ([{"role": "user", "content": "\ud800"}], "messages: expected Unicode text, found half of a surrogate pair"),
    ],
)
def test_messages_that_cannot_be_answered_are_one_line(chat_tokenizer, messages, words):
    refused(lambda: message_ids(messages, chat_tokenizer), words)


def test_a_template_without_a_system_role_is_told(chat_tokenizer):
    chat_tokenizer.chat_template = REFUSES_SYSTEM
    refused(
        lambda: message_ids([SYSTEM, USER], chat_tokenizer),
        "messages: expected no system message, as the chat template takes none, found one: System role not supported",
    )
    chat_tokenizer.chat_template = DROPS_SYSTEM
    refused(
        lambda: message_ids([SYSTEM, USER], chat_tokenizer),
        "messages: expected no system message, as the chat template leaves it out, found one",
    )
    assert text_of([USER], chat_tokenizer) == "<|user|>hi"


def test_what_a_template_refuses_otherwise_is_told_as_it_is(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ raise_exception('never') }}"
    for messages in ([USER], [SYSTEM, USER]):
        refused(lambda messages=messages: message_ids(messages, chat_tokenizer), "renders, found ", "user: never")


def test_a_base_without_tokenizer_or_template_is_told(tokenizer):
    refused(lambda: message_ids([USER], None), "messages: expected a base with a tokenizer, found none")
    refused(lambda: message_ids([USER], tokenizer), "messages: expected a tokenizer with a chat template for")


@pytest.mark.parametrize("options", ["tools", [1], {1: 2}, {"tokenize": True}, {"add_generation_prompt": False}])
def test_options_that_would_change_the_call_are_told(chat_tokenizer, options):
    refused(lambda: message_ids([USER], chat_tokenizer, options), "template_options: expected names ")


def test_prompts_and_messages_are_not_given_together(tiny_base, chat_tokenizer):
    model = SelfSpeculativeModel(tiny_base, chat_tokenizer, None)
    refused(lambda: model.generate("x", messages=[USER], mode="plain"), "expected either prompts or messages, found b")
    refused(lambda: model.stream(mode="plain"), "prompts: expected either prompts or messages, found neither")
    refused(lambda: model.generate("x", template_options={}, mode="plain"), "template_options: expected None without")
    two = [[USER], [USER]]
    refused(lambda: model.stream(messages=two, mode="plain"), "prompt: expected one prompt to stream, found 2")
