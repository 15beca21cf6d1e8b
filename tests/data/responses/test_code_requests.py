"""Requests about code: which functions they are about, and what they quote of them."""

import ast
import random
import re

from pardec.data.responses.code_requests import code_requests, functions_of

SOURCE = '''
import os


@cached
def area(width: float, height: float = 1.0, *rest: int, unit="m", **others) -> float:
    """The area of a rectangle
    in square metres.

    More about it.
    """
    # multiply
    return width * height


class Box:
    async def later(self):
        x = 1
        return x

    def volume(self, depth):
        if depth < 0:
            raise ValueError(f"{depth}")
        return depth


def _private(a):
    b = a
    return b


def test_area():
    x = area(1, 2)
    assert x == 2


def short(a):
    return a
'''


def test_functions_are_quoted_as_they_stand_and_bare():
    area, volume = functions_of(SOURCE)
    assert area.name == "area"
    assert area.arguments == "width: float, height: float=1.0, *rest: int, unit='m', **others"
    assert area.returns == " -> float"
    assert area.doc == "The area of a rectangle\nin square metres."
    assert area.code.startswith("def area(width: float, height: float = 1.0")
    assert "# multiply" in area.code
    assert area.bare == "def area(width, height=1.0, *rest, unit='m', **others):\n    return width * height"
    assert (volume.name, volume.doc, volume.returns) == ("volume", "", "")
    assert volume.code.splitlines()[:2] == ["def volume(self, depth):", "    if depth < 0:"]


def test_a_function_of_nothing_but_a_docstring_is_still_one_without_it():
    (only,) = functions_of('def only():\n    """Says what it does.\n\n    And how."""\n')
    ast.parse(only.bare)
    assert "Says" not in only.bare


def test_sources_that_cannot_be_parsed_or_warn_have_no_say():
    assert functions_of("def broken(:\n  pass") == functions_of("x = '\0'") == functions_of("(" * 5000) == []
    assert len(functions_of("def f(x):\n    y = '\\d'\n    return y\n")) == 1


def test_an_expression_too_deep_to_be_written_anew_is_passed_over():
    deep = f"def f(a):\n    b = {'+'.join('a' * 900)}\n    return b\n"
    other = "def g(a):\n    b = a\n    return b\n"
    assert len(functions_of(deep)) == 1
    (asked,) = code_requests([deep + other], random.Random(0))
    assert "g" in asked


def test_code_is_quoted_by_the_lines_that_the_parser_counts():
    source = "x = 1\x0c\nclass A:\n\tdef f(self):\r\n\t\ty = 'é\u2028'\r\n\t\treturn y  # é\n"
    (f,) = functions_of(source)
    assert f.code == "def f(self):\r\n\ty = 'é\u2028'\r\n\treturn y"


def test_functions_beyond_forty_lines_are_left_out():
    def source(lines):
        return "def f(x):\n" + "    x += 1\n" * (lines - 1)

    assert [len(functions_of(source(lines))) for lines in (2, 3, 40, 41)] == [0, 1, 1, 0]


def test_requests_are_in_a_dozen_wordings_each_of_them_whole():
    many = "".join(
        f'def f{n}(a, b):\n    """Adds {n} to the sum of both arguments."""\n    c = a + b\n    return c + {n}\n'
        for n in range(3)
    )
    found = [request for seed in range(150) for request in code_requests([many], random.Random(seed))]
    assert len(found) == 450
    wordings = {re.sub(r"f?\d", "N", request) for request in found}
    assert len(wordings) == 17
    for request in found:
        assert "{" not in request
        assert "def f" in request or "Adds" in request
        for block in re.findall(r"```python\n(.*?)\n```", request, re.DOTALL):
            ast.parse(block)


def test_few_functions_of_one_file_and_all_of_a_few_by_seed():
    many = "".join(f"def f{n}(a):\n    b = a\n    return b\n\n" for n in range(30))
    few = "def g(a):\n    b = a\n    return b\n"
    draw = [list(code_requests([many, few], random.Random(seed))) for seed in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2]
    for requests in draw:
        assert sum("def g(" in request for request in requests) == 1
        assert len(requests) == 4
