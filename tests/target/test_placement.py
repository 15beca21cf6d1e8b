"""Bases whose weights are elsewhere between their layers' forwards, or on several devices."""

import pytest
import torch
from accelerate import disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from greedy_oracle import plain_generate
from tiny_models import make_adapter, tiny_model
from transformers import AutoModelForCausalLM

import pardec
from pardec.adapters.files import save_adapter
from pardec.target.base import resolve_base
from pardec.target.forward import UnsupportedModelError
from pardec.target.placement import META, execution_devices, is_offloaded, refuse_by_placement

K = 3


def offloaded_base(folder):
    """The packaged model, its last layers on the disk."""
    here = ("lm_head", "model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0", "model.layers.1")
    device_map = {**dict.fromkeys(here, "cpu"), **{f"model.layers.{i}": "disk" for i in range(2, 6)}}
    return AutoModelForCausalLM.from_pretrained(
        resolve_base("tiny-python"), device_map=device_map, offload_folder=str(folder), dtype=torch.float32
    ).eval()


@pytest.mark.parametrize("mode", ["plain", "two_pass", "fused"])
def test_offloaded_layers_decode_exactly_with_a_lora_and_a_head(mode, packaged_adapter, tmp_path):
    base = offloaded_base(tmp_path / "weights")
    assert is_offloaded(base)
    save_adapter(packaged_adapter(K, lora_rank=2, head_width=6), tmp_path / "adapter")
    model = pardec.load(tmp_path / "adapter", base=base)
    assert not model.capture
    prompt = model.tokenizer("def quicksort(xs):").input_ids
    assert model.generate([prompt], max_new_tokens=16, mode=mode).token_ids == [plain_generate(base, prompt, 16)]


def test_offloaded_layers_run_where_their_hooks_bring_them(tmp_path):
    base = offloaded_base(tmp_path)
    devices = execution_devices(base)
    assert set(devices.values()) == {torch.device("cpu")}
    assert base.get_submodule("model.layers.5.mlp.up_proj").weight.device == META
    refuse_by_placement(base)


def test_compiled_steps_of_offloaded_layers_are_refused(packaged_adapter, tmp_path):
    save_adapter(packaged_adapter(K), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"compile: expected a base in memory, found offloaded layers"):
        pardec.load(tmp_path / "adapter", base=offloaded_base(tmp_path / "weights"), compile=True)


def test_layers_on_several_devices_are_refused_naming_them(tmp_path):
    base = tiny_model("llama", dtype=torch.float32)
    save_adapter(make_adapter(base, K), tmp_path / "adapter")
    for module in base.get_submodule("model.layers.2").modules():
        if next(module.parameters(recurse=False), None) is not None:
            add_hook_to_module(module, AlignDevicesHook(execution_device="cuda:1", offload=True))
    with pytest.raises(UnsupportedModelError, match=r"all layers on one device, found them on cpu, cuda:1"):
        pardec.load(tmp_path / "adapter", base=base)


def test_offloaded_embeddings_are_refused(tmp_path):
    base = tiny_model("llama", dtype=torch.float32)
    save_adapter(make_adapter(base, K), tmp_path / "adapter")
    base = disk_offload(base, tmp_path / "weights", execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="expected input embeddings in memory, found them offloaded"):
        pardec.load(tmp_path / "adapter", base=base)


def test_a_sampler_head_needs_the_output_head_in_memory(tmp_path):
    base = tiny_model("llama", dtype=torch.float32)
    for width in (0, 6):
        save_adapter(make_adapter(base, K, head_width=width), tmp_path / str(width))
    add_hook_to_module(base.get_output_embeddings(), AlignDevicesHook(execution_device="cpu", offload=True))
    assert is_offloaded(base)
    pardec.load(tmp_path / "0", base=base)
    with pytest.raises(UnsupportedModelError, match="expected the output head in memory for a sampler head"):
        pardec.load(tmp_path / "6", base=base)


def test_weights_that_are_nowhere_are_refused(tmp_path):
    base = tiny_model("llama", dtype=torch.float32)
    save_adapter(make_adapter(base, K, lora_rank=2), tmp_path / "adapter")
    base.get_submodule("model.layers.1.mlp").to("meta")
    with pytest.raises(UnsupportedModelError, match="expected loaded weights, found those of a Linear on the device"):
        pardec.load(tmp_path / "adapter", base=base)
