"""Adapters that ship with the package: found by name, unless something of that name lies where one works."""

from pathlib import Path

import pardec
from pardec.adapters.packaged import PACKAGED_ADAPTERS, adapter_folder, tuned_folder

ASSETS = Path(pardec.__file__).parent / "assets"


def test_a_name_is_the_packaged_folder_and_its_tuned_choices_lie_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in PACKAGED_ADAPTERS:
        assert adapter_folder(name) == ASSETS / name
        assert tuned_folder(name) == tmp_path / "cache" / "pardec" / "tuned" / name


def test_what_lies_here_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("smollm2").mkdir()
    assert adapter_folder("smollm2") == tuned_folder("smollm2") == Path("smollm2")


def test_other_paths_are_themselves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("runs/smollm2", "./runs", str(tmp_path / "smollm2"), "smollm", ""):
        assert adapter_folder(path) == tuned_folder(path) == Path(path)
