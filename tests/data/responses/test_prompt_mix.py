"""Chat prompts of several sources: shares, limits, splits, and that the seed alone decides."""

from collections import Counter

import pytest
from data_samples import write_jsonl

from pardec.data.python_sources import split_of
from pardec.data.responses.prompt_mix import PromptSource, apportioned, draw_mix
from pardec.data.row_checks import DataError


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Questions, a library whose functions and documentation name their split, and a folder of texts."""
    library = tmp_path / "library"
    library.mkdir()
    for n in range(120):
        split = split_of(f"m{n}.py")
        doc = f"Module {n} of the {split} split. " * 12
        functions = f"def f_{split}(a, b):\n    c = a + {n}\n    return c * b\n" * 2
        (library / f"m{n}.py").write_text(f'"""{doc}"""\n\n\n{functions}')
    monkeypatch.setattr("pardec.data.python_sources.stdlib_folder", lambda: library)
    texts = tmp_path / "texts"
    texts.mkdir()
    for n in range(20):
        (texts / f"t{n:02}.md").write_text(f"Text {n:02} is about something that goes on for long. " * 40)
    questions = [{"question": f"What is {n} and {n}?" + " Really?" * (200 if n == 3 else 0)} for n in range(40)]
    path = write_jsonl(tmp_path / "questions.jsonl", questions)
    return [
        PromptSource("questions", path, 2.0),
        PromptSource("code", "python-stdlib", 1.0),
        PromptSource("passages", "python-stdlib", 0.5),
        PromptSource("passages", str(texts), 0.5),
    ]


def asked(prompts, kind):
    return [prompt.turns[0]["content"] for prompt in prompts if prompt.kind == kind]


def test_shares_are_those_of_the_weights_and_kinds_are_mixed(sources, chat_tokenizer):
    prompts, given = draw_mix(sources, chat_tokenizer, num_prompts=80, prompt_tokens=160)
    assert Counter(prompt.kind for prompt in prompts) == {"questions": 40, "code": 20, "passages": 20}
    assert [(one["kind"], one["prompts"]) for one in given] == [
        ("questions", 40), ("code", 20), ("passages", 10), ("passages", 10),
    ]  # fmt: skip
    assert len({prompt.kind for prompt in prompts[:20]}) == 3
    for prompt in prompts:
        rendered = chat_tokenizer.apply_chat_template(list(prompt.turns), tokenize=False, add_generation_prompt=True)
        assert chat_tokenizer.decode(prompt.input_ids) == rendered


def test_a_source_of_weight_0_is_not_even_read(sources, chat_tokenizer):
    nowhere = PromptSource("questions", "nowhere.jsonl", 0.0)
    prompts, given = draw_mix([*sources, nowhere], chat_tokenizer, num_prompts=8, prompt_tokens=160)
    assert [one["prompts"] for one in given] == [4, 2, 1, 1, 0]
    assert len(prompts) == 8


@pytest.mark.parametrize(
    ("weights", "total", "counts"),
    [([1], 7, [7]), ([1, 1], 7, [4, 3]), ([0.35, 0.25, 0.4], 10, [4, 2, 4]), ([1, 1000], 10, [0, 10])],
)
def test_counts_are_whole_and_sum_up(weights, total, counts):
    assert apportioned(weights, total) == counts


def test_what_is_held_out_is_never_asked_about(sources, chat_tokenizer):
    prompts, _ = draw_mix(sources, chat_tokenizer, num_prompts=600, prompt_tokens=160)
    assert {split_of(f"m{n}.py") for n in range(120)} == {"train", "validation", "test"}
    questions, code, passages = (asked(prompts, kind) for kind in ("questions", "code", "passages"))
    assert {text.split()[2] for text in questions} == {str(n) for n in range(40) if n % 20 and n != 3}
    assert all("f_train" in text or "(a, b)" in text for text in code)
    assert not any("validation" in text or "f_test" in text or "the test" in text for text in (*code, *passages))
    assert any("train split" in text for text in passages)
    assert not any('"""' in text for text in passages)  # the documentation, not the source
    assert any("Text 01" in text for text in passages)
    assert not any("Text 00" in text for text in passages)


def test_prompts_are_bounded_passages_cut_and_questions_left_out(sources, chat_tokenizer):
    prompts, given = draw_mix(sources, chat_tokenizer, num_prompts=300, prompt_tokens=160)
    assert max(len(prompt.input_ids) for prompt in prompts) <= 160
    assert [one["left_out"] for one in given] == [1, 0, 0, 0]
    cut = [prompt for prompt in prompts if "Text " in prompt.turns[0]["content"]]
    assert all(len(prompt.input_ids) > 120 for prompt in cut)  # to what fits, not to nothing


def test_everything_comes_up_before_it_does_again(sources, chat_tokenizer):
    prompts, _ = draw_mix(sources[:1], chat_tokenizer, num_prompts=37 * 2, prompt_tokens=160)
    assert set(Counter(asked(prompts, "questions")).values()) == {2}


def test_the_seed_decides_and_one_source_does_not_change_another(sources, chat_tokenizer):
    options = {"prompt_tokens": 160, "follow_ups": 0.5}
    draw = [draw_mix(sources, chat_tokenizer, num_prompts=40, seed=seed, **options)[0] for seed in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2]
    alone = draw_mix(sources[:1], chat_tokenizer, num_prompts=20, **options)[0]
    assert sorted(asked(alone, "questions")) == sorted(asked(draw[0], "questions"))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_follow_ups_have_their_share(sources, chat_tokenizer, share):
    prompts, _ = draw_mix(sources, chat_tokenizer, num_prompts=40, prompt_tokens=160, follow_ups=share)
    assert sum(prompt.follow_up is not None for prompt in prompts) == 40 * share


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (PromptSource("code", "texts"), "code: expected python-packages or python-stdlib as its path, found texts"),
        (PromptSource("passages", "nowhere.txt"), "data: expected a file or folder, found nothing at nowhere.txt"),
        (PromptSource("questions", "nowhere.jsonl"), "nowhere.jsonl: expected a JSONL file, found nothing"),
        (PromptSource("passages", "talk.jsonl"), "talk.jsonl: expected texts for passages, found rows without a text"),
        (
            PromptSource("questions", "long.jsonl"),
            r"long.jsonl: expected questions for prompts of at most 160 tokens .*, found 2 that are longer",
        ),
        (PromptSource("passages", "short.txt"), "short.txt: expected passages for .*, found none at all"),
    ],
)
def test_sources_that_give_nothing_are_named(source, message, chat_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_jsonl(tmp_path / "talk.jsonl", [{"messages": turns}] * 2)
    write_jsonl(tmp_path / "long.jsonl", [{"question": "why " * 500}] * 3)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(DataError, match=f"^{message}"):
        draw_mix([source], chat_tokenizer, num_prompts=2, prompt_tokens=160)


def test_a_limit_beyond_the_models_and_a_tokenizer_without_a_template_are_refused(sources, tokenizer, chat_tokenizer):
    with pytest.raises(DataError, match=r"^prompt_tokens: expected at most 99, .*, found 100$"):
        draw_mix(sources, chat_tokenizer, num_prompts=2, prompt_tokens=100, max_prompt_tokens=99)
    with pytest.raises(DataError, match="expected a tokenizer with a chat template for conversations, found none"):
        draw_mix(sources, tokenizer, num_prompts=2, prompt_tokens=100)
