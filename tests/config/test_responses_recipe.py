"""Recipes of responses: the two forms of their prompts, and what overrides reach inside of a mix."""

import pytest

from pardec.config.recipe_files import RecipeError, load_recipe, parse_recipe
from pardec.config.responses_recipe import ResponsesRecipe
from pardec.data.responses.prompt_mix import PromptSource

MIX = {"mix": [{"kind": "questions", "path": "q.jsonl", "key": "problem"}, {"kind": "code", "path": "python-stdlib"}]}


@pytest.fixture
def path(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "base: b\noutput: o.jsonl\ndata:\n  mix:\n    - {kind: questions, path: q.jsonl}\n"
        "    - {kind: code, path: python-stdlib}\n"
    )
    return recipe


def recipe_with(data) -> ResponsesRecipe:
    return parse_recipe({"base": "b", "output": "o.jsonl", "data": data}, "here", ResponsesRecipe)


def test_what_is_told_of_a_recipe_has_its_own_form_alone_and_is_the_same_recipe_again():
    pieces, mixed = recipe_with({"path": "x.txt"}), recipe_with({**MIX, "follow_ups": 0.25})
    assert pieces.model_dump()["data"] == {"path": "x.txt", "format": "auto", "subset": None, "split": "train"}
    assert set(mixed.model_dump()["data"]) == {"mix", "follow_ups"}
    for recipe in (pieces, mixed):
        assert ResponsesRecipe.model_validate(recipe.model_dump()) == recipe


def test_sources_arrive_in_the_room_of_data():
    mix = recipe_with(MIX).data.mix
    assert mix is not None
    assert [section.source() for section in mix] == [
        PromptSource("questions", "q.jsonl", 1.0, "problem"),
        PromptSource("code", "python-stdlib", 1.0, None),
    ]


def test_an_override_reaches_a_source_by_its_place(path):
    mix = load_recipe(path, ["data.mix.0.path=mine.jsonl", "data.mix.1.weight=3"], ResponsesRecipe).data.mix
    assert mix is not None
    assert [(one.path, one.weight) for one in mix] == [("mine.jsonl", 1.0), ("python-stdlib", 3.0)]


@pytest.mark.parametrize("key", ["data.mix.2.path", "data.mix.-1.path", "data.mix.first.path", "data.mix.0"])
def test_an_override_of_no_place_is_refused(path, key):
    with pytest.raises(RecipeError, match=r"^override: expected a section before the dot, found 'data\.mix\."):
        load_recipe(path, [f"{key}=x"], ResponsesRecipe)


def test_an_unknown_key_of_a_source_names_its_place(path):
    with pytest.raises(RecipeError, match=r"unknown key: expected one such as 'data\.mix\.1\.weight', found"):
        load_recipe(path, ["data.mix.1.weigth=2"], ResponsesRecipe)
