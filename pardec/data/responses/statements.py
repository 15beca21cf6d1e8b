"""The statements of Python sources, read with `ast`; runs none of them."""

import ast
import warnings
from collections import deque

# what statements stand in; no expression holds one
_HOLDERS = (ast.stmt, ast.excepthandler, ast.match_case)


def statements_of(source: str) -> list[ast.AST]:
    """The module and all that holds statements inside of it, in the order of `ast.walk`; none of a broken source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler's, about code that is not ours
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    found, left = list[ast.AST](), deque[ast.AST]([tree])
    while left:
        found.append(left.popleft())
        left.extend(child for child in ast.iter_child_nodes(found[-1]) if isinstance(child, _HOLDERS))
    return found
