"""Result files: what a program found is kept where no picture can be drawn."""

import json
import sys

from reporting import result_files


def test_without_matplotlib_figures_and_page_are_written_and_the_missing_picture_is_told_once(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result_files._can_draw.cache_clear()
    try:
        for value in (1, 2):
            result_files.write_files({"value": value}, tmp_path / "found", f"page {value}", lambda path: 1 / 0)
    finally:
        result_files._can_draw.cache_clear()
    assert json.loads((tmp_path / "found.json").read_text()) == {"value": 2}
    assert (tmp_path / "found.md").read_text() == "page 2"
    assert {path.name for path in tmp_path.iterdir()} == {"found.json", "found.md"}
    assert capsys.readouterr().out.count("no picture: ") == 1
