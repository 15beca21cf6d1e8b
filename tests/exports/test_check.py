"""`pardec export --check`: a changed folder is told from one as it was written, by the name of what was changed."""

import json
import shutil
import warnings

import pytest
from export_samples import exported, sample
from malformed import UNFIT, keys_of, outcome_of, with_text, without

from pardec.adapters.files import save_adapter
from pardec.exports import export
from pardec.exports.export import check_export, export_adapter
from pardec.exports.record import DOOR_NAMES, RECORD_FILE, ExportRecord, read_record


@pytest.fixture(scope="module", params=DOOR_NAMES)
def folder(request, packaged_adapter, tmp_path_factory):
    """An export through each door; shared, so what a test changes it puts back."""
    adapter = sample(packaged_adapter, request.param)
    return exported(adapter, request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def saved(packaged_adapter, tmp_path):
    """The folder of an adapter for SGLang."""
    save_adapter(sample(packaged_adapter, "sglang"), tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_every_file_is_known_by_what_it_holds(folder):
    for name in sorted(read_record(folder).files):
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        (said,) = check_export(folder).problems
        assert said.startswith(f"{path}: expected sha256 ")
        path.unlink()
        assert check_export(folder).problems == [f"{path}: expected a file of the export, found none"]
        path.write_bytes(content)
    assert check_export(folder).problems == []


def test_one_bit_of_any_file_is_seen(folder):
    for name in sorted(read_record(folder).files):
        path = folder / name
        content = path.read_bytes()
        for place in {0, len(content) // 2, len(content) - 1}:
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            (said,) = check_export(folder).problems
            assert said.startswith(f"{path}: expected sha256 ")
        path.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        {"num_speculative_tokens": 4},
        {"checked_against": "9.9.9"},
        {"pardec": "9.9.9"},
        {"base": {"name": "another", "revision": None}},
        {"acceptance": None},
        {"acceptance": {"counted": "all", "greedy": 9.5}},
        {"sources": {}},
        {"own_sha256": "0" * 64},
    ],
    ids=str,
)
def test_a_record_that_was_edited_is_told_as_any_file(saved, tmp_path, change):
    export_adapter(saved, "sglang", tmp_path / "out")
    path = tmp_path / "out" / RECORD_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (said,) = check_export(tmp_path / "out").problems
    assert said.startswith(f"{path}: expected sha256 ")
    assert said.endswith("the file was changed")


def test_a_record_in_other_white_space_is_the_same(saved, tmp_path):
    export_adapter(saved, "sglang", tmp_path / "out")
    path = tmp_path / "out" / RECORD_FILE
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert check_export(tmp_path / "out").problems == []


def test_files_of_two_exports_are_not_mixed(packaged_adapter, saved, tmp_path):
    export_adapter(saved, "sglang", tmp_path / "out")
    other = sample(packaged_adapter, "sglang", seed=2)
    save_adapter(other, tmp_path / "other-adapter")
    export_adapter(tmp_path / "other-adapter", "sglang", tmp_path / "other")
    for name in ("adapter_model.safetensors", RECORD_FILE):
        kept = (tmp_path / "out" / name).read_bytes()
        shutil.copyfile(tmp_path / "other" / name, tmp_path / "out" / name)
        assert any("adapter_model.safetensors: expected sha" in one for one in check_export(tmp_path / "out").problems)
        (tmp_path / "out" / name).write_bytes(kept)
    assert check_export(tmp_path / "out").problems == []


@pytest.mark.parametrize("name", ["../adapter/pardec.json", "/etc/hostname", "a\nb", "x" * 300])
def test_no_file_outside_is_read(saved, tmp_path, name):
    export_adapter(saved, "sglang", tmp_path / "out")
    path = tmp_path / "out" / RECORD_FILE
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"files": record["files"] | {name: "0" * 64}}))
    with pytest.raises(ValueError, match=r"files: expected names of files inside the folder, found") as caught:
        check_export(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_record_of_an_older_version_says_so(saved, tmp_path):
    export_adapter(saved, "sglang", tmp_path / "out")
    path = tmp_path / "out" / RECORD_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 1}))
    with pytest.raises(ValueError, match=r"export.json: expected format_version 2, found 1"):
        check_export(tmp_path / "out")


@pytest.mark.parametrize("name", ["added_tokens.json", "more.safetensors", "tokenizer.model", "merges.txt"])
def test_a_file_more_that_an_engine_would_read_is_told(folder, name):
    (folder / name).write_text("{}")
    try:
        assert check_export(folder).problems == [f"{folder / name}: expected only files of the export, found one more"]
    finally:
        (folder / name).unlink()
    for harmless in (".gitattributes", "tuned.json"):
        (folder / harmless).write_text("{}")
        assert check_export(folder).problems == []
        (folder / harmless).unlink()


def test_a_folder_without_a_record_is_no_export(tmp_path):
    with pytest.raises(ValueError, match=r"expected an exported folder with export.json, found none"):
        check_export(tmp_path)


@pytest.mark.parametrize("unfit", UNFIT, ids=str)
def test_a_malformed_record_is_one_line(saved, tmp_path, unfit):
    export_adapter(saved, "sglang", tmp_path / "out")
    path = tmp_path / "out/export.json"
    whole = json.loads(path.read_text())
    assert ExportRecord.model_validate(whole)
    texts = [UNFIT[unfit], *(with_text(whole, key, UNFIT[unfit]) for key in keys_of(whole))]
    if unfit == "null":
        texts += [without(whole, key) for key in keys_of(whole)]
    refused = 0
    for text in texts:
        path.write_text(text)
        with warnings.catch_warnings(action="error"):
            was_refused, wrong = outcome_of(lambda: check_export(tmp_path / "out"), ValueError, str(tmp_path))
        assert not wrong, text[:300]
        refused += was_refused
    assert refused > 5


@pytest.mark.parametrize("installed", ["0.5.23", "0.5.23+cpu", "9.9.9"])
def test_an_engine_of_another_version_is_told_and_used(saved, tmp_path, monkeypatch, installed):
    monkeypatch.setattr(export, "version", lambda name: installed)
    found = export_adapter(saved, "sglang", tmp_path / "out")
    assert found.problems == []
    told = "sglang: expected 0.5.23, which this form was checked against, found 9.9.9; going on"
    assert found.notes == ([told] if installed == "9.9.9" else [])
