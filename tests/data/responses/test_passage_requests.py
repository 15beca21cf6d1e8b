"""Requests about passages: how texts are cut, what is asked, and the documentation inside of sources."""

import random

from pardec.data.responses.passage_requests import PassageRequest, documentation_of, passage_requests, passages_of

PARAGRAPHS = [f"Paragraph {n} " + f"says {n} and so on. " * 6 for n in range(9)]  # 110 to 140 characters each
TEXT = "\n\n".join(PARAGRAPHS)


def test_passages_are_whole_paragraphs_up_to_a_number_of_characters():
    passages = passages_of(TEXT, 450)
    assert all(200 <= len(passage) <= 450 for passage in passages)
    kept = [line for passage in passages for line in passage.split("\n\n")]
    assert kept == [one.rstrip() for one in PARAGRAPHS][: len(kept)]
    assert len(kept) >= 8  # what is left at the end may be too short


def test_a_long_paragraph_is_a_passage_and_a_short_text_none():
    assert passages_of("word " * 300, 400) == [("word " * 300).strip()]
    assert passages_of("word " * 30, 400) == []


def test_the_documentation_of_a_source_is_that_of_its_module_and_classes():
    long, short = "What it is for. " * 20, "Too short."
    function = f'def f():\n    """{long} of f"""\n'
    source = f'"""{long} of the module"""\nclass A:\n    """{long} of A"""\n\nclass B:\n    """{short}"""\n{function}'
    assert [doc.split("of ")[-1] for doc in documentation_of(source)] == ["the module", "A"]
    assert list(documentation_of("class (:")) == []


def test_requests_quote_a_passage_in_one_of_a_dozen_wordings():
    found = [one for seed in range(60) for one in passage_requests([TEXT], 400, random.Random(seed))]
    assert len({one.wording for one in found}) == 13
    for one in found:
        assert one.passage in one.text()
        assert one.passage.split("\n\n")[0] + " " in PARAGRAPHS
        assert one.wording.count("{passage}") == 1
        assert "{passage}" not in one.text()


def test_requests_depend_on_the_seed_alone_and_are_few_of_one_text():
    draw = [list(passage_requests([TEXT, TEXT * 9], 300, random.Random(seed))) for seed in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2]
    assert max(map(len, draw)) <= 6


def test_of_sources_the_beginning_of_the_documentation_is_meant():
    source = f'"""{TEXT}"""\nclass A:\n    x = 1\n'
    (asked,) = passage_requests([source], 300, random.Random(0), python=True)
    assert asked.passage.startswith("Paragraph 0")


def test_a_passage_is_shortened_to_whole_words():
    request = PassageRequest("Sum up: {passage}", "alpha beta gamma delta")
    assert request.shortened(0.6).text() == "Sum up: alpha beta"
    assert request.shortened(0.0).passage == ""
