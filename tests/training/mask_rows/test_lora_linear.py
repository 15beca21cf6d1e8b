"""A linear layer with its LoRA as one operation, against PEFT's own forward and backward."""

from collections import Counter

import pytest
import torch
from tiny_models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from pardec.training.mask_rows.lora_linear import _LoraLinear, fused_loras
from pardec.training.peft_lora import inject_lora, lora_enabled


def model_with_lora(family: str, dtype=torch.float64, **changes):
    model = tiny_model(family, dtype=dtype, **changes)
    inject_lora(model, r=2, alpha=6, target_modules="all-linear")
    generator = torch.Generator().manual_seed(1)
    for name, values in model.named_parameters():
        if "lora_" in name:
            values.data = torch.randn(values.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.3
    return model


def outputs_and_gradients(model, autocast=False, fused=False, of_inputs=True):
    table = model.get_input_embeddings()(torch.arange(12).view(2, 6)).detach().requires_grad_(of_inputs)
    with lora_enabled(model), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if fused:
            with fused_loras(model):
                logits = model(inputs_embeds=table, use_cache=False).logits
        else:
            logits = model(inputs_embeds=table, use_cache=False).logits
    (logits.double() ** 2).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"inputs": table.grad}
    model.zero_grad(set_to_none=True)
    return logits.detach(), found


@pytest.fixture
def calls(monkeypatch):
    """How often layers have run as one operation."""
    counted, original = Counter(), _LoraLinear.apply
    monkeypatch.setattr(_LoraLinear, "apply", lambda *given: counted.update(["calls"]) or original(*given))
    return counted


@pytest.mark.parametrize(("family", "fusable"), [("llama", 7), ("qwen3-mixed-windows", 7), ("gpt2", 0)])
def test_outputs_and_gradients_are_those_of_peft(family, fusable, calls):
    model = model_with_lora(family)
    logits, gradients = outputs_and_gradients(model)
    assert not calls
    found, mine = outputs_and_gradients(model, fused=True)
    assert calls["calls"] == fusable * model.config.num_hidden_layers  # gpt2's matrices lie the other way round
    torch.testing.assert_close(found, logits)
    assert set(mine) == set(gradients)
    assert len(mine) > 2
    for name, gradient in gradients.items():
        torch.testing.assert_close(mine[name], gradient, msg=name)


@pytest.mark.parametrize("bias", [False, True])
def test_under_autocast_a_layer_is_no_further_from_the_exact_one_than_pefts(bias, calls):
    model = model_with_lora("llama", torch.float32, attention_bias=bias)
    layer = model.model.layers[0].self_attn.q_proj
    assert (layer.base_layer.bias is not None) == bias
    rows, slope = torch.randn(2, 2, 40, 32, generator=torch.Generator().manual_seed(2)).unbind(0)

    def found(dtype: torch.dtype, *, autocast: bool, fused: bool) -> list[torch.Tensor]:
        layer.to(dtype).zero_grad(set_to_none=True)
        x = rows.to(dtype, copy=True).requires_grad_()
        in_bf16 = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        with lora_enabled(model), fused_loras(model if fused else torch.nn.Identity()), in_bf16:
            out = layer(x)
        out.backward(slope.to(out.dtype))
        assert out.dtype == (torch.bfloat16 if autocast else dtype)
        assert x.grad is not None
        return [out.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]

    exact = found(torch.float64, autocast=False, fused=False)
    assert not calls
    errors = []
    for fused in (False, True):
        mine = found(torch.float32, autocast=True, fused=fused)
        assert all(gradient.dtype == torch.float32 for gradient in mine[1:])
        errors.append([float((a.double() - b).norm() / b.norm()) for a, b in zip(mine, exact, strict=True)])
    assert calls["calls"] == 1
    assert len(exact) == 4
    assert all(mine < max(2**-8, 1.1 * pefts) for pefts, mine in zip(*errors, strict=True))


def test_inputs_that_need_no_gradient_get_none(calls):
    model = model_with_lora("llama")
    _, gradients = outputs_and_gradients(model, of_inputs=False)
    _, mine = outputs_and_gradients(model, of_inputs=False, fused=True)
    assert calls
    assert mine["inputs"] is None
    for name, gradient in gradients.items():
        torch.testing.assert_close(mine[name], gradient, msg=name)


def test_layers_that_others_watch_or_switch_off_keep_pefts_forward(calls):
    model = model_with_lora("llama")
    seen = []
    half = next(module for name, module in model.named_modules() if name.endswith("lora_B.default"))
    handle = half.register_forward_hook(lambda module, rows, out: seen.append(out.shape))
    outputs_and_gradients(model, fused=True)
    assert calls["calls"] == 7 * model.config.num_hidden_layers - 1
    assert len(seen) == 1
    handle.remove()
    calls.clear()
    with fused_loras(model), torch.no_grad():  # not enabled
        model(torch.arange(6)[None])
    assert not calls


def test_layers_are_as_they_were_afterwards_whatever_happened():
    model = model_with_lora("llama")
    with pytest.raises(IndexError), fused_loras(model), lora_enabled(model):
        model(torch.tensor([[10**6]]))
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_that_read_the_same_rows_cast_them_once():
    class Casts(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            Casts.number += func is torch.ops.aten._to_copy.default and out.shape[-1] == 32 and out.dim() == 3
            return out

    model = model_with_lora("llama", torch.float32)
    layer = model.model.layers[0].self_attn
    rows = torch.randn(2, 6, 32, requires_grad=True)
    with lora_enabled(model), fused_loras(model), torch.autocast("cpu", torch.bfloat16), Casts():
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
            projection(rows)
    assert Casts.number == 1


@pytest.mark.parametrize("bias", [False, True])
def test_what_comes_out_may_be_written_to(bias):
    """As models do that scale their queries in place."""
    layer = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=bias)).double()
    x, A, B = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 3, 6), (2, 6), (4, 2)))
    weight, offset = layer[0].weight.detach(), layer[0].bias.detach() if bias else None
    out = _LoraLinear.apply(x, x.detach().flatten(0, -2), weight, offset, A, B, 3.0)
    out.mul_(2)
    expected = 2 * (torch.nn.functional.linear(x, weight, offset) + 3 * x @ A.T @ B.T)
    torch.testing.assert_close(out, expected)
    found = torch.autograd.grad(out.sum(), [x, A, B])
    for one, other in zip(found, torch.autograd.grad(expected.sum(), [x, A, B]), strict=True):
        torch.testing.assert_close(one, other)
