"""Forms in which a base comes: shards, dtypes, quantised weights whose package is not there, files of other kinds."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from greedy_oracle import plain_generate, prompts
from tiny_models import make_adapter, tiny_model
from transformers import AutoModelForCausalLM, TorchAoConfig

from pardec.decoding.probing.probe import probe
from pardec.measures.thorough import greedy_checks, law_check
from pardec.model import SelfSpeculativeModel
from pardec.target.base import load_base
from pardec.target.forward import TargetModel

# by the name in a checkpoint's quantization_config: what else it holds, and the package that reads it
QUANTISED = {
    "bitsandbytes": ({"load_in_8bit": True}, "bitsandbytes"),
    "torchao": ({"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}}}, "torchao"),
    "gptq": ({"bits": 4}, "optimum"),
    "awq": ({"bits": 4}, "gptqmodel"),
    "hqq": ({}, "hqq"),
    "quanto": ({}, "quanto"),
    "compressed-tensors": ({}, "compressed_tensors"),
}


def save_sharded(folder: Path, dtype: torch.dtype):
    model = tiny_model("llama", dtype=dtype)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_are_the_weights_that_were_saved_in_the_dtype_that_is_asked_for(dtype, tmp_path):
    saved = save_sharded(tmp_path, dtype)
    base = load_base(str(tmp_path), device="cpu")
    assert base.dtype == torch.float32
    assert load_base(str(tmp_path), device="cpu", dtype="auto").dtype == dtype
    weights = saved.state_dict()
    assert base.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name].float()) for name, tensor in base.state_dict().items())
    base.generation_config.eos_token_id = None
    rows = prompts(61)
    out = SelfSpeculativeModel(base, None, make_adapter(base, 3, lora_rank=2)).generate(rows, max_new_tokens=12)
    assert out.token_ids == [plain_generate(base, row, 12) for row in rows]


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_weights_without_their_package_are_one_line_that_names_it(method, tmp_path):
    values, package = QUANTISED[method]
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **values}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert package.replace("_", "-") in refusal_of(tmp_path).lower().replace("_", "-")


@pytest.mark.filterwarnings("ignore")  # of torchao's own, which differ from version to version
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights_of_torchao_are_decoded_as_the_quantised_model_itself_does(dtype, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    tiny_model("llama", dtype=dtype).save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, quantization_config=config)
    base = base.eval().requires_grad_(False)
    assert type(base.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
    probe(TargetModel.wrap(base))
    model = SelfSpeculativeModel(base, None, make_adapter(base, 3, lora_rank=2))
    for prompt in prompts(61):
        checks = greedy_checks(model, prompt, 12)
        assert [check.mode for check in checks if not check.passed] == []
        assert dtype != torch.float32 or [check.divergence for check in checks] == [None] * 3
    for mode in ("two_pass", "fused"):
        assert law_check(model, [5, 3, 8], mode, 400).passed


@pytest.mark.parametrize("harm", ["missing", "cut off"])
def test_a_shard_that_is_not_whole_is_one_line(harm, tmp_path):
    save_sharded(tmp_path, torch.float32)
    shard = next(tmp_path.glob("*-00002-*.safetensors"))
    content = shard.read_bytes()
    shard.unlink()
    if harm == "cut off":
        shard.write_bytes(content[:100])
    assert "cannot be loaded" in refusal_of(tmp_path)


def test_a_pickle_that_is_none_is_one_line(tmp_path):
    save_sharded(tmp_path, torch.float32)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"no pickle at all")
    assert "cannot be loaded" in refusal_of(tmp_path)


@pytest.mark.parametrize("given", ["folder", "file"])
def test_gguf_that_is_none_is_one_line(given, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    assert "expected" in refusal_of(tmp_path if given == "folder" else tmp_path / "model.gguf")


def refusal_of(base: Path) -> str:
    with pytest.raises(ValueError, match=rf"^base '{base}") as error:
        load_base(str(base), device="cpu")
    assert "\n" not in str(error.value)
    return str(error.value)
