"""SGLang: what its own reader makes of an exported LoRA is the LoRA; folders that it would misread are told."""

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from export_samples import PROJECTIONS, exported, only, sample
from safetensors.torch import load_file, save_file
from sglang_reader import read_by_sglang, wheel

from pardec.adapters.files import save_adapter
from pardec.adapters.gated_lora import LoraWeights
from pardec.exports import lora_folder
from pardec.exports.export import export_adapter
from pardec.exports.record import read_record
from pardec.exports.to_sglang import SGLANG

CONFIG = Path(str(files("pardec") / "assets/tiny-python/config.json"))
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FEATURES = {"q_proj": 256, "k_proj": 128, "v_proj": 128, "gate_proj": 704, "up_proj": 704}
needs_wheel = pytest.mark.skipif(wheel() is None, reason="needs SGLang's wheel, see sglang_reader.py")


@pytest.fixture
def adapter(packaged_adapter):
    return sample(packaged_adapter, "sglang")


def deltas(lora: LoraWeights) -> dict[tuple[str, str], torch.Tensor]:
    """What the LoRA adds to each weight, by layer and projection."""
    found = {}
    for name, (a, b) in lora.pairs().items():
        *_, number, _, suffix = name.split(".")
        found[number, suffix] = lora.scaling * b @ a
    return found


def deltas_of_sglang(tensors: dict[str, torch.Tensor], scaling: float, rank: int) -> dict:
    """The same, of what SGLang keeps: projections that it runs as one have their halves stacked."""
    found = {}
    for name in tensors:
        number, target, half = name.split(".")
        if half == "lora_B":
            continue
        a, b = tensors[name], tensors[f"{number}.{target}.lora_B"]
        parts = STACKED.get(target, (target,))
        assert a.shape[0] == rank * len(parts)
        rows = [FEATURES[part] for part in parts] if len(parts) > 1 else [b.shape[0]]
        assert sum(rows) == b.shape[0]
        for part, half_a, half_b in zip(parts, a.split(rank), b.split(rows), strict=True):
            found[number, part] = scaling * half_b @ half_a
    return found


@needs_wheel
@pytest.mark.parametrize(
    "suffixes",
    [PROJECTIONS, ("q_proj",), ("v_proj",), ("q_proj", "k_proj"), ("up_proj", "o_proj"), ("gate_proj", "k_proj")],
    ids="+".join,
)
@pytest.mark.parametrize("stabilised", [False, True], ids=["", "rslora"])
def test_sglang_reads_the_lora_that_was_trained(adapter, tmp_path, suffixes, stabilised):
    adapter.lora.config["use_rslora"] = stabilised
    adapter = replace(adapter, lora=only(adapter, *suffixes))
    read = read_by_sglang(exported(adapter, "sglang", tmp_path), CONFIG, tmp_path / "read.safetensors")
    assert isinstance(read, dict), read
    expected = deltas(adapter.lora)
    found = deltas_of_sglang(load_file(tmp_path / "read.safetensors"), read["scaling"], read["rank"])
    assert {suffix for _, suffix in found} == {
        part for group in (*STACKED.values(), ("o_proj",), ("down_proj",)) if {*group} & {*suffixes} for part in group
    }
    for place, delta in found.items():
        torch.testing.assert_close(delta, expected.get(place, torch.zeros_like(delta)))


@needs_wheel
def test_sglang_itself_misreads_or_refuses_what_peft_writes(adapter, tmp_path):
    out = tmp_path / "read.safetensors"
    folder = tmp_path / "peft"
    folder.mkdir()
    config = adapter.lora.config | {"target_modules": ["q_proj"], "use_rslora": True}
    lora_folder.write_lora(folder, config, only(adapter, "q_proj").tensors)
    assert "KeyError" in str(read_by_sglang(folder, CONFIG, out))  # q without v
    lora_folder.write_lora(folder, config | {"target_modules": ["up_proj"]}, only(adapter, "up_proj").tensors)
    assert "Cannot find target module name" in str(read_by_sglang(folder, CONFIG, out))
    lora_folder.write_lora(folder, config | {"target_modules": ["o_proj"]}, only(adapter, "o_proj").tensors)
    read = read_by_sglang(folder, CONFIG, out)
    assert isinstance(read, dict)
    assert read["scaling"] == adapter.lora.config["lora_alpha"] / adapter.lora.rank  # not by its root


@needs_wheel
def test_sglang_reads_layers_that_the_base_itself_has_fused(adapter, tmp_path):
    tensors, name = {}, "base_model.model.model.layers.2"
    for module, rows in (("self_attn.qkv_proj", 512), ("mlp.gate_up_proj", 1408)):
        tensors |= {f"{name}.{module}.lora_A.weight": torch.randn(4, 256)}
        tensors |= {f"{name}.{module}.lora_B.weight": torch.randn(rows, 4)}
    adapter = replace(adapter, lora=LoraWeights(adapter.lora.config, tensors))
    read = read_by_sglang(exported(adapter, "sglang", tmp_path), CONFIG, tmp_path / "read.safetensors")
    assert isinstance(read, dict), read
    found = deltas_of_sglang(load_file(tmp_path / "read.safetensors"), read["scaling"], read["rank"])
    for (number, module), delta in deltas(adapter.lora).items():
        torch.testing.assert_close(torch.cat([found[number, part] for part in STACKED[module]]), delta)


def test_scaling_goes_into_alpha(adapter, tmp_path):
    adapter.lora.config["use_rslora"] = True
    config = json.loads((exported(adapter, "sglang", tmp_path) / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == adapter.lora.scaling == 4.0
    assert config["use_rslora"] is False
    assert config["target_modules"] == sorted(PROJECTIONS)
    assert config["base_model_name_or_path"] == "tiny-python"


@pytest.mark.parametrize("name", ["transformer.h.0.self_attn.q_proj", "model.layers.0.mlp.shared_expert.up_proj",
                                  "model.layers.0.mlp.fc1", "model.layers.0.linear_attn.o_proj"])  # fmt: skip
def test_layers_that_sglang_would_not_find_are_refused(adapter, tmp_path, name):
    tensors = {f"base_model.model.{name}.lora_A.weight": torch.zeros(4, 8)}
    tensors[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(8, 4)
    save_adapter(replace(adapter, lora=LoraWeights(adapter.lora.config, tensors)), tmp_path / "adapter")
    with pytest.raises(ValueError, match=rf"--to sglang: expected a LoRA on .*q_proj.* found {name}; transformers"):
        export_adapter(tmp_path / "adapter", "sglang", tmp_path / "out")


@pytest.mark.parametrize("name", ["k_proj", "q_proj"])
def test_sizes_of_projections_that_are_left_out_follow_from_the_base(adapter, tmp_path, name):
    rest = {"k_proj": "q_proj", "q_proj": "k_proj"}[name]
    pairs = lora_folder.read_lora(exported(replace(adapter, lora=only(adapter, rest)), "sglang", tmp_path)).pairs()
    for found, (a, b) in pairs.items():
        suffix = found.rpartition(".")[2]
        assert b.shape == (FEATURES[suffix], 4)
        assert bool(a.any()) == bool(b.any()) == (suffix == rest)


def test_a_base_whose_sizes_are_not_known_is_told(adapter, tmp_path):
    adapter.metadata.fingerprint.architecture["num_attention_heads"] = None
    with pytest.raises(ValueError, match="base: num_attention_heads: expected an integer >= 1, found None"):
        exported(replace(adapter, lora=only(adapter, "q_proj")), "sglang", tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_rslora": True}, "use_rslora: expected false, as SGLang divides lora_alpha by r, found true"),
        ({"target_modules": "all-linear"}, "target_modules: expected the list ['down_proj', "),
        ({"target_modules": ["q_proj"]}, "found ['q_proj']"),
        ({"r": 5}, "expected rank 5, found (4, 4)"),
        ({"use_dora": True}, "lora: expected use_dora=False, found True"),
        ({"peft_type": "LOHA"}, "lora: expected peft_type LORA"),
    ],
)
def test_a_configuration_that_sglang_would_misread_is_told(adapter, tmp_path, change, words):
    folder = exported(adapter, "sglang", tmp_path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (said,) = SGLANG.problems(folder, read_record(folder))
    assert words in said


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("layers.5.self_attn.v_proj", None, "expected q_proj, k_proj, v_proj together, found no v_proj"),
        ("layers.5.mlp.gate_proj", None, "expected gate_proj, up_proj together, found no gate_proj"),
        ("layers.5.mlp.down_proj", "layers.6.mlp.down_proj", "expected one of 6 layers, found layer 6"),
        ("layers.5.mlp.down_proj", "blocks.5.mlp.down_proj", "found model.blocks.5.mlp.down_proj"),
    ],
)
def test_weights_that_sglang_would_misread_are_told(adapter, tmp_path, old, new, words):
    folder = exported(adapter, "sglang", tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    changed = {name.replace(old, new or ""): t for name, t in tensors.items() if new or old not in name}
    save_file(changed, folder / "adapter_model.safetensors")
    assert any(words in said for said in SGLANG.problems(folder, read_record(folder)))


def test_files_that_are_no_lora_are_told(adapter, tmp_path):
    folder = exported(adapter, "sglang", tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    (said,) = SGLANG.problems(folder, read_record(folder))
    assert "expected adapter_config.json and adapter_model.safetensors, found" in said
