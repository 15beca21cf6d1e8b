"""What is learned of conversations under templates that think, call tools, or render the past otherwise."""

import pytest
from chat_templates import (
    CLOSES_THOUGHTS,
    HARMONY_LIKE,
    HERMES_LIKE,
    MISTRAL_LIKE,
    QWEN3_LIKE,
    R1_LIKE,
    SHOWS_AND_SKIPS_THOUGHTS,
    SKIPS_THOUGHTS,
    TAKES_PARTS,
)
from data_samples import CHAT, CHAT_TEMPLATE

from pardec.data.conversations import conversation_of, rendered_answers
from pardec.data.responses.response_prompts import draw_prompts
from pardec.data.row_checks import DataError, check_row
from pardec.data.tokenising import tokenise


def user(content) -> dict:
    return {"role": "user", "content": content}


def said(content, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
ASKED = [
    user("weather?"),
    said(None, tool_calls=[CALL]),
    {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": "sunny"},
    said("It is sunny."),
]


def learned(row: dict, tokenizer, template: str) -> list[tuple[str, list[str]]]:
    """(text in front, texts to learn) of each example, as the text that is rendered and as tokens tell alike."""
    tokenizer.chat_template = template
    row = check_row(row, "talk.jsonl:1")
    rendered = rendered_answers(conversation_of(row, tokenizer, "talk.jsonl:1"))
    documents = tokenise(row, tokenizer)
    assert [tokenizer.decode(one.input_ids) for one in documents] == [one.text for one in rendered]
    assert all(one.loss_mask.any() for one in documents)
    return [(one.text[: one.spans[0][0]], [one.text[a:b] for a, b in one.spans]) for one in rendered]


def prompt(turns: list[dict], tokenizer, **options) -> str:
    """What decoding has in front of it."""
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options)


def test_each_answer_is_learned_as_decoding_will_write_it_where_thoughts_of_the_past_go(chat_tokenizer):
    turns = [user("hi"), said("<think>\nx\n</think>\n\nhello"), user("sum?"), said("<think>\ny\n</think>\n\n3")]
    first, second = learned({"messages": turns}, chat_tokenizer, QWEN3_LIKE)
    assert first == (prompt(turns[:1], chat_tokenizer), ["<think>\nx\n</think>\n\nhello<|im_end|>\n"])
    assert second == (prompt(turns[:3], chat_tokenizer), ["<think>\ny\n</think>\n\n3<|im_end|>\n"])
    assert "x" not in second[0]


def test_answers_without_thoughts_have_the_empty_ones_of_the_template(chat_tokenizer):
    answers = learned({"messages": CHAT}, chat_tokenizer, QWEN3_LIKE)
    assert [texts for _, texts in answers] == [
        [f"<think>\n\n</think>\n\n{text}<|im_end|>\n"] for text in ("hi there!", "bye")
    ]


def test_reasoning_of_its_own_key_reaches_the_template(chat_tokenizer):
    turns = [user("sum?"), said("3", reasoning_content="1 + 2 = 3")]
    [(_, [text])] = learned({"messages": turns}, chat_tokenizer, QWEN3_LIKE)
    assert text == "<think>\n1 + 2 = 3\n</think>\n\n3<|im_end|>\n"


def test_thoughts_that_decoding_has_opened_are_learned_though_the_past_shows_none(chat_tokenizer):
    turns = [user("hi"), said("<think>\nhm\n</think>\n\nhello"), user("sum?"), said("3")]
    first, second = learned({"messages": turns}, chat_tokenizer, R1_LIKE)
    assert first == (prompt(turns[:1], chat_tokenizer), ["hm\n</think>\n\nhello<end>"])
    assert first[0].endswith("<Assistant><think>\n")
    assert second == (prompt(turns[:3], chat_tokenizer), ["3<end>"])
    assert "hm" not in second[0]


def test_thoughts_of_their_own_key_go_into_the_block_that_decoding_has_opened(chat_tokenizer):
    turns = [user("sum?"), said("3", reasoning_content="1 + 2 = 3")]
    [(front, [text])] = learned({"messages": turns}, chat_tokenizer, R1_LIKE)
    assert front.endswith("<Assistant><think>\n")
    assert text == "1 + 2 = 3\n</think>\n\n3<end>"


def test_an_opened_block_that_the_template_closes_at_once_is_closed(chat_tokenizer):
    turns = [*CHAT[:2], user("sum?"), said("3", reasoning_content="1 + 2")]
    answers = learned({"messages": turns}, chat_tokenizer, CLOSES_THOUGHTS)
    assert [texts for _, texts in answers] == [["</think>hi there!<|end|>\n"], ["1 + 2\n</think>3<|end|>\n"]]
    assert [front for front, _ in answers] == [prompt(turns[:end], chat_tokenizer) for end in (1, 3)]


def test_thoughts_that_decoding_skips_are_not_learned(chat_tokenizer):
    turns = [*CHAT[:2], user("sum?"), said("3", reasoning_content="1 + 2")]
    answers = learned({"messages": turns}, chat_tokenizer, SHOWS_AND_SKIPS_THOUGHTS)
    assert [texts for _, texts in answers] == [["hi there!<|end|>\n"], ["3<|end|>\n"]]
    assert [front for front, _ in answers] == [prompt(turns[:end], chat_tokenizer) for end in (1, 3)]


def test_an_answer_stands_behind_thoughts_of_the_past_that_go_only_with_it(chat_tokenizer):
    turns = [user("hi"), said("hello", reasoning_content="hm"), user("sum?"), said("3", reasoning_content="1 + 2")]
    answers = learned({"messages": turns}, chat_tokenizer, HARMONY_LIKE)
    thought, final = "<|channel|>analysis<|message|>{}<|end|>", "<|start|>assistant<|channel|>final<|message|>{}<|end|>"
    assert [texts for _, texts in answers] == [
        [thought.format("hm") + final.format("hello")],
        [thought.format("1 + 2") + final.format("3")],
    ]
    assert [front for front, _ in answers] == [prompt(turns[:end], chat_tokenizer) for end in (1, 3)]
    assert "hm" in answers[1][0]


def test_an_answer_stands_behind_the_thoughts_that_decoding_skips(chat_tokenizer):
    [(front, [text]), _] = learned({"messages": CHAT}, chat_tokenizer, SKIPS_THOUGHTS)
    assert (front, text) == ("<|user|>\nSay hi<|end|>\n<|assistant|>\n<think>\n\n</think>\n\n", "hi there!<|end|>\n")


def test_an_answer_stands_behind_the_system_prompt_that_decoding_sees(chat_tokenizer):
    turns = [{"role": "system", "content": "Be short"}, *CHAT]
    answers = learned({"messages": turns}, chat_tokenizer, MISTRAL_LIKE)
    expected = [
        (prompt(turns[:2], chat_tokenizer), [" hi there!</s>"]),
        (prompt(turns[:4], chat_tokenizer), [" bye</s>"]),
    ]
    assert answers == expected
    assert all("Be short" in front for front, _ in answers)


@pytest.mark.parametrize("reasons", ["loop.last", "loop.last and message.role == 'assistant'"])
def test_what_only_a_last_turn_has_is_learned_where_it_is_last(reasons, chat_tokenizer):
    template = CHAT_TEMPLATE.replace(
        "}}\n{% endfor", f"}}}}{{% if {reasons} %}} (reasoning){{% endif %}}{{{{ '\n' }}}}{{% endfor"
    )
    answers = learned({"messages": CHAT}, chat_tokenizer, template)
    assert [texts for _, texts in answers] == [["hi there! (reasoning)\n"], ["bye (reasoning)\n"]]
    assert [front for front, _ in answers] == [prompt(CHAT[:end], chat_tokenizer) for end in (1, 3)]


def test_an_unchanging_template_gives_one_example_for_all_answers(chat_tokenizer):
    [(front, texts)] = learned({"messages": CHAT}, chat_tokenizer, CHAT_TEMPLATE)
    assert (front, texts) == ("<|user|>Say hi\n<|assistant|>", ["hi there!\n", "bye\n"])


def test_a_greeting_is_no_example_of_its_own(chat_tokenizer):
    answers = learned({"messages": [said("Hello"), *CHAT]}, chat_tokenizer, QWEN3_LIKE)
    assert [front for front, _ in answers] == [
        prompt([said("Hello"), *CHAT[:end]], chat_tokenizer) for end in (0 + 1, 3)
    ]


@pytest.mark.parametrize("generation_prompt", ["<|bot|>", "<|user|>", "Answer: "])
def test_a_generation_prompt_that_leads_to_no_answer_is_refused(generation_prompt, chat_tokenizer):
    template = CHAT_TEMPLATE.replace("<|assistant|>", generation_prompt)
    with pytest.raises(
        DataError, match=r"^talk\.jsonl:1: expected a chat template that renders answers behind its gen"
    ):
        learned({"messages": CHAT}, chat_tokenizer, template)


# ---------------------------------------------------------------------- turns as they were given


def test_calls_and_tools_are_where_a_thinking_template_has_them(chat_tokenizer):
    (front, [call]), (later, [answer]) = learned({"messages": ASKED, "tools": TOOLS}, chat_tokenizer, QWEN3_LIKE)
    assert front == prompt(ASKED[:1], chat_tokenizer, tools=TOOLS)
    assert later == prompt([ASKED[0], said("", tool_calls=[CALL]), ASKED[2]], chat_tokenizer, tools=TOOLS)
    written = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n'
    assert call == "<think>\n\n</think>\n\n" + written
    assert answer == "<think>\n\n</think>\n\nIt is sunny.<|im_end|>\n"


def test_the_whole_rendering_is_the_templates_own(chat_tokenizer):
    chat_tokenizer.chat_template = HERMES_LIKE
    [document] = tokenise(check_row({"messages": ASKED, "tools": TOOLS}, "here"), chat_tokenizer)
    assert chat_tokenizer.decode(document.input_ids) == (
        "<tool>weather</tool>\n<|user|>weather?<|end|>\n<|assistant|>call c1 weather<|end|>\n"
        "<|tool|>[weather c1] sunny<|end|>\n<|assistant|>It is sunny.<|end|>\n"
    )
    assert chat_tokenizer.decode(document.input_ids[document.loss_mask]) == (
        "call c1 weather<|end|>\nIt is sunny.<|end|>\n"
    )


def test_tools_are_in_prompts_for_responses_too(chat_tokenizer):
    chat_tokenizer.chat_template = HERMES_LIKE
    row = check_row({"messages": ASKED, "tools": TOOLS}, "here")
    [ids] = draw_prompts([row], chat_tokenizer, num_prompts=1, prompt_tokens=1)
    assert chat_tokenizer.decode(ids) == "<tool>weather</tool>\n<|user|>weather?<|end|>\n<|assistant|>"


def test_a_call_that_the_template_leaves_out_is_no_empty_answer(chat_tokenizer):
    with pytest.raises(DataError, match=r"talk\.jsonl:1: expected an assistant turn with something .*<\|assistant\|>"):
        learned({"messages": [user("weather?"), said("", tool_calls=[CALL])]}, chat_tokenizer, CHAT_TEMPLATE)


def test_contents_that_the_template_leaves_out_are_no_empty_answers(chat_tokenizer):
    """As one for parts alone does with text, where it fails on empty text."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.content[0].type == 'text' %}{% endif %}"
        "{% for p in m.content %}{{ p.text }}{% endfor %}<|end|>{% endfor %}"
    )
    with pytest.raises(DataError, match=r"expected an assistant turn with something to learn, found none of it rend"):
        learned({"messages": [user("hi"), said("hello")]}, chat_tokenizer, template)


PARTS = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi"}]


@pytest.mark.parametrize(
    ("template", "front"),
    [
        (TAKES_PARTS, "<|user|>Say +hi+\n<|assistant|>"),
        (CHAT_TEMPLATE, "<|user|>Say hi\n<|assistant|>"),  # shows lists as Python does
        (QWEN3_LIKE, "<|im_start|>user\nSay hi<|im_end|>\n<|im_start|>assistant\n"),  # leaves lists out
        (CHAT_TEMPLATE.replace("message.content", "message.content.strip()"), "<|user|>Say hi\n<|assistant|>"),
    ],
    ids=["takes parts", "shows code", "leaves out", "fails"],
)
def test_parts_go_to_a_template_that_takes_them_and_as_text_to_others(template, front, chat_tokenizer):
    [(found, _)] = learned({"messages": [user(PARTS), said("hi")]}, chat_tokenizer, template)
    assert found == front


def test_parts_that_are_no_text_need_a_template_that_takes_them(chat_tokenizer):
    turns = [user("hi"), said([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "hello"}])]
    [(_, [text])] = learned({"messages": turns}, chat_tokenizer, TAKES_PARTS)
    assert text == "[hm]hello+\n"
    with pytest.raises(
        DataError, match=r"expected parts of text, as the chat template takes no others, found .*thinking"
    ):
        learned({"messages": turns}, chat_tokenizer, CHAT_TEMPLATE)


def test_whatever_a_template_raises_is_one_line(chat_tokenizer):
    with pytest.raises(
        DataError, match=r"^talk\.jsonl:1: expected turns that the chat template renders, found user, .*"
    ):
        learned({"messages": CHAT}, chat_tokenizer, "{{ 1 + messages[0].content }}")
