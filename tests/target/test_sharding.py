"""Bases whose layers are shared out over processes: the numbers of the whole base, and a part of its memory in each."""

import pytest
import torch
from launched import Launched
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from pardec.target.forward import UnsupportedModelError
from pardec.target.layers import decoder_layers
from pardec.target.placement import is_offloaded
from pardec.target.sharding import held_bytes, running_bytes, shard

IDS = torch.arange(12)[None] % 64


def small_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    # what a layer may hold besides: numbers of another kind, a single number, and those of another layer
    layers = model.model.layers
    for layer in layers:
        layer.other = nn.Parameter(torch.ones(4, dtype=torch.float64), requires_grad=False)
        layer.single = nn.Parameter(torch.tensor(2.0), requires_grad=False)
        layer.shared = layers[0].mlp.up_proj.weight
    return model


def gradient_through(model: LlamaForCausalLM) -> torch.Tensor:
    """Of the inputs, as those of mask rows have."""
    inputs = model.get_input_embeddings()(IDS).detach().requires_grad_(True)
    model(inputs_embeds=inputs).logits.sum().backward()
    assert inputs.grad is not None
    return inputs.grad


def compared(group: str) -> dict[str, float]:
    """In one of several processes: a sharded base beside the whole one."""
    distributed.init_process_group("gloo")
    whole, base = small_llama(), small_llama()
    shard(base, torch.device("cpu"), group)
    with torch.inference_mode():
        differs = (base(IDS).logits - whole(IDS).logits).abs().max()
    gradients = (gradient_through(base) - gradient_through(whole)).abs().max()
    found = {
        "logits": float(differs),
        "gradients": float(gradients),
        "held": held_bytes(base),
        "of": held_bytes(whole),
        "running": (running_bytes(base) - held_bytes(base), running_bytes(whole) - held_bytes(whole)),
        "outside": held_bytes(base.model.embed_tokens),
        "sharded": sum(isinstance(p, DTensor) for p in base.model.layers.parameters()),
        "whole": sum(not isinstance(p, DTensor) for p in base.model.layers.parameters()),
        "plain": type(base.get_output_embeddings().weight) is nn.Parameter,
        "away": is_offloaded(base),
    }
    distributed.destroy_process_group()
    return found


@pytest.mark.parametrize(
    ("count", "local", "group", "parts"), [(2, 2, "all", 2), (4, 2, "machine", 2)], ids=["two", "two-on-each-of-two"]
)
def test_shards_give_the_numbers_of_the_whole(count, local, group, parts):
    for found in Launched(count, compared, group, local=local).results():
        assert found["logits"] == found["gradients"] == 0
        # the up-projection that all layers hold, and a number in each
        assert (found["sharded"], found["whole"]) == (3 * 9 + 2, 1 + 3)
        outside = found["outside"] + 4 * (32 + 32 * 48 + 3)  # embeddings, the last norm, and those
        assert found["held"] - outside == (found["of"] - outside) / parts
        of_a_layer = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 8 * 4
        assert found["running"] == (2 * of_a_layer, 0)
        assert found["plain"]
        assert found["away"]


def test_a_base_without_a_list_of_layers_is_refused():
    model = small_llama()
    assert decoder_layers(model, "a setting") == list(model.model.layers)
    model.config.num_hidden_layers = 7
    with pytest.raises(UnsupportedModelError, match="a setting: expected a list of 7 layers in a LlamaF"):
        decoder_layers(model, "a setting")


def test_a_quantised_base_is_refused():
    model = small_llama()
    model.hf_quantizer = object()
    with pytest.raises(
        UnsupportedModelError, match=r"^train\.shard_base: expected a base in floating point, found one"
    ):
        shard(model, torch.device("cpu"))
