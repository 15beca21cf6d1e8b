"""Packed weights: the same product, the base untouched, changes noticed."""

import torch
from tiny_models import make_adapter, tiny_model

from pardec.model import SelfSpeculativeModel
from pardec.prepack import PackedLinears


def packed_linears(model: torch.nn.Module) -> PackedLinears:
    """Every linear layer by itself."""
    return PackedLinears([(module,) for module in model.modules() if isinstance(module, torch.nn.Linear)])


def test_packed_layers_give_the_same_numbers_for_any_number_of_rows():
    torch.manual_seed(0)
    for bias in (True, False):
        model = torch.nn.Sequential(torch.nn.Linear(48, 80, bias=bias))
        packed = packed_linears(model)
        packed.refresh()
        for shape in ((1, 1, 48), (1, 25, 48), (3, 9, 48), (7, 48), (200, 48)):
            x = torch.randn(shape)
            expected = torch.einsum("...i,oi->...o", x.double(), model[0].weight.double())
            expected = expected + (model[0].bias.double() if bias else 0)
            with torch.no_grad(), packed.active():
                found = model(x)
            assert found.shape == expected.shape
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_outside_of_the_context_the_base_is_bitwise_itself():
    model = tiny_model("llama", dtype=torch.float32)
    ids = torch.tensor([[5, 3, 8, 1]])
    before = model(ids).logits
    stream = SelfSpeculativeModel(model, None, make_adapter(model, 2)).stream([5, 3, 8], max_new_tokens=12)
    next(stream)
    next(stream)
    assert torch.equal(model(ids).logits, before)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_weights_that_change_are_packed_again():
    model = tiny_model("llama", dtype=torch.float32)
    ours = SelfSpeculativeModel(model, None, make_adapter(model, 2))
    ours.generate([5, 3, 8], max_new_tokens=12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5).add_(torch.randn(parameter.shape) * 0.2)
    expected = model.generate(torch.tensor([[5, 3, 8]]), max_new_tokens=12, do_sample=False)[0, 3:].tolist()
    for mode in ("plain", "fused"):
        assert ours.generate([5, 3, 8], max_new_tokens=12, mode=mode).token_ids == [expected]


def test_changes_that_leave_no_trace_in_version_counters_are_noticed():
    model = tiny_model("llama", dtype=torch.float32)
    ours = SelfSpeculativeModel(model, None, make_adapter(model, 2))
    ours.generate([5, 3, 8], max_new_tokens=12)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape) * 0.3)
    expected = model.generate(torch.tensor([[5, 3, 8]]), max_new_tokens=12, do_sample=False)[0, 3:].tolist()
    for mode in ("plain", "fused"):
        assert ours.generate([5, 3, 8], max_new_tokens=12, mode=mode).token_ids == [expected]


def test_a_forward_that_is_replaced_later_is_honoured_and_kept():
    model = tiny_model("llama", dtype=torch.float32)
    ours = SelfSpeculativeModel(model, None, make_adapter(model, 2))
    ours.generate([5, 3, 8], max_new_tokens=12)
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = lambda x: torch.nn.functional.linear(x, -layer.weight)
    expected = model.generate(torch.tensor([[5, 3, 8]]), max_new_tokens=12, do_sample=False)[0, 3:].tolist()
    assert ours.generate([5, 3, 8], max_new_tokens=12).token_ids == [expected]
    assert "forward" in layer.__dict__


def test_another_thread_that_runs_the_base_gets_its_own_numbers():
    import threading

    model = tiny_model("llama", dtype=torch.float32)
    ids = torch.randint(0, 61, (1, 16))
    before = model(ids).logits
    ours = SelfSpeculativeModel(model, None, make_adapter(model, 3, lora_rank=2))
    stop, wrong = threading.Event(), []

    def watch():
        while not stop.is_set():
            wrong.append(not torch.equal(model(ids).logits, before))

    thread = threading.Thread(target=watch)
    thread.start()
    for _ in range(5):
        ours.generate([5, 3, 8], max_new_tokens=40)
    stop.set()
    thread.join()
    assert len(wrong) > 20
    assert not any(wrong)


def test_a_forward_that_someone_else_replaced_is_left_alone():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model[0].forward = lambda x: x + 1
    packed = packed_linears(model)
    packed.refresh()
    with packed.active():
        assert torch.equal(model(torch.zeros(1, 4)), torch.ones(1, 4))
    assert torch.equal(model(torch.zeros(1, 4)), torch.ones(1, 4))


def test_other_dtypes_are_not_packed():
    model = tiny_model("llama", dtype=torch.float64)
    packed = packed_linears(model)
    packed.refresh()
    assert packed.modules == []


def test_nothing_is_packed_where_memory_is_short(monkeypatch):
    import psutil

    class Short:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Short)
    packed = packed_linears(tiny_model("llama", dtype=torch.float32))
    packed.refresh()
    assert packed.modules == []
