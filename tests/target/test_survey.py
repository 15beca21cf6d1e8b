"""What one forward shows about a model, against its configuration; the model is as it was afterwards."""

import threading

import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from transformers import AttentionInterface

from pardec.target.attention import ROUTE, grouped_attention
from pardec.target.forward import TargetModel
from pardec.target.survey import survey

# key/value heads of head_dim 8 in each of the 3 layers
KV_HEADS = {"gpt2": 4, "gpt_neox": 4, "opt": 4}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
GATED = [ATTENTION, ("o_proj",), MLP, ("down_proj",)]
LAYERS = {
    "gpt2": [("c_attn",), ("c_proj",), ("c_fc",), ("c_proj",)],
    "gpt_neox": [("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)],
    "phi3-window": [("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)],
    "opt": [ATTENTION, ("out_proj",), ("fc1",), ("fc2",)],
}


def names_of(model, groups):
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    return [tuple(names[module] for module in group) for group in groups if is_linear(group[0])]


def is_linear(module) -> bool:
    return not isinstance(module, torch.nn.Embedding)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_facts_are_those_of_the_configuration(family, dtype):
    model = tiny_model(family, dtype=dtype)
    facts = survey(TargetModel.wrap(model))
    kv_heads = KV_HEADS.get(family, 2)
    assert facts.bytes_per_slot == 2 * 3 * kv_heads * 8 * dtype.itemsize
    # models that attend eagerly keep their attention
    assert facts.query_group == (None if FAMILIES[family][2] == "eager" else 4 // kv_heads)
    linears = names_of(model, facts.siblings)
    body = [group for group in linears if group[0] not in ("lm_head", "embed_out", "project_in", "project_out")]
    assert body == LAYERS.get(family, GATED) * 3


def test_siblings_stand_in_the_order_in_which_they_run():
    model = tiny_model("llama")
    groups = [group for group in survey(TargetModel.wrap(model)).siblings if is_linear(group[0])]
    expected = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        expected += [(attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,)]
        expected += [(mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)]
    assert groups == [*expected, (model.lm_head,)]


def test_equal_numbers_in_another_tensor_do_not_make_siblings():
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.up_proj.register_forward_pre_hook(lambda module, args: (args[0].clone(),))
    groups = survey(TargetModel.wrap(model)).siblings
    assert (mlp.gate_proj, mlp.up_proj) not in groups
    assert (mlp.gate_proj,) in groups
    assert (mlp.up_proj,) in groups


def test_a_layer_that_runs_twice_in_a_forward_is_nobodys_sibling_and_stands_there_once():
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.gate_proj(x) * mlp.up_proj(x) + mlp.gate_proj(x))
    groups = survey(TargetModel.wrap(model)).siblings
    assert [group for group in groups if mlp.gate_proj in group] == [(mlp.gate_proj,)]


@pytest.mark.parametrize("family", ["llama", "gemma3-mixed-windows", "gpt2", "llama-eager"])
def test_the_model_is_as_it_was_afterwards(family):
    model = tiny_model(family)
    ids = torch.tensor([[5, 3, 8]])
    before, config = model(ids).logits, model.config.to_dict()
    survey(TargetModel.wrap(model))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == FAMILIES[family][2]
    assert torch.equal(model(ids).logits, before)


def test_a_forward_that_fails_leaves_no_hooks():
    model = tiny_model("llama")

    def broken(x):
        raise RuntimeError("no memory")

    model.lm_head.forward = broken
    with pytest.raises(RuntimeError, match="no memory"):
        survey(TargetModel.wrap(model))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.config._attn_implementation == "sdpa"


def wrong_numbers(module, query, key, value, attention_mask, **options):
    out, weights = grouped_attention(module, query, key, value, attention_mask, **options)
    return out * 1.01, weights


def raises(*args, **options):
    raise RuntimeError("view size is not compatible")


def passed_on(module, query, key, value, attention_mask, **options):
    return grouped_attention(module, query, key, value, None, **options)


@pytest.mark.parametrize("route", [wrong_numbers, raises, passed_on])
def test_a_route_that_does_not_serve_the_model_is_not_taken(route, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, ROUTE, route)
    model = tiny_model("llama")
    assert survey(TargetModel.wrap(model)).query_group is None
    assert model.config._attn_implementation == "sdpa"


def test_layers_that_do_not_ask_for_the_configured_attention_are_noticed():
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    attention.config = tiny_model("llama").config  # one layer keeps its own
    assert survey(TargetModel.wrap(model)).query_group is None


def test_forwards_of_other_threads_are_not_observed():
    model = tiny_model("llama")
    expected = names_of(model, survey(TargetModel.wrap(model)).siblings)
    running, stop = threading.Event(), threading.Event()

    def disturb():
        while not stop.is_set():
            model(torch.tensor([[5, 3, 8]]))
            running.set()

    thread = threading.Thread(target=disturb)
    thread.start()
    assert running.wait(10)
    try:
        found = [names_of(model, survey(TargetModel.wrap(model)).siblings) for _ in range(5)]
    finally:
        stop.set()
        thread.join()
    assert found == [expected] * 5
