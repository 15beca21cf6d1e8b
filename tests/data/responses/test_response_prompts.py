"""Prompts drawn from rows of every kind."""

import itertools

import pytest

from pardec.data.reading import read_rows
from pardec.data.responses.response_prompts import draw_prompts
from pardec.data.row_checks import DataError
from pardec.data.tokenising import tokenise
from pardec.measures.acceptance import digest


def text_row(number: int, lines: int) -> dict:
    return {"text": "".join(f"value_{number} = {number} + {line}\n" for line in range(lines))}


def talk(*turns: str) -> dict:
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return {"conversations": [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]}


# ---------------------------------------------------------------------- texts


def places_of(prompts, rows, tokenizer):
    """(row, position) of each prompt, found by looking through the tokens of all rows."""
    streams = [tokenise(row, tokenizer)[0].input_ids.tolist() for row in rows]
    places = []
    for prompt in prompts:
        found = [
            (number, start)
            for number, ids in enumerate(streams)
            for start in range(len(ids) - len(prompt) + 1)
            if ids[start : start + len(prompt)] == prompt
        ]
        assert len(found) == 1
        places += found
    return places


def test_all_pieces_of_all_texts_come_up_before_one_does_again(tokenizer):
    rows = [text_row(n, lines) for n, lines in enumerate((3, 9, 14, 1))]
    lengths = [len(tokenise(row, tokenizer)[0].input_ids) for row in rows]
    num_places = sum(n // 16 for n in lengths)
    assert num_places > 10
    prompts = draw_prompts(rows, tokenizer, num_prompts=2 * num_places, prompt_tokens=16)
    assert {len(prompt) for prompt in prompts} == {16}
    for half in (prompts[:num_places], prompts[num_places:]):
        places = sorted(places_of(half, rows, tokenizer))
        assert [sum(row == number for row, _ in places) for number in range(4)] == [n // 16 for n in lengths]
        assert all(b - a == 16 for (r, a), (q, b) in itertools.pairwise(places) if r == q)
    assert prompts[:num_places] != prompts[num_places:]


def test_places_and_order_depend_on_the_seed_alone(tokenizer):
    rows = [text_row(n, 20) for n in range(6)]
    draw = [draw_prompts(rows, tokenizer, num_prompts=12, prompt_tokens=16, seed=seed) for seed in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2]
    assert digest(draw[0]) == digest(draw[1]) != digest(draw[2])
    starts = {start % 16 for _, start in places_of(draw[0], rows, tokenizer)}
    assert len(starts) > 2  # offsets are drawn, too


def test_a_large_corpus_is_not_tokenised_to_its_end(tokenizer):
    read = []

    class Row(dict):
        def __getitem__(self, key):
            read.append(key)
            return super().__getitem__(key)

    draw_prompts([Row(text_row(n, 4)) for n in range(400)], tokenizer, num_prompts=5, prompt_tokens=16)
    assert 5 <= read.count("text") <= 60


def test_texts_that_are_all_too_short_are_refused_with_the_longest(tokenizer):
    rows = [text_row(0, 1), text_row(1, 2)]
    longest = max(len(tokenise(row, tokenizer)[0].input_ids) for row in rows)
    with pytest.raises(
        DataError, match=rf"^notes: expected a text of at least 64 tokens \(prompt_tokens\), found {longest}$"
    ):
        draw_prompts(rows, tokenizer, num_prompts=3, prompt_tokens=64, where="notes")
    with pytest.raises(DataError, match="expected a text of at least 64 tokens"):
        draw_prompts([], tokenizer, num_prompts=3, prompt_tokens=64)


def test_prompts_beyond_the_models_positions_are_refused(tokenizer, chat_tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"^notes: expected a prompt of at most 31 tokens, .*, found 32$"):
        draw_prompts([text_row(0, 9)], tokenizer, num_prompts=1, prompt_tokens=32, max_prompt_tokens=31, where="notes")
    path = tmp_path / "talk.jsonl"
    path.write_text('\n{"messages": [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d"}]}\n')
    rows = read_rows(str(path), "auto")
    with pytest.raises(DataError, match=r"talk\.jsonl:2: expected a prompt of at most 5 tokens, .*, found \d+$"):
        draw_prompts(rows, chat_tokenizer, num_prompts=1, prompt_tokens=1, max_prompt_tokens=5)


# ---------------------------------------------------------------------- conversations and masks


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (talk("u:Say hi", "a:hi", "u:And bye", "a:bye"), "<|user|>Say hi\n<|assistant|>"),
        (talk("s:Be short", "u:Say hi", "a:hi"), "<|system|>Be short\n<|user|>Say hi\n<|assistant|>"),
        (talk("u:Say", "u:hi", "a:hi", "u:more"), "<|user|>Say\n<|user|>hi\n<|assistant|>"),
        (talk("a:Hello!", "u:Say hi", "a:hi"), "<|assistant|>Hello!\n<|user|>Say hi\n<|assistant|>"),
        (talk("a:Hello!", "u:Say hi"), "<|assistant|>Hello!\n<|user|>Say hi\n<|assistant|>"),
    ],
    ids=["two answers", "system", "two questions", "greeting", "no answer"],
)
def test_a_conversation_gives_what_stands_before_its_first_answer(row, prompt, chat_tokenizer):
    prompts = draw_prompts([row], chat_tokenizer, num_prompts=2, prompt_tokens=1)
    assert [chat_tokenizer.decode(ids) for ids in prompts] == [prompt, prompt]


def test_a_conversation_without_a_question_is_named(chat_tokenizer):
    with pytest.raises(DataError, match=r"^talk: expected a user turn to answer, found system, assistant$"):
        draw_prompts([talk("s:Be", "a:hi")], chat_tokenizer, num_prompts=1, prompt_tokens=1, where="talk")


def test_what_the_template_refuses_is_named(chat_tokenizer):
    refuses = "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    chat_tokenizer.chat_template = refuses + chat_tokenizer.chat_template
    with pytest.raises(
        DataError, match=r"^talk: expected turns that the chat template renders, found tool, user: no tools here$"
    ):
        draw_prompts([talk("t:1", "u:2", "a:3")], chat_tokenizer, num_prompts=1, prompt_tokens=1, where="talk")


def test_a_template_that_renders_nothing_is_refused(chat_tokenizer):
    chat_tokenizer.chat_template = "{% if messages %}{% endif %}"
    with pytest.raises(DataError, match="expected a chat template that renders a prompt, found ''"):
        draw_prompts([talk("u:2", "a:3")], chat_tokenizer, num_prompts=1, prompt_tokens=1)


def test_rows_with_a_mask_give_what_stands_before_their_first_token_to_learn(tokenizer):
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "loss_mask": [0, 0, 0, 1, 0]},
        {"input_ids": [3, 4], "loss_mask": [1, 1]},
    ]
    assert sorted(draw_prompts(rows, tokenizer, num_prompts=2, prompt_tokens=64)) == [[3], [5, 6, 7]]
