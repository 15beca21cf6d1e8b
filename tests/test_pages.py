"""The pages for people: every link resolves, and the front page stays one."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MADE = {".venv", "runs", "build", "dist"}  # by whoever works here
PAGES = [path for path in sorted(ROOT.rglob("*.md")) if not MADE & set(path.relative_to(ROOT).parts)]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The names that links into a page may use, made of its headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_resolves(page):
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: expected {link}, found nothing there"
        assert target.is_relative_to(ROOT), f"{page.name}: {link} leaves the repository"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: expected a heading for {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_are_there(page):
    named = re.findall(r"\b((?:pardec|eval|train|recipes|tests)/[\w/]+\.(?:py|yaml|md))\b", page.read_text())
    gone = {"eval/packing.py", "eval/drawing.py", "eval/studies/rounds.yaml"}  # their results stay
    for name in set(named) - gone:
        assert (ROOT / name).exists(), f"{page.name}: expected {name}, found nothing there"


def test_the_front_page_is_read_in_two_minutes():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    for words in (
        "make try",
        "make demo",
        "make test",
        "pardec generate",
        "pardec check",
        "pardec.load",
        "CONTRIBUTING.md",
    ):
        assert words in text


def test_every_recipe_and_program_is_named_where_its_reader_is():
    recipes, programs = (ROOT / "recipes/README.md").read_text(), (ROOT / "eval/README.md").read_text()
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert path.stem in recipes
    for path in (ROOT / "eval").glob("*.py"):
        assert f"`{path.name}" in programs


def test_what_a_step_on_a_card_costs_is_the_same_on_all_pages():
    """The two pages that reckon with a step of 25 rows of the 8B shape name the ratio of the result file."""
    rows = json.loads((ROOT / "eval/results/latency_llama8b_compiled_h200.json").read_text())["rows"]
    (ratio,) = [row["ratio_to_plain"] for row in rows if row["rows"] == 25 and not row["lora"]]
    serving = (ROOT / "recipes/serving.md").read_text()
    assert f"takes [{ratio:.2f} x a plain one compiled" in (ROOT / "README.md").read_text()
    assert f"in {ratio:.2f} x the time of a plain one compiled" in serving
    for accepted in (0.5, 1, 2, 3):
        assert f"| {accepted} | {(2 + accepted) / 2:.2f} | {(1 + accepted) / round(ratio, 2):.2f} |" in serving
