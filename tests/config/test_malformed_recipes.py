"""Recipes that are changed by rule, key by key and cut by cut: each is taken or refused in one line."""

import datetime
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from malformed import UNFIT, damaged_files, outcome_of

from pardec.config.adapter_recipe import Recipe
from pardec.config.pretrain_recipe import PretrainRecipe
from pardec.config.recipe_files import RecipeError, Section, load_recipe, parse_recipe
from pardec.config.responses_recipe import ResponsesRecipe
from pardec.errors import shown

RECIPES = Path(__file__).parents[2] / "recipes"
KINDS = {
    "python_100m_lora.yaml": Recipe,
    "pretrain_tiny_python.yaml": PretrainRecipe,
    "responses_tiny_python.yaml": ResponsesRecipe,
    "responses_smollm2.yaml": ResponsesRecipe,
}  # fmt: skip
# JSON is YAML; those that nobody can read are tried with one key, as they take long
UNREADABLE = {"tag": "!!python/name:os.system", "alias": "*x", "tab": "\tx", "unclosed": "[1", "date": "2020-99-01"}
UNREADABLE |= {kind: UNFIT[kind] for kind in ("bottomless", "endless", "deep")}
VALUES = [yaml.safe_load(text) for kind, text in UNFIT.items() if kind not in UNREADABLE]
VALUES += [math.inf, math.nan, datetime.date(2020, 1, 1), b"x", {1: 2}, [[], {}], {"a"}]


def keys_of(model: type[Section], path: str = "") -> Iterator[str]:
    """Dotted keys of a recipe, those of sections that may be left out too."""
    for name, field in model.model_fields.items():
        yield path + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from keys_of(kind, f"{path}{name}.")


def outcomes(cases: dict[str, Callable[[], object]], *begins: str) -> dict[str, str]:
    """By case, whether it is taken or refused; asserts that it is refused in one line that begins with its place."""
    found = {case: outcome_of(act, RecipeError, *begins) for case, act in cases.items()}
    wrong = {case: complaint for case, (_, complaint) in found.items() if complaint}
    assert not wrong, wrong
    return {case: "refused" if is_refused else "taken" for case, (is_refused, _) in found.items()}


def overridden(path: Path, model: type[Section], overrides: list[str]) -> dict[str, str]:
    """`outcomes` of the recipe with one override each."""
    cases = {override[:99]: partial(load_recipe, path, [override], model) for override in overrides}
    return outcomes(cases, str(path), "override")


def with_value(raw: dict, key: str, value: Any) -> dict:
    """A copy of a recipe's values with another one, and the sections that it needs."""
    first, dot, rest = key.partition(".")
    inner = raw.get(first) if isinstance(raw.get(first), dict) else {}
    return {**raw, first: with_value(inner, rest, value) if dot else value}


@pytest.mark.parametrize("name", KINDS)
def test_values_of_every_unfit_kind(name):
    raw, model = yaml.safe_load((RECIPES / name).read_text()), KINDS[name]
    cases = {
        f"{key}={shown(value)}": partial(parse_recipe, with_value(raw, key, value), "here", model)
        for key in keys_of(model)
        for value in VALUES
    }
    found = list(outcomes(cases, "here: ").values())
    assert found.count("refused") > len(found) // 2
    assert "taken" in found


@pytest.mark.parametrize("kind", UNREADABLE)
def test_values_that_cannot_be_read(kind):
    overrides = [f"{key}={UNREADABLE[kind]}" for key in ("base", "train.steps")]
    assert "refused" in overridden(RECIPES / "python_100m_lora.yaml", Recipe, overrides).values()


@pytest.mark.parametrize("name", KINDS)
def test_keys_beside_the_known_ones(name):
    keys = list(keys_of(KINDS[name]))
    overrides = [f"{key}{end}=1" for key in keys for end in ("x", ".x", "\n", "x" * 500)]
    overrides += [override for key in keys for override in (f".{key}=1", f"{key}", f"={key}", f"{key}..x=1")]
    assert set(overridden(RECIPES / name, KINDS[name], overrides).values()) == {"refused"}


@pytest.mark.parametrize("name", KINDS)
def test_files_that_are_damaged_or_lack_a_key(name, tmp_path):
    raw = yaml.safe_load((RECIPES / name).read_text())
    content = json.dumps(raw).encode()
    for done, damage in damaged_files(content).items():
        path = tmp_path / done
        path.write_bytes(content)
        damage(path)
        assert overridden(path, KINDS[name], ["output_dir=x"]) == {"output_dir=x": "refused"}, done
    path = tmp_path / "bottomless"
    path.write_text("a: " + UNFIT["bottomless"])
    assert set(overridden(path, KINDS[name], ["output_dir=x"]).values()) == {"refused"}
    for key, field in KINDS[name].model_fields.items():
        rest = {other: value for other, value in raw.items() if other != key}
        found = outcomes({key: partial(parse_recipe, rest, "here", KINDS[name])}, "here: ")
        assert found == {key: "refused" if field.is_required() else "taken"}
