"""Weights packed as on a GPU, where a matrix stays as it is: layers that share an input are one product."""

from functools import partial

import pytest
import torch
from greedy_oracle import plain_generate
from tiny_models import make_adapter, tiny_model

from pardec.adapters.gated_lora import LoraGate, LoraWeights
from pardec.decoding import prepack
from pardec.decoding.prepack import PackedLinears
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw
from pardec.decoding.step import Decoder
from pardec.model import SelfSpeculativeModel
from pardec.target.forward import TargetModel, UnsupportedModelError
from pardec.target.packed_matrix import PackedMatrix
from pardec.target.survey import survey
from pardec.training.linear_layers import linear_layers


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Matrices stay as they are, and any dtype is packed; what is worth packing is still a CPU's choice."""
    monkeypatch.setattr(prepack, "_keeps_form", lambda weight: True)
    monkeypatch.setattr(prepack, "_has_kernels", lambda dtype: True)


@pytest.mark.parametrize("mode", ["plain", "two_pass", "fused"])
@pytest.mark.parametrize("family", ["llama", "gemma3-mixed-windows", "opt"])
def test_matrices_that_stay_as_they_are_give_generates_tokens(family, mode, as_on_cuda):
    model = tiny_model(family)
    ours = SelfSpeculativeModel(model, None, make_adapter(model, 3, lora_rank=2))
    rows = [[5, 9, 2, 7], [3, 8]]
    expected = [plain_generate(model, row, 24) for row in rows]
    unpacked = SelfSpeculativeModel(model, None, make_adapter(model, 3, lora_rank=2))
    unpacked.engines._packed = lambda facts, with_lora: prepack.PackedLinears(())
    found, other = (one.generate(rows, max_new_tokens=24, mode=mode) for one in (ours, unpacked))
    assert found.token_ids == other.token_ids == expected
    assert [one.accepted for one in found.counts] == [one.accepted for one in other.counts]
    assert any(linears.modules for linears in ours.engines._linears.values())


def test_closed_gates_take_nothing_of_the_lora(as_on_cuda):
    """Whose rows need not even be finite: the same matrix serves plain steps."""
    torch.manual_seed(0)
    base = torch.nn.ModuleDict({"q": torch.nn.Linear(8, 5, bias=False), "k": torch.nn.Linear(8, 3)}).double()
    halves = {"q.lora_A": (2, 8), "q.lora_B": (5, 2), "k.lora_A": (2, 8), "k.lora_B": (3, 2)}
    tensors = {f"base_model.model.{name}.weight": torch.randn(shape) for name, shape in halves.items()}
    gate = LoraGate(base, LoraWeights({"peft_type": "LORA", "r": 2, "lora_alpha": 2}, tensors))
    packed = PackedLinears([tuple(base.values())], gate)
    packed.refresh()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    expected = [module(x) for module in base.values()]
    with torch.no_grad(), packed.installed(), packed.active():
        assert not gate.is_open
        found = [module(x) for module in base.values()]
        with gate.open(slice(3, 5), 1, 5):
            assert gate.is_open
            again = x.clone()  # another forward has another input
            opened = [module(again) for module in base.values()]
    for one, other, third in zip(found, expected, opened, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(third[:, :3], other[:, :3], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(third[:, 3:], other[:, 3:])


def test_what_a_graph_reads_outlives_packing_anew(as_on_cuda):
    model = tiny_model("llama")
    ours = SelfSpeculativeModel(model, None, make_adapter(model, 3, lora_rank=2))
    ours.generate([[5, 3]], max_new_tokens=4)
    (linears,) = ours.engines._linears.values()
    forward = ours.engines.row_forward(3, None, linears)
    before, held = linears.num_packed, forward.held
    model.model.layers[0].mlp.up_proj.weight.data += 1  # past what counts versions
    assert ours.generate([[5, 3]], max_new_tokens=9).token_ids == [plain_generate(model, [5, 3], 9)]
    assert linears.num_packed == before + 1
    assert forward.held is not held
    assert held.keys() == forward.held.keys()


@pytest.mark.parametrize("has_lora", [False, True])
def test_compiled_steps_take_packed_matrices_and_are_compiled_once(has_lora, as_on_cuda):
    graphs = []

    def collect(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    def compile_step(run):
        return torch.compile(run, backend=collect, dynamic=False, fullgraph=True)

    model = tiny_model("llama", num_hidden_layers=2)
    adapter, target, facts = (
        make_adapter(model, 3, lora_rank=2),
        TargetModel.wrap(model),
        survey(TargetModel.wrap(model)),
    )
    gate = LoraGate(model, adapter.lora) if has_lora else None
    packed = PackedLinears(facts.siblings, gate)
    packed.refresh()
    masks, found = adapter.mask_embeddings.to(target.dtype), []
    for linears in (None, packed):
        forward = RowForward(target, masks, gate, linears, query_group=facts.query_group, compile_step=compile_step)
        decoder = Decoder(forward, "fused", 3, TokenLaw(True), 9, torch.empty(0, dtype=torch.long))
        with decoder.attached():
            state = decoder.prefill([[5, 9, 2, 7], [3, 8]])
        for _ in range(3):
            with decoder.attached():
                decoder.step(state)
        found.append((state.output.tolist(), state.rounds()))
    assert found[0] == found[1]
    assert len(graphs) == 2
    own, shared = ([target for target in graph if target is torch._C._nn.linear] for graph in graphs)
    assert (len(own), len(shared)) == (2 * 7 + 1, 2 * 4 + 1)


@pytest.mark.parametrize("has_bias", [False, True])
def test_compiled_code_multiplies_by_a_packed_matrix_of_a_cpu(has_bias):
    torch.manual_seed(0)
    linear, x, calls = torch.nn.Linear(24, 40, bias=has_bias), torch.randn(1, 4, 24), []

    def collect(graph, inputs):
        calls.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    product = PackedMatrix(linear.weight.detach(), linear.bias)
    with torch.no_grad():
        found = torch.compile(lambda x: product(x), backend=collect, fullgraph=True)(x)
        torch.testing.assert_close(found, linear(x))
        assert torch.equal(found, product(x))
        other = torch.randn(1, 4, 44)[..., 4:]
        total = torch.compile(lambda x: product.plus(x, other), backend=collect, fullgraph=True)(x)
        torch.testing.assert_close(total, linear(x) + other)
        assert torch.equal(total, product.plus(x, other))
    assert calls == [torch.ops.pardec.packed_product, torch.ops.pardec.packed_sum]


def test_compiled_steps_on_a_cpu_take_packed_matrices(monkeypatch):
    """From matrices as they lie a CPU's step takes half as long again."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # needs no compiler
    model = tiny_model("llama", dtype=torch.float32)
    ours = SelfSpeculativeModel(model, None, make_adapter(model, 3, lora_rank=2), compile=True)
    for mode in ("plain", "fused", "two_pass"):
        expected = plain_generate(model, [5, 9, 2, 7], 12)
        assert ours.generate([[5, 9, 2, 7]], max_new_tokens=12, mode=mode).token_ids == [expected]
    assert {len(linears.modules) for linears in ours.engines._linears.values()} == {len(linear_layers(model)) + 1}


def test_under_autocast_hooks_apply_the_lora_that_packed_layers_would(as_on_cuda):
    model = tiny_model("llama", dtype=torch.float32)
    ours, unpacked = (SelfSpeculativeModel(model, None, make_adapter(model, 3, lora_rank=3)) for _ in range(2))
    unpacked.engines._packed = lambda facts, with_lora: prepack.PackedLinears(())
    with torch.autocast("cpu", torch.bfloat16):
        found, other = (one.generate([[5, 9, 2, 7]], max_new_tokens=16) for one in (ours, unpacked))
    assert found.token_ids == other.token_ids
    assert found.counts[0].accepted == other.counts[0].accepted
    assert found.stats.mean_acceptance_length > 1


def test_in_inference_mode_layers_that_share_an_input_are_one_product_too(monkeypatch):
    """Tensors of that mode do not tell whether somebody has written to them."""
    model, products = tiny_model("llama", dtype=torch.float32), []
    original = prepack._packed_product

    def counted(modules, gate):
        product = original(modules, gate)
        return lambda x: products.append(len(modules)) or product(x)

    monkeypatch.setattr(prepack, "_packed_product", counted)
    expected, counts = plain_generate(model, [5, 9, 2, 7], 16), []
    for mode in (torch.no_grad, torch.inference_mode):
        ours = SelfSpeculativeModel(model, None, make_adapter(model, 3, lora_rank=2, head_width=4))
        for way in ("plain", "fused"):
            with mode():
                found = ours.generate([[5, 9, 2, 7]], max_new_tokens=16, mode=way)
            assert found.token_ids == [expected]
        counts.append(len(products))
    assert counts[1] == 2 * counts[0]


def test_compiled_steps_of_a_base_that_writes_to_a_shared_input_since_take_layers_by_themselves(
    as_on_cuda, monkeypatch
):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # needs no compiler
    model = tiny_model("llama", num_hidden_layers=2)
    ours = SelfSpeculativeModel(model, None, make_adapter(model, 2), compile=True)
    prompt, attention = [5, 9, 2, 7], model.model.layers[0].self_attn
    ours.generate([prompt], max_new_tokens=4)
    (before,) = ours.engines._linears.values()

    def doubles(module, args):
        args[0].mul_(2)

    handle = attention.k_proj.register_forward_pre_hook(doubles)
    assert ours.generate([prompt], max_new_tokens=9).token_ids == [plain_generate(model, prompt, 9)]
    handle.remove()
    (after,) = ours.engines._linears.values()
    assert after is not before
    assert (attention.k_proj,) not in before.siblings
    assert len(after.siblings) > len(before.siblings)


@pytest.mark.parametrize("where", ["forward", "call"])
def test_a_base_that_its_user_has_compiled_is_refused_beside_a_lora(where):
    model = tiny_model("llama", num_hidden_layers=1)
    ours = SelfSpeculativeModel(model, None, make_adapter(model, 2, lora_rank=2))
    if where == "forward":
        model.model.layers[0].forward = torch.compile(model.model.layers[0].forward, backend="eager")
    else:
        model.compile(backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"base: expected no torch\.compile of your own beside a LoRA"):
        ours.generate([[5, 9]], max_new_tokens=4)
