"""Recipe files: YAML with dotted overrides, checked so that a mistyped key is an error and not a default."""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the key, what was expected and what was found."""


class Section(BaseModel):
    """A part of a recipe; a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid")


# YAML reads a bare `no` as false
MixedPrecision = Annotated[
    Literal["auto", "no", "bf16"], BeforeValidator(lambda value: "no" if value is False else value)
]


AnyRecipe = TypeVar("AnyRecipe", bound=Section)


def recipe_of_command_line(description: str | None, model: type[AnyRecipe]) -> AnyRecipe:
    """The recipe that a script is started with, as `load_recipe` takes it; `description` is what --help says."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    return load_recipe(args.recipe, args.overrides, model)


def load_recipe(path: str | Path, overrides: Sequence[str], model: type[AnyRecipe]) -> AnyRecipe:
    """Reads a recipe and applies overrides of the form `section.key=value`, values in YAML.

    Args:
        path: YAML file.
        overrides: as typed on the command line.
        model: what the recipe is checked against.

    Raises:
        RecipeError: for a missing or malformed file, an unknown key (naming the nearest), a value out of range.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise RecipeError(f"{path}: expected a recipe file, found nothing") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise RecipeError(f"{path}: expected YAML, found {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: expected a mapping of sections, found {type(raw).__name__}")
    for override in overrides:
        _apply_override(raw, override)
    return parse_recipe(raw, str(path), model)


def parse_recipe(raw: dict[str, Any], source: str, model: type[AnyRecipe]) -> AnyRecipe:
    """A recipe from plain values; `source` is named in errors, which are those of `load_recipe`."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{source}: {_describe(error, model)}") from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override: expected section.key=value, found {override!r}")
    *sections, last = key.split(".")
    for section in sections:
        if raw.get(section) is None:
            raw[section] = {}
        raw = raw[section]
        if not isinstance(raw, dict):
            raise RecipeError(f"override: expected a section before the dot, found {override!r}")
    try:
        raw[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        found = " ".join(str(error).split())
        raise RecipeError(f"override {override!r}: expected YAML, found {found}") from None


def _describe(error: ValidationError, model: type[Section]) -> str:
    # an unknown key first: a mistyped required key is also a missing one
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    location = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        *sections, last = location
        nearest = difflib.get_close_matches(last, _known_keys(model, sections), n=1, cutoff=0.0)
        return f"unknown key {'.'.join(location)!r}; the nearest known one is {'.'.join([*sections, *nearest])!r}"
    # pydantic appends the type that it tried
    key = ".".join(part for part in location if part not in ("float", "str") and not part.startswith("list["))
    if first["type"] == "missing":
        return f"expected key {key!r}, found none"
    if first["type"] == "value_error" and "ctx" in first:
        return str(first["ctx"]["error"])
    return f"{key}: {first['msg'].lower()}, found {first['input']!r}"


def _known_keys(model: type[Section], sections: list[str]) -> list[str]:
    for section in sections:
        annotation = model.model_fields[section].annotation
        choices = (annotation, *get_args(annotation))  # a section may be optional
        model = next(kind for kind in choices if isinstance(kind, type) and issubclass(kind, Section))
    return list(model.model_fields)
