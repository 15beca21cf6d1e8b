"""Recipe files: YAML with dotted overrides, checked so that a mistyped key is an error and not a default."""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from pardec.errors import problem, shown


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the key, what was expected and what was found."""


_TOO_LARGE = 2**53  # beyond it floats are no longer exact, and nothing is counted that far


class Section(BaseModel):
    """A part of a recipe; a key that it does not know is an error, as are true, infinity and NaN for a number."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        if {int, float} & {kind, *(one for one in get_args(kind) if isinstance(one, type))}:
            if isinstance(value, bool):
                raise PydanticCustomError("number", "Input should be a number")
            if isinstance(value, int) and abs(value) >= _TOO_LARGE:
                raise PydanticCustomError("number", "Input should be a number below 2^53")
        return value


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
        raw = yaml.load(Path(path).read_text(), _LoaderWithoutRepetition)
    except FileNotFoundError:
        raise RecipeError(f"{path}: expected a recipe file, found nothing") from None
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: expected YAML, found {_what_yaml_says(error)}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: expected a mapping of sections, found {type(raw).__name__}")
    for override in overrides:
        _apply_override(raw, override)
    return parse_recipe(raw, str(path), model)


class _LoaderWithoutRepetition(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping; YAML's own takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"key {shown(twice)} twice, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def parse_recipe(raw: dict[str, Any], source: str, model: type[AnyRecipe]) -> AnyRecipe:
    """A recipe from plain values; `source` is named in errors, which are those of `load_recipe`."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{source}: {_describe(error, model)}") from None


def _apply_override(raw: Any, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override: expected section.key=value, found {shown(override)}")
    *sections, last = key.split(".")
    for section in sections:
        raw = _below(raw, section)
        if not isinstance(raw, dict | list):
            break
    if not isinstance(raw, dict):
        raise RecipeError(f"override: expected a section before the dot, found {shown(override)}")
    try:
        raw[last] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"override {shown(override)}: expected YAML, found {_what_yaml_says(error)}") from None


def _below(raw: Any, key: str) -> Any:
    """What a section has under a key, made if there is nothing; of a list what stands at a place, counted from 0."""
    if isinstance(raw, list):
        return {str(place): value for place, value in enumerate(raw)}.get(key)
    if raw.get(key) is None:
        raw[key] = {}
    return raw[key]


def _what_yaml_says(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "some that is nested too deep"
    return " ".join(str(error).split())[:200]  # which may quote the file


def _describe(error: ValidationError, model: type[Section]) -> str:
    # an unknown key first: a mistyped required key is also a missing one
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    location = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        *sections, last = location
        nearest = difflib.get_close_matches(last, _known_keys(model, sections), n=1, cutoff=0.0)
        known, found = ".".join([*sections, *nearest]), ".".join(location)
        return f"unknown key: expected one such as {known!r}, found {shown(found)}"
    # pydantic appends the type that it tried
    key = ".".join(part for part in location if part not in ("float", "str") and not part.startswith("list["))
    return problem(first, key)


def _known_keys(model: type[Section], sections: list[str]) -> list[str]:
    for section in sections:
        if not section.isdecimal():  # a place of a list
            model = _section_in(model.model_fields[section].annotation)
    return list(model.model_fields)


def _section_in(annotation: Any) -> type[Section]:
    """The kind of section that a field is, may be or is a list of."""
    choices = [annotation]
    while not (isinstance(choices[0], type) and issubclass(choices[0], Section)):
        choices += get_args(choices.pop(0))
    return choices[0]
