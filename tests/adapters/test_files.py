"""Adapters on disk: round trips bit for bit, refusals, and kills at every moment of a save."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from adapter_samples import (
    LORA_CONFIG,
    LORA_FILES,
    K,
    W,
    files_in,
    files_of_adapter,
    make_adapter,
    refusal,
    same,
    same_tensors,
)
from safetensors import safe_open
from safetensors.torch import save_file

from pardec.adapters import files as adapter_files
from pardec.adapters.adapter import Adapter
from pardec.adapters.files import load_adapter, save_adapter

pytestmark = pytest.mark.usefixtures("synced")


@pytest.mark.parametrize("lora", [False, True], ids=["embeddings", "lora"])
@pytest.mark.parametrize("sharing", ["distinct", "shared"])
def test_what_was_saved_is_loaded_bit_for_bit(tmp_path, sharing, lora):
    adapter = make_adapter(sharing=sharing, lora=lora)
    save_adapter(adapter, tmp_path / "new" / "folder")
    loaded = load_adapter(tmp_path / "new" / "folder")
    assert same(loaded, adapter)
    assert loaded.mask_embeddings.dtype == torch.float32
    assert same(load_adapter(str(tmp_path / "new" / "folder")), adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_in_training_is_saved_plain_and_in_its_dtype(tmp_path, dtype):
    adapter = make_adapter(head=True).rounded(dtype)
    assert adapter.mask_embeddings is not None
    assert adapter.head is not None
    trained = adapter.mask_embeddings.T.contiguous().T.requires_grad_()
    head = {name: tensor.clone().requires_grad_() for name, tensor in adapter.head.items()}
    save_adapter(Adapter(trained, adapter.metadata, head=head), tmp_path)
    loaded = load_adapter(tmp_path)
    assert same(loaded, adapter)
    found = [loaded.mask_embeddings, *loaded.head.values()]
    assert {(tensor.dtype, tensor.requires_grad) for tensor in found} == {(dtype, False)}


def test_an_adapter_is_rounded_in_all_its_parts(tmp_path):
    adapter = make_adapter(head=True, lora=True)
    rounded = adapter.rounded(torch.bfloat16)
    assert torch.equal(rounded.mask_embeddings, adapter.mask_embeddings.bfloat16())
    assert same_tensors(rounded.head, {name: tensor.bfloat16() for name, tensor in adapter.head.items()})
    assert same_tensors(
        rounded.lora.tensors, {name: tensor.bfloat16() for name, tensor in adapter.lora.tensors.items()}
    )
    assert rounded.lora.config == adapter.lora.config
    for folder, one in (("half", rounded), ("whole", adapter)):
        save_adapter(one, tmp_path / folder)
    sizes = [(tmp_path / folder / "lora/adapter_model.safetensors").stat().st_size for folder in ("half", "whole")]
    assert sizes[1] - sizes[0] == 2 * sum(tensor.numel() for tensor in adapter.lora.tensors.values())


@pytest.mark.parametrize(
    "parts", [("head",), ("head", "lora"), ("noise", "lora"), ("noise", "lora", "head")], ids="-".join
)
def test_heads_and_noise_are_saved_and_loaded_bit_for_bit(tmp_path, parts):
    adapter = make_adapter(**dict.fromkeys(parts, True))
    save_adapter(adapter, tmp_path)
    assert same(load_adapter(tmp_path), adapter)
    expected = {"pardec.json"} | (LORA_FILES if "lora" in parts else set())
    expected |= {"head.safetensors"} if "head" in parts else set()
    expected |= set() if "noise" in parts else {"mask_embeddings.safetensors"}
    assert files_in(tmp_path) == expected
    files = json.loads((tmp_path / "pardec.json").read_text())["files"]
    assert files == {n: hashlib.sha256((tmp_path / n).read_bytes()).hexdigest() for n in expected - {"pardec.json"}}


def test_an_adapter_without_a_head_is_written_as_versions_before_heads_wrote_it(tmp_path):
    """They refuse keys that they do not know."""
    save_adapter(make_adapter(lora=True), tmp_path)
    known = {"format_version", "num_speculative_tokens", "mask_sharing", "draft_input", "base", "fingerprint"}
    written = json.loads((tmp_path / "pardec.json").read_text())
    assert written.keys() == known | {"training", "measured", "files"}
    assert (written["format_version"], written["draft_input"]) == (1, "mask_embeddings")


@pytest.mark.parametrize("old", [("head",), ("noise", "lora", "head"), ()], ids=lambda parts: "old-" + "-".join(parts))
@pytest.mark.parametrize("new", [("head",), ("noise", "lora"), ()], ids=lambda parts: "new-" + "-".join(parts))
def test_nothing_of_an_older_adapter_is_left_behind(tmp_path, old, new):
    save_adapter(make_adapter(1, **dict.fromkeys(old, True)), tmp_path / "adapter")
    adapter = make_adapter(2, **dict.fromkeys(new, True))
    save_adapter(adapter, tmp_path / "adapter")
    save_adapter(adapter, tmp_path / "fresh")
    assert same(load_adapter(tmp_path / "adapter"), adapter)
    assert files_in(tmp_path / "adapter") == files_in(tmp_path / "fresh")


@pytest.mark.parametrize("lora", [False, True], ids=["embeddings", "lora"])
def test_a_folder_holds_the_adapters_files_and_nothing_pickled(tmp_path, lora):
    save_adapter(make_adapter(lora=lora), tmp_path)
    expected = {"pardec.json", "mask_embeddings.safetensors"} | (LORA_FILES if lora else set())
    assert files_in(tmp_path) == expected
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == ({"lora"} if lora else set())
    for name in expected:
        content = (tmp_path / name).read_bytes()
        if name.endswith(".json"):
            json.loads(content)
        elif name.endswith(".safetensors"):
            with safe_open(tmp_path / name, framework="pt") as tensors:
                assert tensors.keys()
        else:
            assert "only valid at the rows of pardec's mask tokens" in content.decode()
    # a plain PEFT load of the folder itself must find nothing
    assert not (tmp_path / "adapter_config.json").exists()


def test_the_metadata_lists_every_other_file_with_its_sha256(tmp_path):
    save_adapter(make_adapter(lora=True), tmp_path)
    metadata = json.loads((tmp_path / "pardec.json").read_text())
    assert metadata["files"] == {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        for name in files_in(tmp_path) - {"pardec.json"}
    }
    assert metadata["format_version"] == 1
    assert metadata["base"] == {"name": "some/base", "revision": "abc"}


@pytest.mark.parametrize("old_lora", [False, True], ids=["old-embeddings", "old-lora"])
@pytest.mark.parametrize("new_lora", [False, True], ids=["new-embeddings", "new-lora"])
def test_saving_replaces_an_older_adapter_and_leaves_other_files(tmp_path, old_lora, new_lora):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "state.json").write_text("1")
    save_adapter(make_adapter(1, lora=old_lora), tmp_path)
    new = make_adapter(2, sharing="shared", lora=new_lora)
    save_adapter(new, tmp_path)
    assert same(load_adapter(tmp_path), new)
    assert files_in(tmp_path) == {
        "metrics.jsonl", "checkpoints/state.json", "pardec.json", "mask_embeddings.safetensors",
    } | (LORA_FILES if new_lora else set())  # fmt: skip


def test_a_new_adapter_is_on_the_disk_before_it_takes_the_place_of_the_old(tmp_path, synced, monkeypatch):
    replace, complete = os.replace, []

    def checking(source, target):
        if Path(target).name == ".incoming":
            assert files_in(Path(source)) == files_of_adapter(lora=True)
            assert {path.stat().st_ino for path in Path(source).rglob("*") if path.is_file()} <= synced
            complete.append(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", checking)
    save_adapter(make_adapter(lora=True), tmp_path)
    assert len(complete) == 1


@pytest.fixture
def saved(tmp_path):
    """A saved adapter with a LoRA."""
    save_adapter(make_adapter(lora=True), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_metadata(folder, **changes):
    metadata = json.loads((folder / "pardec.json").read_text())
    (folder / "pardec.json").write_text(json.dumps(metadata | changes))


def replace_file(folder, name, content: bytes):
    """Changes a file together with its sha256, as a hand that means it would."""
    (folder / name).write_bytes(content)
    files = json.loads((folder / "pardec.json").read_text())["files"]
    edit_metadata(folder, files=files | {name: hashlib.sha256(content).hexdigest()})


def test_a_missing_folder_is_refused(tmp_path):
    assert refusal(tmp_path / "no") == f"{tmp_path / 'no'}: expected an adapter directory, found nothing"


def test_the_packaged_base_in_place_of_an_adapter_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal("tiny-python").endswith("directory, found nothing; that is a model, not an adapter for one")


def test_a_mistyped_name_of_a_packaged_adapter_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal("smolm2") == "smolm2: expected an adapter directory, found nothing; smollm2 is an adapter that ships"
    assert refusal("smollm2-135m-instruct").endswith("found nothing; smollm2 is an adapter that ships")
    (tmp_path / "smolm2").write_text("")
    assert refusal("smolm2") == "smolm2: expected an adapter directory, found a file"


def test_a_file_is_refused(saved):
    path = saved / "pardec.json"
    assert refusal(path) == f"{path}: expected an adapter directory, found a file"


def test_a_foreign_folder_is_refused_with_what_is_in_it(tmp_path):
    assert refusal(tmp_path).endswith("expected an adapter directory with pardec.json, found an empty directory")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    assert refusal(tmp_path).endswith(
        "expected an adapter directory with pardec.json, found config.json, model.safetensors; "
        "that is a model, not an adapter for one"
    )


@pytest.mark.parametrize("name", ["mask_embeddings.safetensors", *sorted(LORA_FILES)])
def test_a_missing_truncated_or_changed_file_is_named(saved, name):
    content = (saved / name).read_bytes()
    for damaged in (content[:-1], content[: len(content) // 2], b"", content[:-1] + bytes([content[-1] ^ 1])):
        (saved / name).write_bytes(damaged)
        message = refusal(saved)
        assert message.startswith(f"{saved / name}: expected sha256 ")
        assert message.endswith("the file is truncated or was changed")
    (saved / name).unlink()
    assert refusal(saved) == f"{saved / name}: expected a file of the adapter, found nothing"
    (saved / name).mkdir()
    assert refusal(saved) == f"{saved / name}: expected a file of the adapter, found a directory"


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused(saved, version):
    edit_metadata(saved, format_version=version)
    assert refusal(saved) == f"{saved / 'pardec.json'}: expected format_version 1, found {version!r}"


def test_a_later_format_is_told_before_its_unknown_keys(saved):
    edit_metadata(saved, format_version=2, tree="deep")
    assert "expected format_version 1, found 2" in refusal(saved)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"{'a': 1}"], ids=["cut", "empty", "not-utf8", "python"])
def test_metadata_that_is_not_json_is_refused(saved, content):
    (saved / "pardec.json").write_bytes(content)
    assert refusal(saved).startswith(f"{saved / 'pardec.json'}: expected JSON, found ")


@pytest.mark.parametrize(("content", "found"), [(b"[]", "[]"), (b"1", "1"), (b"null", "None")])
def test_metadata_that_is_no_object_is_refused(saved, content, found):
    (saved / "pardec.json").write_bytes(content)
    assert refusal(saved) == f"{saved / 'pardec.json'}: expected a JSON object, found {found}"


def test_metadata_without_a_version_is_refused(saved):
    (saved / "pardec.json").write_bytes(b"{}")
    assert refusal(saved) == f"{saved / 'pardec.json'}: expected format_version 1, found None"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"extra": 1}, "extra"),
        ({"base": {"name": "a", "colour": "red"}}, "base.colour"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"num_speculative_tokens": "many"}, "num_speculative_tokens"),
        ({"num_speculative_tokens": "2"}, "num_speculative_tokens"),
        ({"num_speculative_tokens": 2.0}, "num_speculative_tokens"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens"),
        ({"mask_sharing": "both"}, "mask_sharing"),
        ({"draft_input": "hidden_state"}, "draft_input"),
        ({"files": ["mask_embeddings.safetensors"]}, "files"),
    ],
)
def test_metadata_with_an_unknown_key_or_value_names_it(saved, changes, key):
    edit_metadata(saved, **changes)
    assert refusal(saved).startswith(f"{saved / 'pardec.json'}: {key}: ")


@pytest.mark.parametrize("too_many", [65, 300, 10**6])
def test_more_mask_tokens_than_any_step_drafts_are_refused(saved, too_many):
    edit_metadata(saved, num_speculative_tokens=too_many)
    place = f"{saved / 'pardec.json'}: num_speculative_tokens"
    assert refusal(saved) == f"{place}: expected a number less than or equal to 64, found {too_many}"


def test_metadata_without_a_key_names_it(saved):
    edit_metadata(saved, base={})
    assert refusal(saved) == f"{saved / 'pardec.json'}: expected key 'base.name', found none"


def test_metadata_that_lists_no_embeddings_is_refused(saved):
    edit_metadata(saved, files={})
    assert "expected mask_embeddings.safetensors among its files, found []" in refusal(saved)


def test_a_head_without_its_file_and_a_file_without_its_head_are_refused(tmp_path):
    save_adapter(make_adapter(head=True), tmp_path)
    metadata = json.loads((tmp_path / "pardec.json").read_text())
    edit_metadata(tmp_path, head=None)
    assert "found weights without the key head in pardec.json" in refusal(tmp_path)
    del metadata["files"]["head.safetensors"]
    edit_metadata(tmp_path, head=metadata["head"], files=metadata["files"])
    assert "expected head.safetensors among its files, found ['mask_embeddings.safetensors']" in refusal(tmp_path)


def test_noise_on_disk_needs_its_lora_and_no_embeddings(tmp_path):
    save_adapter(make_adapter(), tmp_path)
    edit_metadata(tmp_path, draft_input="uniform_noise")
    assert "mask embeddings: expected none with draft_input uniform_noise" in refusal(tmp_path)
    edit_metadata(tmp_path, files={})
    assert "lora: expected one with draft_input uniform_noise" in refusal(tmp_path)


@pytest.mark.parametrize("changes", [{"width": 0}, {"shortlist": 0}, {"width": None}, {"depth": 2}], ids=str)
def test_a_head_of_impossible_shape_is_refused(tmp_path, changes):
    save_adapter(make_adapter(head=True), tmp_path)
    edit_metadata(tmp_path, head={"width": W, "shortlist": 7} | changes)
    assert refusal(tmp_path).startswith(f"{tmp_path / 'pardec.json'}: head.{next(iter(changes))}: ")


@pytest.mark.parametrize("name", ["../secret", "lora/../../secret", "{absolute}"])
def test_files_outside_the_folder_are_refused_without_being_read(saved, monkeypatch, name):
    secret = saved.parent / "secret"
    secret.write_text("secret")
    name = name.format(absolute=secret)
    files = json.loads((saved / "pardec.json").read_text())["files"]
    edit_metadata(saved, files={name: hashlib.sha256(b"secret").hexdigest()} | files)
    read = []
    monkeypatch.setattr(adapter_files, "file_sha256", lambda path: read.append(path))
    assert f"expected files inside the adapter directory, found {name!r}"[:75] in refusal(saved)
    assert read == []


def test_embeddings_files_that_hold_something_else_are_refused(saved, tmp_path):
    def replace_with(tensors):
        save_file(tensors, tmp_path / "other.safetensors")
        replace_file(saved, "mask_embeddings.safetensors", (tmp_path / "other.safetensors").read_bytes())

    good = make_adapter(lora=True).mask_embeddings
    replace_with({"weights": good})
    assert "expected mask_embeddings, found ['weights']" in refusal(saved)
    replace_with({"mask_embeddings": good, "more": good.clone()})
    assert "expected mask_embeddings, found ['mask_embeddings', 'more']" in refusal(saved)
    replace_with({"mask_embeddings": good[:2].clone()})
    assert f"expected shape [{K}, D]" in refusal(saved)
    good[0, 0] = torch.nan
    replace_with({"mask_embeddings": good})
    assert "expected finite numbers, found NaN or infinity" in refusal(saved)


@pytest.mark.parametrize("name", ["mask_embeddings.safetensors", "lora/adapter_model.safetensors"])
def test_files_that_are_not_safetensors_are_refused(saved, name):
    for content in (b"", b"\x80\x04pickle", b"\xff" * 100):
        replace_file(saved, name, content)
        assert refusal(saved).startswith(f"{saved / name}: expected a safetensors file, found ")


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"{}", json.dumps(LORA_CONFIG | {"use_dora": True}).encode(), b'{"peft_type": "LORA"}'],
    ids=["cut", "list", "empty", "dora", "no-rank"],
)
def test_a_lora_configuration_that_cannot_be_used_is_an_adapter_error(saved, content):
    replace_file(saved, "lora/adapter_config.json", content)
    refusal(saved)


def test_a_lora_without_its_configuration_is_an_adapter_error(saved):
    files = json.loads((saved / "pardec.json").read_text())["files"]
    del files["lora/adapter_config.json"]
    edit_metadata(saved, files=files)
    (saved / "lora" / "adapter_config.json").unlink()
    assert "adapter_config.json" in refusal(saved)
