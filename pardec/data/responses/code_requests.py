"""Functions of Python sources turned into what people ask about code.

Knows neither chat templates nor tokenizers.
"""

import ast
import copy
import io
import random
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pardec.data.responses.statements import statements_of

# of a function that is asked about; longer ones take a prompt for themselves, shorter ones say nothing
_LINES = range(3, 41)
# so that no file of hundreds of alike functions is most of what is asked
_PER_FILE = 3
# of a docstring that says what is to be written
_DOC_CHARACTERS = range(30, 600)

# {signature} and {doc} of a function with a docstring
_TO_WRITE = (
    "Write a Python function `{signature}`. {doc}",
    "Implement this in Python:\n\n{doc}\n\nThe signature is `{signature}`.",
    "I need a Python function called `{name}` with the arguments ({arguments}).\n{doc}\nExplain the code.",
    "Complete this function:\n```python\ndef {signature}:\n{indented_doc}\n```",
    "How would you write `{name}({arguments})` in Python? It should do the following: {doc}",
)
# {code} as it stands in its file
_ABOUT_CODE = (
    "Explain what this function does:\n```python\n{code}\n```",
    "```python\n{code}\n```\nGo through this code line by line and say what each line does.",
    "Is there a bug in this function? Find it, or say that there is none.\n```python\n{code}\n```",
    "Write unit tests with pytest for the following function.\n\n```python\n{code}\n```",
    "Rewrite this function so that it is easier to read, and say what you changed:\n```python\n{code}\n```",
    "What does `{name}` return, and which errors can it raise?\n```python\n{code}\n```",
    "Give an example of how `{name}` is called, with its result:\n```python\n{code}\n```",
    "Translate this Python function to JavaScript:\n```python\n{code}\n```",
)
# {bare}: the code without docstring, annotations and comments
_ABOUT_BARE_CODE = (
    "Write a docstring for this function:\n```python\n{bare}\n```",
    "Add type hints to this function:\n```python\n{bare}\n```",
    "Add comments to this code where they help:\n\n```python\n{bare}\n```",
    "What would be a better name for this function, and why?\n```python\n{bare}\n```",
)


@dataclass(frozen=True)
class Function:
    """What requests quote of a function, made when it is asked for: most of a long file's are never asked about.

    Attributes:
        node: its definition.
        lines: of its file, as `ast` counts them.
    """

    node: ast.FunctionDef
    lines: Sequence[str]

    @property
    def name(self) -> str:
        """Without its class."""
        return self.node.name

    @property
    def arguments(self) -> str:
        """As between the parentheses of its definition."""
        return ast.unparse(self.node.args)

    @property
    def returns(self) -> str:
        """Annotation of what it returns, with its arrow; empty without."""
        return f" -> {ast.unparse(self.node.returns)}" if self.node.returns else ""

    @property
    def doc(self) -> str:
        """First paragraph of its docstring; empty without."""
        return (ast.get_docstring(self.node) or "").split("\n\n")[0].strip()

    @property
    def code(self) -> str:
        """As it stands in its file, moved to the left margin."""
        *first, last = self.lines[self.node.lineno - 1 : self.node.end_lineno]
        return textwrap.dedent("".join((*first, last.encode()[: self.node.end_col_offset].decode())))

    @property
    def bare(self) -> str:
        """The code without decorators, docstring, annotations of arguments and result, and comments."""
        node, args = copy.copy(self.node), copy.copy(self.node.args)
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        args.posonlyargs, args.args, args.kwonlyargs = (
            [ast.arg(one.arg) for one in given] for given in (args.posonlyargs, args.args, args.kwonlyargs)
        )
        args.vararg, args.kwarg = (one and ast.arg(one.arg) for one in (args.vararg, args.kwarg))
        node.args, node.returns, node.decorator_list = args, None, []
        return ast.unparse(node)


def code_requests(sources: Sequence[str], draw: random.Random) -> Iterator[str]:
    """Requests about functions of Python sources, files in an order that is drawn, each function in a drawn wording.

    Args:
        sources: texts of files; those that this Python cannot parse are passed over.
        draw: what order, functions and wordings are drawn by.
    """
    for source in draw.sample(sources, len(sources)):
        functions = functions_of(source)
        for function in draw.sample(functions, min(_PER_FILE, len(functions))):
            try:
                yield _request(function, draw)
            except RecursionError:  # an expression too deep to be written anew
                continue


def functions_of(source: str) -> list[Function]:
    """Functions of 3 to 40 lines, but for tests and those whose names begin with `_`; none of a broken source."""
    lines = list(io.StringIO(source, newline=""))  # which, as the parser, ends none at a form feed
    found = statements_of(source)
    return [Function(node, lines) for node in found if isinstance(node, ast.FunctionDef) and _is_asked_about(node)]


def _is_asked_about(node: ast.FunctionDef) -> bool:
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    return lines in _LINES and not node.name.startswith(("_", "test"))


def _request(function: Function, draw: random.Random) -> str:
    kinds = [_ABOUT_CODE, _ABOUT_BARE_CODE]
    if len(function.doc) in _DOC_CHARACTERS:
        kinds.append(_TO_WRITE)
    wording = draw.choice(draw.choice(kinds))
    return wording.format(
        name=function.name,
        arguments=function.arguments,
        signature=f"{function.name}({function.arguments}){function.returns}",
        doc=" ".join(function.doc.split()),
        indented_doc=textwrap.indent(f'"""{function.doc}"""', "    "),
        code=function.code,
        bare=function.bare,
    )
