"""Values and errors in one line."""

import numpy as np
import pytest
import torch
from pydantic import BaseModel, Field, ValidationError

from pardec.errors import first_line, problem, shown


class Rude:
    def __repr__(self):
        raise RuntimeError("no words for it")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("tree", "'tree'"),
        (None, "None"),
        (2.5, "2.5"),
        ("a\nb", r"'a\nb'"),
        ([1] * 99, "[1, 1, 1, 1, 1, 1, ...]"),
        (Rude(), "<Rude instance at 0x"),
        (10**5000, "some int"),
        (torch.zeros(1, 1), "tensor([[0.]])"),
        (np.float32(1.5), "1.5"),
    ],
    ids=lambda value: type(value).__name__,  # the value itself may have no words
)
def test_a_value_is_shown_as_code_would_write_it(value, text):
    assert text in shown(value)


@pytest.mark.parametrize("value", ["x" * 1000, 10**1000, torch.zeros(9, 9), {"a" * 100: "b" * 100}], ids=type)
def test_every_value_is_shown_in_one_short_line(value):
    assert len(shown(value)) <= 62
    assert "\n" not in shown(value)


def test_a_value_without_an_end_is_shown():
    value = []
    for _ in range(100_000):
        value = [value]
    assert shown(value).startswith("[[[[")
    while value:  # so that it is not forgotten all at once
        value = value.pop()


class Sizes(BaseModel, extra="forbid"):
    width: int = Field(ge=1)
    names: list[str] = []


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "expected key 'width', found none"),
        ({"width": 0}, "width: expected a number greater than or equal to 1, found 0"),
        ({"width": "x"}, "width: expected a valid integer, unable to parse string as an integer, found 'x'"),
        ({"width": 1, "names": [2]}, "names.0: expected a valid string, found 2"),
        ({"width": 1, "depth": 2}, "depth: expected no such key, found 2"),
    ],
)
def test_what_pydantic_finds_wrong_is_told_by_key_expected_and_found(values, text):
    with pytest.raises(ValidationError) as error:
        Sizes.model_validate(values)
    assert problem(error.value.errors()[0]) == text


def test_an_error_without_words_is_told_by_its_type():
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ValueError("a\nb")) == "a"
