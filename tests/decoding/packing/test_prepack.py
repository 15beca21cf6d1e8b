"""Packed weights: the same product, the base untouched, changes noticed."""

import threading
from contextlib import contextmanager

import pytest
import torch
from greedy_oracle import plain_generate, prompts
from tiny_models import make_adapter, tiny_model
from torch.nn.utils import prune

from pardec.adapters.gated_lora import LoraGate, LoraWeights
from pardec.decoding import prepack
from pardec.decoding.prepack import PackedLinears
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw
from pardec.decoding.step import Decoder
from pardec.model import SelfSpeculativeModel
from pardec.target.cache import SlotCache
from pardec.target.forward import TargetModel
from pardec.target.survey import survey

# what the kernels round to, relative to the numbers that are summed up; bfloat16 where this CPU has kernels for it
DTYPES = [
    pytest.param(torch.float32, 1e-5, id="float32"),
    pytest.param(
        torch.bfloat16,
        2**-7,
        id="bfloat16",
        marks=pytest.mark.skipif(
            not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="needs oneDNN's kernels for bfloat16"
        ),
    ),
]


def packed_linears(model: torch.nn.Module) -> PackedLinears:
    """Every linear layer by itself."""
    return PackedLinears([(module,) for module in model.modules() if isinstance(module, torch.nn.Linear)])


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_packed_layers_give_the_same_numbers_for_any_number_of_rows(dtype, tolerance):
    torch.manual_seed(0)
    for bias in (True, False):
        model = torch.nn.Sequential(torch.nn.Linear(48, 80, bias=bias)).to(dtype)
        packed = packed_linears(model)
        packed.refresh()
        assert packed.modules == [model[0]]
        for shape in ((1, 1, 48), (1, 25, 48), (3, 9, 48), (7, 48), (200, 48)):
            x = torch.randn(shape).to(dtype)
            expected = torch.einsum("...i,oi->...o", x.double(), model[0].weight.double())
            expected = expected + (model[0].bias.double() if bias else 0)
            with torch.no_grad(), packed.installed(), packed.active():
                found = model(x)
            assert (found.shape, found.dtype) == (expected.shape, dtype)
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_thread_that_comes_while_another_one_packs_gets_the_new_weights(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(48, 80))
    packed, x, real, packs = packed_linears(model), torch.randn(1, 48), prepack._Group.pack, threading.Event()
    packed.refresh()
    go_on = threading.Event()

    def slow_pack(*args):
        packs.set()
        assert go_on.wait(10)
        return real(*args)

    monkeypatch.setattr(prepack._Group, "pack", slow_pack)
    model[0].weight.data.neg_()
    first = threading.Thread(target=packed.refresh)
    first.start()
    assert packs.wait(10)
    found = []

    def refresh_and_run() -> None:
        packed.refresh()
        with torch.no_grad(), packed.installed(), packed.active():
            found.append(model(x))

    second = threading.Thread(target=refresh_and_run)
    second.start()
    second.join(0.3)  # waits for the first, or takes what is there
    go_on.set()
    first.join()
    second.join()
    torch.testing.assert_close(found[0], torch.nn.functional.linear(x, model[0].weight, model[0].bias).detach())
    assert packed.num_packed == 2


def test_a_packing_that_fails_is_tried_again(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(48, 80))
    packed, x = packed_linears(model), torch.randn(1, 48)
    packed.refresh()
    model[0].weight.data.neg_()

    def full(*args):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(prepack._Group, "pack", full)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                packed.refresh()
    packed.refresh()
    with torch.no_grad(), packed.installed(), packed.active():
        torch.testing.assert_close(model(x), torch.nn.functional.linear(x, model[0].weight, model[0].bias))


def test_outside_of_the_context_the_base_is_bitwise_itself():
    model = tiny_model("llama", dtype=torch.float32)
    ids = torch.tensor([[5, 3, 8, 1]])
    before = model(ids).logits
    stream = SelfSpeculativeModel(model, None, make_adapter(model, 2)).stream([5, 3, 8], max_new_tokens=12)
    next(stream)
    next(stream)
    assert torch.equal(model(ids).logits, before)
    stream.close()
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("width", [4, 6, 7])
def test_a_number_that_changes_in_a_row_of_any_width_is_noticed(dtype, tolerance, width):
    model = torch.nn.Sequential(torch.nn.Linear(width, 5)).to(dtype)
    packed = packed_linears(model)
    packed.refresh()
    x = torch.ones(1, width, dtype=dtype)
    for place in range(width):
        model[0].weight.data[2, place] += 1
        packed.refresh()
        with torch.no_grad(), packed.installed(), packed.active():
            found = model(x)
        torch.testing.assert_close(found, model(x), rtol=tolerance, atol=tolerance)


def test_weights_that_change_are_packed_again():
    model = tiny_model("llama", dtype=torch.float32)
    ours = SelfSpeculativeModel(model, None, make_adapter(model, 2))
    ours.generate([5, 3, 8], max_new_tokens=12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5).add_(torch.randn(parameter.shape) * 0.2)
    expected = plain_generate(model, [5, 3, 8], 12)
    for mode in ("plain", "fused"):
        assert ours.generate([5, 3, 8], max_new_tokens=12, mode=mode).token_ids == [expected]


def test_changes_that_leave_no_trace_in_version_counters_are_noticed():
    model = tiny_model("llama", dtype=torch.float32)
    ours = SelfSpeculativeModel(model, None, make_adapter(model, 2))
    ours.generate([5, 3, 8], max_new_tokens=12)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape) * 0.3)
    expected = plain_generate(model, [5, 3, 8], 12)
    for mode in ("plain", "fused"):
        assert ours.generate([5, 3, 8], max_new_tokens=12, mode=mode).token_ids == [expected]


def test_a_forward_that_is_replaced_later_is_honoured_and_kept():
    model = tiny_model("llama", dtype=torch.float32)
    ours = SelfSpeculativeModel(model, None, make_adapter(model, 2))
    ours.generate([5, 3, 8], max_new_tokens=12)
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = lambda x: torch.nn.functional.linear(x, -layer.weight)
    expected = plain_generate(model, [5, 3, 8], 12)
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
    with packed.installed(), packed.active():
        assert torch.equal(model(torch.zeros(1, 4)), torch.ones(1, 4))
    assert torch.equal(model(torch.zeros(1, 4)), torch.ones(1, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_without_kernels_are_not_packed(dtype, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model = tiny_model("llama", dtype=dtype)
    packed = packed_linears(model)
    packed.refresh()
    assert packed.modules == []


def test_quantised_weights_in_a_plain_layer_are_not_packed():
    """Such tensors say that they are float32, and have no bits to sum up or to reorder."""

    class Quantised(torch.nn.Parameter):
        pass

    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model[0].weight = Quantised(torch.randn(8, 8))
    packed = packed_linears(model)
    packed.refresh()
    assert packed.modules == [model[1]]


def test_nothing_is_packed_where_memory_is_short(monkeypatch):
    import psutil

    class Short:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Short)
    packed = packed_linears(tiny_model("llama", dtype=torch.float32))
    packed.refresh()
    assert packed.modules == []


# ---------------------------------------------------------------------- layers that read one input, and their LoRA

IN, R, NUM_REAL = 48, 9, 4
OUT = {"q": 32, "k": 16, "v": 24}


class Siblings(torch.nn.Module):
    """Three layers of different widths, with or without biases."""

    def __init__(self, biased: str = ""):
        super().__init__()
        torch.manual_seed(0)
        for name, width in OUT.items():
            setattr(self, name, torch.nn.Linear(IN, width, bias=name in biased))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.children()]


def lora_for(names: str, rank: int = 3) -> LoraWeights:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name in names:
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, IN, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(OUT[name], rank, generator=generator)
    return LoraWeights({"peft_type": "LORA", "r": rank, "lora_alpha": rank}, tensors)


def packed_siblings(base: Siblings, gate: LoraGate | None = None) -> PackedLinears:
    packed = PackedLinears([tuple(base.children())], gate)
    packed.refresh()
    assert packed.modules == list(base.children())
    return packed


def hooked(base: Siblings, gate: LoraGate, x: torch.Tensor, rows: slice) -> list[torch.Tensor]:
    """The oracle: the base's own layers, and hooks."""
    with torch.no_grad(), gate.attached(), gate.open(rows, *x.shape[:2]):
        return base(x)


@contextmanager
def in_use(packed: PackedLinears):
    with torch.no_grad(), packed.installed(), packed.active():
        yield


def run_packed(base: Siblings, packed: PackedLinears, gate: LoraGate, x: torch.Tensor, rows: slice | None):
    with gate.attached(but=packed.modules), in_use(packed):
        if rows is None:
            return base(x)
        with gate.open(rows, *x.shape[:2]):
            return base(x)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("biased", ["", "qkv", "k"])
@pytest.mark.parametrize("with_lora", ["qkv", "qv", "k"])
def test_siblings_and_their_lora_are_one_product_with_the_numbers_of_hooks(with_lora, biased, batch):
    base = Siblings(biased)
    gate = LoraGate(base, lora_for(with_lora))
    packed = packed_siblings(base, gate)
    x = torch.randn(batch, R, IN)
    for rows in (slice(NUM_REAL, R), slice(R - 1, R)):
        found = run_packed(base, packed, gate, x, rows)
        for one, other in zip(found, hooked(base, gate, x, rows), strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)
        closed = run_packed(base, packed, gate, x, None)
        for name, one, other in zip(OUT, found, closed, strict=True):
            assert torch.equal(one[:, : rows.start], other[:, : rows.start])  # real rows: bitwise, open or not
            assert torch.equal(one, other) == (name not in with_lora)
    assert not any(module._forward_hooks for module in base.modules())


@pytest.mark.parametrize("batch", [1, 3])
def test_a_lora_on_a_layer_by_itself_gives_the_numbers_of_hooks(batch):
    base = Siblings("q")
    gate = LoraGate(base, lora_for("q"))
    packed = PackedLinears([(base.q,), (base.k,)], gate)
    packed.refresh()
    x, rows = torch.randn(batch, R, IN), slice(NUM_REAL, R)
    found, expected = run_packed(base, packed, gate, x, rows), hooked(base, gate, x, rows)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


def test_a_flattened_batch_is_gated_too():
    base = Siblings("v")
    gate = LoraGate(base, lora_for("qkv"))
    packed = packed_siblings(base, gate)
    x, rows = torch.randn(3, R, IN), slice(NUM_REAL, R)
    expected = run_packed(base, packed, gate, x, rows)
    with in_use(packed), gate.open(rows, 3, R):
        found = base(x.view(3 * R, IN))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.view(other.shape), other, rtol=1e-6, atol=1e-6)


def exact(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    product = x.double() @ layer.weight.double().T
    return (product if layer.bias is None else product + layer.bias.double()).float()


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_sibling_that_is_given_another_input_answers_for_that_input():
    base = Siblings("k")
    packed = packed_siblings(base)
    x, y = torch.randn(2, 1, R, IN)
    with in_use(packed):
        for layer, given in ((base.q, x), (base.k, y), (base.v, x), (base.k, x), (base.q, y), (base.q, x.clone())):
            close(layer(given), exact(layer, given))


def test_an_input_that_is_written_to_in_between_is_another_input():
    base = Siblings("k")
    packed = packed_siblings(base)
    x = torch.randn(1, R, IN)
    with in_use(packed):
        close(base.q(x), exact(base.q, x))
        x.mul_(-2)
        close(base.k(x), exact(base.k, x))
        x[0, 3] = 0
        close(base.v(x), exact(base.v, x))


def test_results_that_the_caller_writes_to_do_not_reach_the_siblings():
    base = Siblings("k")
    packed = packed_siblings(base)
    x = torch.randn(1, R, IN)
    with in_use(packed):
        base.q(x).zero_()
        close(base.k(x), exact(base.k, x))
        close(base.v(x), exact(base.v, x))


def test_nothing_is_remembered_from_one_forward_to_the_next():
    base = Siblings()
    packed = packed_siblings(base)
    x = torch.randn(1, R, IN)
    with in_use(packed):
        base.q(x)
    base.k.weight.data.mul_(3)
    packed.refresh()
    with in_use(packed):
        close(base.k(x), exact(base.k, x))


def test_inference_mode_gives_the_same_numbers():
    """Its tensors do not count how often they were written to."""
    base = Siblings("k")
    gate = LoraGate(base, lora_for("qv"))
    packed = packed_siblings(base, gate)
    ordinary = torch.randn(1, R, IN)
    expected = run_packed(base, packed, gate, ordinary, slice(NUM_REAL, R))
    with torch.inference_mode():
        x = ordinary.clone()
        for one, other in zip(run_packed(base, packed, gate, x, slice(NUM_REAL, R)), expected, strict=True):
            close(one, other)
        with in_use(packed):
            base.q(x)
            x.mul_(-2)
            close(base.k(x), exact(base.k, x))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_biases_and_weights_of_any_sibling_that_change_are_packed_again(name):
    base = Siblings("qkv")
    packed = packed_siblings(base)
    x = torch.randn(1, R, IN)
    layer = getattr(base, name)
    changes = [
        lambda: layer.bias.data.add_(1),
        lambda: layer.weight.data.mul_(-0.5),
        lambda: layer.weight.data[0, :2].copy_(torch.tensor([3.0, 4.0])),
        lambda: setattr(layer, "bias", torch.nn.Parameter(torch.randn(layer.out_features))),
        lambda: setattr(layer, "weight", torch.nn.Parameter(torch.randn(layer.out_features, IN))),
    ]
    for change in changes:
        change()
        packed.refresh()
        with in_use(packed):
            for sibling, found in zip(base.children(), base(x), strict=True):
                close(found, exact(sibling, x))


def test_weights_that_have_not_changed_are_not_packed_again():
    base = Siblings("k")
    packed = packed_siblings(base)
    before = packed._groups
    packed.refresh()
    assert packed._groups is before
    base.v.weight.data[2, 2] += 1
    packed.refresh()
    assert packed._groups is not before


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("family", ["llama", "gemma3-mixed-windows", "phi3-window", "opt", "gpt_neox"])
def test_steps_with_packed_siblings_and_lora_give_the_logits_of_hooks(family, dtype, tolerance):
    """Real rows bitwise with the gate open or not, mask rows within rounding of the hooks."""
    model = tiny_model(family, dtype=dtype)
    target, adapter = TargetModel.wrap(model), make_adapter(model, 3, lora_rank=2)
    gate = LoraGate(model, adapter.lora)
    packed = PackedLinears(survey(target).siblings, gate)
    packed.refresh()
    assert len(packed.modules) > 10
    rows, seen = [[5, 9, 2, 7, 7], [3, 8], [4, 4, 6]], {}
    for batch in (1, 3):
        for name, linears, opened in (("hooks", None, gate), ("packed", packed, gate), ("closed", packed, None)):
            forward = RowForward(target, adapter.mask_embeddings.to(dtype), opened, linears)
            decoder = Decoder(forward, "fused", 3, TokenLaw(greedy=True), 8, torch.empty(0, dtype=torch.long))
            state = decoder.prefill(rows[:batch])
            state.bonus, state.drafts = torch.tensor([1, 2, 3])[:batch], torch.tensor([[4, 5, 6]] * batch)
            with torch.no_grad(), decoder.attached():
                seen[name] = decoder.step_logits(state)
        spread = seen["hooks"].std()
        assert (seen["packed"] - seen["hooks"]).abs().max() / spread < 10 * tolerance
        assert torch.equal(seen["packed"][:, :4], seen["closed"][:, :4])
        assert (seen["packed"] - seen["closed"])[:, 4:].abs().max() / spread > 0.1


@pytest.mark.parametrize("family", ["llama", "gemma3-mixed-windows", "phi3-window", "opt", "gpt_neox"])
def test_prefill_with_packed_siblings_and_lora_gives_the_logits_of_hooks(family, monkeypatch):
    """Prompts of several lengths, so that every one has its mask rows elsewhere, and no layer runs unpacked."""
    model = tiny_model(family, dtype=torch.float32)
    target, adapter = TargetModel.wrap(model), make_adapter(model, 3, lora_rank=2)
    gate = LoraGate(model, adapter.lora)
    packed = PackedLinears(survey(target).siblings, gate)
    packed.refresh()
    lengths = torch.tensor([5, 2, 3])
    padded, seen = torch.tensor([[5, 9, 2, 7, 7], [3, 8, 0, 0, 0], [4, 4, 6, 0, 0]]), {}
    for name, linears, opened in (("hooks", None, gate), ("packed", packed, gate), ("closed", packed, None)):
        forward = RowForward(target, adapter.mask_embeddings, opened, linears)
        decoder = Decoder(forward, "fused", 3, TokenLaw(greedy=True), 8, torch.empty(0, dtype=torch.long))
        with torch.no_grad(), monkeypatch.context() as patched:
            if linears is not None:
                patched.setattr(torch.nn.functional, "linear", None)
            seen[name] = decoder._prefill.logits(padded, lengths, SlotCache(target.num_layers, 40, 3))
    spread = seen["hooks"].std()
    assert (seen["packed"] - seen["hooks"]).abs().max() / spread < 1e-3
    assert torch.equal(seen["packed"][:, 0], seen["closed"][:, 0])
    assert (seen["packed"] - seen["closed"])[:, 1:].abs().amax(dim=(1, 2)).min() / spread > 0.1


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("mode", ["plain", "fused"])
@pytest.mark.parametrize("change", ["pruned", "normed", "sparse"])
def test_weights_that_a_layer_makes_before_it_runs_are_those_of_now(change, mode):
    model = tiny_model("llama", dtype=torch.float32)
    layer, rows = model.model.layers[0].mlp.down_proj, prompts(61, (6, 2))
    if change == "pruned":
        prune.random_unstructured(layer, "weight", 0.3)
    elif change == "normed":
        hook = layer.register_forward_pre_hook(lambda module, args: setattr(module, "weight", module.made * 2))
        layer.made = layer.weight.detach().clone()
        del layer._parameters["weight"]
        layer.weight = layer.made
        assert hook.id in layer._forward_pre_hooks
    ours = SelfSpeculativeModel(model, None, make_adapter(model, 3, lora_rank=2))
    ours.generate(rows, max_new_tokens=5, mode=mode)
    for _ in range(2):
        if change == "pruned":
            layer.weight_orig.data.mul_(-2)
        elif change == "normed":
            layer.made = -2 * layer.made
        else:
            dense = layer.weight.data.to_dense() if layer.weight.layout == torch.sparse_csr else layer.weight.data
            layer.weight = torch.nn.Parameter((-2 * dense).to_sparse_csr(), requires_grad=False)
        found = ours.generate(rows, max_new_tokens=5, mode=mode).token_ids  # before anything else runs the layer
        assert found == [plain_generate(model, row, 5) for row in rows]
