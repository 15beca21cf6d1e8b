"""Exported folders: whole or not there, told from one that was changed; refusals before anything is written."""

import ast
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from adapter_samples import files_in
from export_samples import PARTS, K, exported, sample

from pardec.adapters.adapter import AdapterError
from pardec.adapters.files import load_adapter, save_adapter
from pardec.exports import export
from pardec.exports.doors import door_of
from pardec.exports.export import check_export, export_adapter
from pardec.exports.page import page_of
from pardec.exports.record import DOOR_NAMES, read_record
from pardec.run import file_sha256

WRITTEN = {
    "vllm": {"config.json", "pardec.json", "mask_embeddings.safetensors", "head.safetensors", "lora/README.md"}
    | {"lora/adapter_config.json", "lora/adapter_model.safetensors"},
    "vllm-stock": {"config.json", "model.safetensors", "generation_config.json"}
    | {"tokenizer.json", "tokenizer_config.json"},
    "sglang": {"adapter_config.json", "adapter_model.safetensors"},
    "transformers": {"pardec.json", "mask_embeddings.safetensors", "head.safetensors", "lora/README.md"}
    | {"lora/adapter_config.json", "lora/adapter_model.safetensors"}
    | {"custom_generate/generate.py", "custom_generate/requirements.txt"},
    "peft": {"adapter_config.json", "adapter_model.safetensors"},
}


@pytest.fixture(scope="module", params=DOOR_NAMES)
def door(request):
    return request.param


@pytest.fixture(scope="module")
def folder(door, packaged_adapter, tmp_path_factory):
    """An export through each door; shared, so what a test changes it puts back."""
    return exported(sample(packaged_adapter, door), door, tmp_path_factory.mktemp(door))


@pytest.fixture
def saved(packaged_adapter, tmp_path):
    """Saves an adapter that the door can hold; its folder."""

    def save(door: str = "sglang", **changes) -> str:
        save_adapter(sample(packaged_adapter, door, **changes), tmp_path / "adapter")
        return str(tmp_path / "adapter")

    return save


def refusal(directory: str, door: str, output, **options) -> str:
    with pytest.raises(ValueError) as caught:
        export_adapter(directory, door, output, **options)
    assert "\n" not in str(caught.value)
    assert not output.exists() or list(output.iterdir()) == []
    return str(caught.value)


def test_a_folder_holds_the_engines_files_a_page_and_a_record(door, folder):
    assert files_in(folder) == WRITTEN[door] | {"README.md", "export.json"}
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in folder.rglob("*") if path.is_file())


def test_the_record_says_from_what_for_what_and_what_to_expect(door, folder):
    record, adapter = read_record(folder), load_adapter(folder.parent / "adapter")
    assert record.door == door
    assert record.num_speculative_tokens == K
    assert record.base.name == "tiny-python"
    assert record.sources == {
        name: file_sha256(folder.parent / "adapter" / name) for name in ("pardec.json", *adapter.metadata.files)
    }
    assert record.files.keys() == files_in(folder) - {"export.json"}
    assert record.checked_against == door_of(door).tested
    if door == "peft":
        assert record.acceptance is None
        return
    assert record.acceptance is not None
    more = {"transformers": 0, "sglang": 1, "vllm": 1, "vllm-stock": 1}[
        door
    ]  # the exact token of a round of two forwards
    assert record.acceptance.sampled == pytest.approx(1.9 + more)
    assert record.acceptance.greedy == pytest.approx(2.3 + more)
    assert (record.acceptance.temperature, record.acceptance.top_k) == (0.8, 10)
    assert (record.acceptance.split, record.acceptance.num_prompts) == ("validation", 16)


def test_the_page_has_the_command_that_serves_the_folder_and_what_to_expect(door, folder):
    page, record = (folder / "README.md").read_text(), read_record(folder)
    assert door_of(door).commands(record, "out") in page
    assert "`pardec export --check out`" in page
    if record.acceptance is not None:
        assert f"{record.acceptance.sampled:.2f} sampled at temperature 0.8, top-k 10" in page
        assert record.acceptance.counted in page


def test_the_page_says_where_a_built_in_base_comes_from(door, folder):
    record = read_record(folder)
    page = page_of(record, door_of(door), folder, "out")
    assert " The base comes with the package pardec, which the same environment needs for that." in page
    record.base.name = "smollm2-135m-instruct"
    assert " The base comes with the package pardec[smollm2], " in page_of(record, door_of(door), folder, "out")
    record.base.name = "user/base"
    assert "comes with the package" not in page_of(record, door_of(door), folder, "out")


@pytest.mark.parametrize(
    ("door", "words"),
    [
        ("sglang", "--speculative-algorithm UNO --uno-lora-path out \\\n    --speculative-num-draft-tokens 4"),
        ("vllm", '"num_speculative_tokens":4,"parallel_drafting":true,"use_local_argmax_reduction":true}'),
        ("vllm-stock", '{"method":"draft_model","model":"out","num_speculative_tokens":4,"parallel_drafting":true}'),
    ],
)
def test_engines_draft_one_more_token_than_the_adapter(packaged_adapter, tmp_path, door, words):
    page = (exported(sample(packaged_adapter, door), door, tmp_path) / "README.md").read_text()
    assert words in page


def test_names_with_spaces_and_quotes_are_words_of_the_commands(door, folder):
    record = read_record(folder)
    record.base.name = "it's a base"
    odd = 'the "best" one'
    command = door_of(door).commands(record, odd)
    if door_of(door).language == "python":
        words = [node.value for node in ast.walk(ast.parse(command)) if isinstance(node, ast.Constant)]
        assert record.base.name in words
    else:
        words = shlex.split(command)
        assert record.base.name in words
        words += [json.loads(word)["model"] for word in words if word.startswith("{")]
    assert odd in words


def test_nothing_tells_of_the_machine_that_trained(folder):
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".md", ".py", ".txt"):
            text = path.read_text()
            assert "/home/me" not in text, path
            assert str(folder.parent) not in text, path


def test_an_adapter_that_was_not_measured_promises_nothing(saved, tmp_path):
    directory = saved("transformers")
    adapter = load_adapter(directory)
    adapter.metadata.measured.clear()
    save_adapter(adapter, directory)
    export_adapter(directory, "transformers", tmp_path / "out")
    assert read_record(tmp_path / "out").acceptance is None
    assert "nothing can be promised" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("found", [{"sampled": 3}, {"sampled": {"mean_acceptance_length": "x"}}, {"greedy": None}])
def test_a_record_of_measurements_in_another_form_promises_nothing(packaged_adapter, found, tmp_path):
    adapter = sample(packaged_adapter, "transformers")
    adapter = replace(adapter, metadata=adapter.metadata.model_copy(update={"measured": found}))
    assert read_record(exported(adapter, "transformers", tmp_path)).acceptance is None


# ---------------------------------------------------------------------- refusals


def test_an_unknown_door_is_told_with_those_that_there_are(saved, tmp_path):
    said = refusal(saved(), "onnx", tmp_path / "out")
    assert said == "--to: expected one of vllm, vllm-stock, sglang, transformers, peft, found 'onnx'"


@pytest.mark.parametrize(
    ("door", "parts", "words", "able"),
    [
        ("sglang", {"lora_rank": 2}, "draft_input=uniform_noise (recipes/tiny_python_noise.yaml", "vllm, transformers"),
        ("sglang", {"mask_sharing": "shared"}, "found mask_embeddings", "vllm, vllm-stock, transformers"),
        (
            "sglang",
            {"lora_rank": 2, "draft_input": "uniform_noise", "head_width": 8},
            "expected no sampler head (recipes/tiny_python_noise.yaml trains an adapter without one), found one of wid",
            "transformers",
        ),
        (
            "vllm-stock",
            {"lora_rank": 2, "mask_sharing": "shared"},
            "expected mask embeddings alone, found a LoRA",
            "vllm, transformers",
        ),
        (
            "vllm-stock",
            {"head_width": 8, "mask_sharing": "shared"},
            "alone, found a sampler head",
            "vllm, transformers",
        ),
        (
            "vllm-stock",
            {},
            "expected one mask embedding for all positions (adapter.mask_sharing=shared",
            "vllm, transformers",
        ),
        (
            "vllm-stock",
            {"lora_rank": 2, "draft_input": "uniform_noise"},
            "found draft_input uniform_noise",
            "sglang, transformers",
        ),
        ("peft", {}, "expected a LoRA, found none", "vllm, transformers"),
    ],
)
def test_a_part_that_a_door_cannot_hold_is_named_with_the_doors_that_can(
    packaged_adapter, tmp_path, door, parts, words, able
):
    save_adapter(packaged_adapter(K, **parts), tmp_path / "adapter")
    said = refusal(str(tmp_path / "adapter"), door, tmp_path / "out")
    assert said.startswith(f"--to {door}: expected")
    assert words in said
    assert said.endswith(f"; {able} can serve it")
    assert not (tmp_path / "out").exists()


def test_the_bases_files_go_with_transformers_only(saved, tmp_path):
    said = refusal(saved(), "sglang", tmp_path / "out", with_base=True)
    assert said == "--with-base: expected --to transformers, found --to sglang"


@pytest.mark.parametrize("options", [{"with_base": True, "door": "transformers"}, {"door": "vllm-stock"}])
def test_another_base_is_refused_by_doors_that_hold_it(saved, tmp_path, make_llama, options):
    make_llama().save_pretrained(tmp_path / "other")
    door = options.pop("door")
    with pytest.raises(AdapterError, match=r"belongs to another base .*expected"):
        export_adapter(saved(door), door, tmp_path / "out", base=str(tmp_path / "other"), **options)
    assert not (tmp_path / "out").exists()


def test_a_base_of_other_files_than_safetensors_cannot_go_with_the_adapter(saved, tmp_path, monkeypatch):
    from pardec.exports import base_folder

    monkeypatch.setattr(base_folder, "_WEIGHTS", "pytorch_model.safetensors")
    said = refusal(saved("transformers"), "transformers", tmp_path / "out", with_base=True)
    assert "expected pytorch_model.safetensors or its index, found neither" in said
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_base_can_be_called_by_another_name(saved, tmp_path):
    export_adapter(saved(), "sglang", tmp_path / "out", base="some/base")
    assert read_record(tmp_path / "out").base.name == "some/base"
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    assert "--model-path some/base" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("door", ["sglang", "peft"])
def test_what_is_said_runs_here_and_what_is_written_names_no_folder_of_this_machine(saved, tmp_path, door):
    own = tmp_path / "bases/b\U0001f600se \u00e4"
    own.mkdir(parents=True)
    adapter, out = saved(door), tmp_path / "out"
    metadata = json.loads((tmp_path / "adapter/pardec.json").read_text())
    (tmp_path / "adapter/pardec.json").write_text(json.dumps(metadata | {"base": {"name": str(own)}}))
    assert str(own) in export_adapter(adapter, door, out).commands
    assert str(own) not in check_export(out).commands
    assert not [one for one in out.rglob("*") if one.is_file() and str(own).encode() in one.read_bytes()]
    assert str(own) not in export_adapter(adapter, door, tmp_path / "named", base="user/mine").commands
    assert str(own) in export_adapter(adapter, door, tmp_path / "named so", base=str(own)).commands
    own.rmdir()  # the base lies elsewhere
    assert str(own) not in export_adapter(adapter, door, tmp_path / "moved").commands


def test_a_full_disk_leaves_nothing(saved, tmp_path, monkeypatch):
    def full(record, folder):
        raise OSError("no space left")

    monkeypatch.setattr(export, "write_record", full)
    with pytest.raises(OSError, match="no space left"):
        export_adapter(saved(), "sglang", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(("name", "words"), [("", "found ''"), ("a" * 300, "found 'aaa")])
def test_a_name_that_no_base_can_have_is_refused(saved, tmp_path, name, words):
    said = refusal(saved(), "sglang", tmp_path / "out", base=name)
    assert said.startswith("base: expected")
    assert words in said


def test_a_path_that_ends_nowhere_is_where_it_leads(saved, tmp_path):
    with pytest.raises(ValueError, match=f"expected a folder that is not there yet, found {tmp_path}$"):
        export_adapter(saved(), "sglang", f"{tmp_path}/out/..")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# ---------------------------------------------------------------------- by a name


def test_a_packaged_adapter_is_exported_by_its_name(tmp_path):
    assert export_adapter("smollm2", "peft", tmp_path / "out").problems == []
    assert read_record(tmp_path / "out").sources.keys() == {"pardec.json", *load_adapter("smollm2").metadata.files}


def test_one_of_the_hub_is_exported_by_its_name(hub, saved, tmp_path):
    hub.put("some/adapter", Path(saved()))
    assert export_adapter("some/adapter@main", "sglang", tmp_path / "named").problems == []
    export_adapter(saved(), "sglang", tmp_path / "out")
    named = read_record(tmp_path / "named")
    own = {"files": named.files, "own_sha256": named.own_sha256}
    assert named == read_record(tmp_path / "out").model_copy(update=own)


def test_every_door_has_a_sample():
    assert PARTS.keys() == set(DOOR_NAMES)
