"""Arrows run down: what is imported lies on the importer's own floor or below, and nothing imports in a circle."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# from the ground up; CONTRIBUTING.md shows this map
FLOORS = (
    (
        "pardec/arguments",
        "pardec/all_cores",
        "pardec/draft_tree",
        "pardec/errors",
        "pardec/layout",
        "pardec/output_console",
        "pardec/run",
    ),
    ("pardec/target",),
    ("pardec/adapters",),
    ("pardec/decoding", "pardec/decoding/probing", "pardec/trees"),
    ("pardec/door", "pardec/model", "pardec/loading", "pardec/chat", "pardec/race", "pardec/__init__"),
    ("pardec/data",),
    ("pardec/training",),
    ("pardec/config",),
    ("pardec/measures",),
    ("pardec/tuning",),
    ("pardec/vllm_plugin",),
    ("pardec/exports",),
    (
        "pardec/cli",
        "pardec/__main__",
    ),
    ("train", "eval/timing", "eval/reporting"),
    ("eval/studies", "eval/matrix"),
    ("eval/card",),
    ("eval",),
)


def floor_of(path: str) -> int:
    """Of a file; the longest name of a room that its path begins with decides."""
    rooms = [(room, floor) for floor, some in enumerate(FLOORS) for room in some]
    mine = [one for one in rooms if path == one[0] + ".py" or path.startswith(one[0] + "/")]
    assert mine, f"{path}: expected a file of a room that FLOORS names"
    return max(mine)[1]


def sources(root: Path) -> dict[str, str]:
    """Texts of the library, the scripts and the programs by path."""
    files = [path for folder in ("pardec", "train", "eval") for path in sorted((root / folder).rglob("*.py"))]
    return {path.relative_to(root).as_posix(): path.read_text() for path in files}


def imports(texts: dict[str, str]) -> list[tuple[str, str]]:
    """(importing file, imported file), those inside of functions too; scripts find their own folder's modules."""
    found = []
    for path, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                # a module of the package, or a name in it
                names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
            for name in names:
                parts = name.replace(".", "/")
                candidates = [start + parts + end for start in ("", path.split("/")[0] + "/") for end in ENDINGS]
                found += [(path, one) for one in candidates if one in texts and one != path]
    return found


ENDINGS = (".py", "/__init__.py")


def wrong_arrows(texts: dict[str, str]) -> list[str]:
    """Lines about imports that run up."""
    return [f"{a} imports {b}, which is above it" for a, b in imports(texts) if floor_of(b) > floor_of(a)]


def circle(texts: dict[str, str]) -> list[str]:
    """Files that import each other in a circle; empty if none do."""
    above: dict[str, set[str]] = {path: set() for path in texts}
    for a, b in imports(texts):
        if a != "pardec/__init__.py":  # which imports when its names are asked for
            above[a].add(b)
    try:
        graphlib.TopologicalSorter(above).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_every_import_goes_down_or_stays_on_its_floor():
    assert not wrong_arrows(sources(ROOT))


def test_no_files_import_each_other_in_a_circle():
    assert not circle(sources(ROOT))


@pytest.mark.parametrize(
    ("path", "line", "words"),
    [
        (
            "pardec/layout.py",
            "from pardec.decoding.step import Decoder",
            "pardec/layout.py imports pardec/decoding/step",
        ),
        (
            "pardec/target/cache.py",
            "def f():\n    import pardec.cli",
            "pardec/target/cache.py imports pardec/cli/",
        ),
        ("pardec/training/loss.py", "from pardec.measures import ranks", "pardec/training/loss.py imports pardec/meas"),
        ("eval/timing/calls.py", "import exactness", "eval/timing/calls.py imports eval/exactness.py"),
    ],
)
def test_an_arrow_that_runs_up_is_told_with_both_files(path, line, words):
    texts = sources(ROOT)
    texts[path] += f"\n{line}\n"
    assert [one for one in wrong_arrows(texts) if words in one]


def test_a_circle_is_found():
    texts = sources(ROOT)
    texts["pardec/layout.py"] += "\nfrom pardec import errors\n"
    texts["pardec/errors.py"] += "\nfrom pardec import layout\n"
    assert {"pardec/layout.py", "pardec/errors.py"} <= set(circle(texts))


def test_the_rooms_are_those_of_the_map():
    map_of_rooms = (ROOT / "CONTRIBUTING.md").read_text()
    files = [path for house in ("pardec", "eval") for path in (ROOT / house).rglob("*/*.py")]
    rooms = {path.parent.relative_to(ROOT).as_posix() for path in files}
    assert "pardec/decoding/probing" in rooms
    for room in sorted(rooms):
        assert f"`{room}/`" in map_of_rooms, f"CONTRIBUTING.md: expected a line about {room}/"


def test_no_folder_is_a_corridor():
    for house in ("pardec", "train", "eval", "tests"):
        for folder in {path.parent for path in (ROOT / house).rglob("*.py")}:
            assert len(list(folder.glob("*.py"))) <= 23, folder


def test_only_the_package_itself_has_a_surface():
    for path in (ROOT / "pardec").rglob("*/__init__.py"):
        body = ast.parse(path.read_text()).body
        assert all(isinstance(node, ast.Expr) for node in body), f"{path}: expected nothing or a docstring"
