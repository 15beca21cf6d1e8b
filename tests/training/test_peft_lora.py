"""What `all-linear` means on bases whose layers do not all read every row: mixtures of experts and others."""

import json
import sys
import warnings

import peft
import pytest
import torch
from matrix.tiny_configs import tiny_model as tiny_family
from tiny_models import FAMILIES, tiny_model
from torch import nn

from pardec.adapters.adapter import Adapter, AdapterMetadata, BaseReference
from pardec.adapters.files import save_adapter
from pardec.adapters.gated_lora import LoraGate
from pardec.target.fingerprint import fingerprint
from pardec.training.linear_layers import linear_layers
from pardec.training.peft_lora import _targets, inject_lora, load_lora_weights, lora_weights

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
LATENT_ATTENTION = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
# the layers of attention, and all that every token goes through beside the experts
LAYERS = {
    "mixtral": ATTENTION,
    "qwen3_moe": ATTENTION,
    "deepseek_v3": LATENT_ATTENTION | MLP,
    "llama4_text": ATTENTION | MLP,
    "phimoe": ATTENTION,
    "qwen2_moe": ATTENTION | MLP | {"shared_expert_gate"},
}


@pytest.fixture(autouse=True)
def peft_is_quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def trained(base, target_modules: str | list[str] = "all-linear"):
    """PEFT's view of the base, with a LoRA whose second half, zero at first, is random."""
    torch.manual_seed(0)
    peft_model = inject_lora(base, r=2, alpha=4.0, target_modules=target_modules)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return peft_model


def last_names(peft_model) -> set[str]:
    return {name.rpartition(".")[2] for name in lora_weights(peft_model).pairs()}


@pytest.mark.parametrize("model_type", LAYERS)
def test_all_linear_on_mixtures_leaves_experts_and_routers_alone(model_type):
    peft_model = trained(tiny_family(model_type))
    assert last_names(peft_model) == LAYERS[model_type]
    assert not any(".experts." in name or "router" in name for name in lora_weights(peft_model).pairs())


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "llama4_text"])
def test_on_mixtures_gate_and_peft_s_own_loader_give_what_training_has(model_type, tmp_path):
    base = tiny_family(model_type)
    ids = torch.arange(3, 13)[None]
    plain = base(ids, use_cache=False).logits
    weights = lora_weights(trained(base))
    metadata = AdapterMetadata(
        num_speculative_tokens=2, base=BaseReference(name="random"), fingerprint=fingerprint(base, None)
    )
    save_adapter(Adapter(torch.zeros(2, 64), metadata, weights), tmp_path)
    fresh = tiny_family(model_type)
    gate = LoraGate(fresh, weights)
    with gate.attached(), gate.open(slice(0, 10), 1, 10):
        served = fresh(ids, use_cache=False).logits
    loaded = peft.PeftModel.from_pretrained(tiny_family(model_type), str(tmp_path / "lora"))(ids, use_cache=False)
    assert float((served - plain).abs().max()) > 0.1
    torch.testing.assert_close(loaded.logits, served, atol=1e-3, rtol=1e-3)


def test_a_lora_on_layers_beside_experts_is_put_back_where_it_was():
    weights = lora_weights(trained(tiny_family("deepseek_v3")))
    other = inject_lora(tiny_family("deepseek_v3"), r=2, alpha=4.0, target_modules="all-linear")
    load_lora_weights(other, weights)
    found = lora_weights(other).tensors
    assert found.keys() == weights.tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.tensors.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_bases_get_the_modules_of_peft_s_all_linear_byte_for_byte(family):
    """The configuration too."""
    torch.manual_seed(0)
    ours = lora_weights(inject_lora(tiny_model(family), r=2, alpha=4.0, target_modules="all-linear"))
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out", category=UserWarning)
        theirs = lora_weights(peft.get_peft_model(tiny_model(family), config))
    assert json.dumps(ours.config) == json.dumps({**theirs.config, "lora_alpha": 4.0})
    assert list(ours.tensors) == list(theirs.tensors)
    assert all(torch.equal(ours.tensors[name], tensor) for name, tensor in theirs.tensors.items())


@pytest.mark.parametrize(
    ("model_type", "target_modules", "found"),
    [
        ("qwen3_moe", ["q_proj", "gate_proj"], "gate_proj"),
        ("mixtral", ["w1", "w2", "w3"], "w1"),
        ("qwen3_moe", r".*(gate|up|down)_proj", r"\.\*\(gate"),
        ("llama4_text", ["q_proj", "router"], "model.layers.0.feed_forward.router"),
        ("deepseek_v3", ["kv_b_proj"], "model.layers.0.self_attn.kv_b_proj"),
        ("llama", ["no_such_layer"], "no_such_layer"),
        ("llama", ["q_proj", "v_porj"], "v_porj"),
        ("llama", "no_such_layer", "no_such_layer"),
        ("bert", ["dense"], "cls.predictions.transform.dense"),
    ],
)
def test_layers_that_a_gate_cannot_serve_are_refused_and_those_to_name_are_told(model_type, target_modules, found):
    message = rf"adapter\.lora\.target_modules: expected linear layers that read every row, such as .*, found {found}"
    with pytest.raises(ValueError, match=message) as error:
        inject_lora(tiny_family(model_type), r=2, alpha=4.0, target_modules=target_modules)
    assert "\n" not in str(error.value)


def test_named_layers_beside_the_experts_are_taken_though_experts_have_their_names():
    pairs = lora_weights(trained(tiny_family("deepseek_v3"), ["gate_proj"])).pairs()
    assert [name.removeprefix("model.layers.") for name in pairs] == [
        "0.mlp.gate_proj",
        *(f"{n}.mlp.shared_experts.gate_proj" for n in (1, 2, 3)),
    ]


def test_versions_of_peft_that_take_every_name_as_it_stands_are_left_to_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft.utils.transformers_weight_conversion", None)
    names = ["gate_proj", "o_proj"]
    assert _targets(tiny_family("deepseek_v3"), names) == (names, [])
    with pytest.raises(ValueError, match="found gate_proj"):  # which is the experts' alone, and no layer
        _targets(tiny_family("qwen3_moe"), names)


@pytest.mark.parametrize(
    ("model_type", "others"),
    [
        ("llama", set()),
        ("deepseek_v3", {f"model.layers.{n}.self_attn.kv_b_proj" for n in range(4)}),  # reads all that is cached
        ("bert", {"cls.predictions.transform.dense"}),  # reads the rows whose logits are kept
        ("llama4_text", {f"model.layers.{n}.feed_forward.router" for n in range(4)}),  # gives more than a tensor
    ],
)
def test_layers_that_read_other_rows_are_found_by_running_them(model_type, others):
    layers = linear_layers(tiny_family(model_type))
    assert {name for name, reads_rows in layers.items() if not reads_rows} == others


def test_experts_that_are_layers_are_told_from_those_that_all_rows_go_through_even_where_they_do_not_run():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.experts = nn.Linear(32, 32), nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

        def forward(self, x):
            rows = x.flatten(0, 1)
            expert = rows[:, 0] > 0  # two of four
            out = torch.zeros_like(rows)
            for n in (0, 1):
                out[expert == bool(n)] = self.experts[n](rows[expert == bool(n)])
            return self.shared(x) + out.view_as(x)

    base = tiny_model("llama", dtype=torch.float32)
    base.model.layers[1].mlp = Mixture()
    found = linear_layers(base)
    assert {name for name, reads_rows in found.items() if not reads_rows} == {
        f"model.layers.1.mlp.experts.{n}" for n in range(4)
    }


def test_a_base_with_an_adapter_of_its_user_is_not_trained_on():
    """Its layers would be switched off with those that are trained, and it would be another target."""
    base = tiny_model("llama")
    inject_lora(base, r=2, alpha=4.0, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"^base: expected none that carries adapters of PEFT .*, found 3 such layers"):
        inject_lora(base, r=2, alpha=4.0, target_modules=["v_proj"])
