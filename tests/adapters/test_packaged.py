"""Adapters that ship with the package: found by name, unless something of that name lies where one works."""

import json
import re
from pathlib import Path

import pytest
import torch

import pardec
from pardec.adapters.files import load_adapter
from pardec.adapters.packaged import PACKAGED_ADAPTERS, adapter_folder, tuned_folder
from pardec.adapters.tuned import shipped_choice
from pardec.config.adapter_recipe import Recipe
from pardec.config.recipe_files import load_recipe, parse_recipe
from pardec.run import device_name, names_cpu
from pardec.target.base import BUILT_IN_BASES

RECIPES = Path(__file__).parents[2] / "recipes"
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
    for path in ("runs/mine/smollm2", "./runs", str(tmp_path / "smollm2"), "smollm", ""):
        assert adapter_folder(path) == tuned_folder(path) == Path(path)


@pytest.mark.parametrize("name", PACKAGED_ADAPTERS)
def test_what_ships_is_whole_small_and_says_what_it_is_for(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = load_adapter(name)  # checks every file's digest
    assert adapter.metadata.base.name in BUILT_IN_BASES
    assert adapter.metadata.measured["sampled"]["mean_acceptance_length"] > 1
    assert adapter.metadata.training["git_commit"]
    numbers = [
        adapter.mask_embeddings,
        *(adapter.head or {}).values(),
        *(adapter.lora.tensors if adapter.lora else {}).values(),
    ]
    assert {tensor.dtype for tensor in numbers} == {torch.bfloat16}
    files = [path for path in (ASSETS / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    card = (ASSETS / name / "README.md").read_text()
    for word in ("license: apache-2.0", adapter.metadata.base.name, "accelerate launch", f"recipes/{name}.yaml"):
        assert word in card
    said = "".join(path.read_text() for path in files if path.suffix in (".json", ".md"))
    assert not re.findall(r"(?<![\w.])/(?:root|home|work|tmp)/", said)  # of the machine that trained it


@pytest.mark.parametrize("name", PACKAGED_ADAPTERS)
def test_the_recipe_beside_it_is_the_one_it_was_trained_by(name):
    recorded = load_adapter(ASSETS / name).metadata.training["recipe"]
    trained = parse_recipe(recorded, name, Recipe)  # keys that recipes did not have then are at their defaults
    recipe = load_recipe(RECIPES / f"{name}.yaml", (), Recipe)
    for part in ("base", "data", "adapter", "train"):
        assert getattr(trained, part) == getattr(recipe, part)


@pytest.mark.parametrize("name", PACKAGED_ADAPTERS)
def test_it_ships_with_a_choice_that_a_cpu_starts_with(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    choice = shipped_choice(name)
    assert choice is not None
    assert choice.measured_tokens_per_second > choice.plain_tokens_per_second
    assert shipped_choice(ASSETS / name) is None  # a folder's own file is what `read_tuned` reads
    Path(name).mkdir()
    assert shipped_choice(name) is None


def test_the_choice_that_was_made_on_such_a_device_comes_before_others():
    others = json.loads((ASSETS / "smollm2_embeddings" / "tuned.json").read_text())["choices"]
    assert len({(one["device"], one["dtype"]) for one in others}) == len(others) > 1
    for one in others:
        choice = shipped_choice("smollm2_embeddings", one["device"], one["dtype"])
        assert choice is not None
        assert choice.measured_tokens_per_second == one["measured_tokens_per_second"]


@pytest.mark.parametrize("name", PACKAGED_ADAPTERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("device", "is_cpu"), [("Some CPU, 64 threads", True), ("NVIDIA L40S", False)])
def test_no_gpu_starts_with_the_choice_of_a_cpu_nor_the_other_way_round(name, dtype, device, is_cpu):
    choice = shipped_choice(name, device, dtype)
    assert choice is not None
    assert ("threads" in choice.device) == is_cpu


def test_a_cpu_has_the_name_of_one():
    assert names_cpu(device_name(torch.device("cpu")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_other_devices_it_starts_with_the_choice_of_their_dtype(dtype):
    choice = shipped_choice("smollm2_embeddings", "Some CPU, 64 threads", dtype)
    assert choice is not None
    assert (choice.dtype, choice.device == "Some CPU, 64 threads") == (dtype, False)


def test_in_a_dtype_that_nothing_was_tuned_for_it_starts_with_the_first_choice():
    first = json.loads((ASSETS / "smollm2_embeddings" / "tuned.json").read_text())["choices"][0]
    choice = shipped_choice("smollm2_embeddings", "Some CPU, 64 threads", "float16")
    assert choice is not None
    assert choice.device == first["device"]
