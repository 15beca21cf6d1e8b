"""A LoRA whose layers share the product with A where they share their input, against layers each with its own."""

import threading
from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func
from tiny_models import make_adapter, tiny_model
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from pardec.adapters.gated_lora import LoraGate, LoraWeights
from pardec.adapters.open_rows import add_beside
from pardec.decoding.prepack import PackedLinears
from pardec.decoding.rows import RowForward
from pardec.decoding.sampling import TokenLaw
from pardec.decoding.step import Decoder
from pardec.target.forward import TargetModel
from pardec.target.packed_matrix import PackedMatrix
from pardec.target.survey import survey

R, IN, OUT = 7, 6, {"q": 5, "k": 3, "v": 4}
ROWS = slice(4, R)
INDEX = torch.tensor([[2, 3], [5, 6], [0, 4]])
PRODUCTS = ("mm", "bmm", "addmm_", "baddbmm_")


class Products(TorchDispatchMode):
    """Counts the matrix products by name."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.found[name] for name in PRODUCTS)


class Layers(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        for name, width in OUT.items():
            setattr(self, name, nn.Linear(IN, width, dtype=dtype).requires_grad_(False))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.children()]


def lora_for(names: str, rank: int = 3) -> LoraWeights:
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name in names:
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, IN, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(OUT[name], rank, generator=generator)
    return LoraWeights({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}, tensors)


@pytest.fixture
def base():
    return Layers()


@pytest.fixture
def gate(base):
    return LoraGate(base, lora_for("qkv"))


def siblings_of(base: nn.Module) -> list[tuple[nn.Module, ...]]:
    return [tuple(base.children())]


def x_of(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, R, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(base, gate, x, rows, siblings=(), shape=None):
    with torch.no_grad(), gate.attached(siblings=siblings), gate.open(rows, *(shape or x.shape[:2])):
        return base(x)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- the same numbers in fewer products


@pytest.mark.parametrize("rows", [ROWS, slice(R - 1, R), INDEX], ids=["rows", "row", "index"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("with_lora", ["qkv", "qv", "k"])
def test_layers_that_share_their_input_share_the_product_with_a(base, with_lora, batch, rows):
    gate, x = LoraGate(base, lora_for(with_lora)), x_of(batch)
    rows = rows[:batch] if isinstance(rows, torch.Tensor) else rows
    with Products() as own:
        expected = run(base, gate, x, rows)
    with Products() as shared:
        close(run(base, gate, x, rows, siblings_of(base)), expected)
    assert own.total - shared.total == len(with_lora) - 1
    for name, one, plain in zip(OUT, expected, base(x), strict=True):
        assert torch.equal(one, plain) == (name not in with_lora)


def test_a_flattened_batch_shares_too(base, gate):
    x = x_of(3)
    expected = run(base, gate, x, ROWS)
    with Products() as own:
        run(base, gate, x.view(3 * R, IN), ROWS, shape=(3, R))
    with Products() as shared:
        found = run(base, gate, x.view(3 * R, IN), ROWS, siblings_of(base), shape=(3, R))
    for one, other in zip(found, expected, strict=True):
        close(one.view_as(other), other)
    assert own.total - shared.total == 2


@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_launches_eleven_products_a_layer_for_the_lora(batch):
    """q, k, v and gate, up: two products with A instead of five."""
    model = tiny_model("llama")
    target, adapter = TargetModel.wrap(model), make_adapter(model, 3, lora_rank=2)
    assert adapter.lora is not None
    assert adapter.mask_embeddings is not None
    gate, siblings = LoraGate(model, adapter.lora), survey(target).siblings
    totals, logits = [], []
    for opened, linears in ((None, None), (gate, None), (gate, PackedLinears(siblings, gate))):
        forward = RowForward(target, adapter.mask_embeddings.double(), opened, linears)
        decoder = Decoder(forward, "fused", 3, TokenLaw(greedy=True), 8, torch.empty(0, dtype=torch.long))
        with torch.no_grad(), decoder.attached():
            state = decoder.prefill([[5, 9, 2], [3, 8]][:batch])
            state.bonus, state.drafts = torch.tensor([1, 2])[:batch], torch.tensor([[4, 5, 6]] * batch)
            with Products() as products:
                logits.append(decoder.step_logits(state))
        totals.append(products.total)
    assert [total - totals[0] for total in totals[1:]] == [14 * 3, 11 * 3]
    close(logits[2], logits[1])
    assert (logits[1] - logits[0]).abs().max() > 0.1


# ---------------------------------------------------------------------- which product belongs to whom


def test_layers_that_are_given_other_inputs_answer_for_those(base, gate):
    x, y = x_of(1), x_of(1, seed=1)
    expected = {id(one): run(base, gate, one, ROWS) for one in (x, y)}
    order = ((0, x), (1, y), (2, x), (1, x), (0, y), (2, y), (0, x.clone()))
    layers = list(base.children())
    with torch.no_grad(), gate.attached(siblings=siblings_of(base)), gate.open(ROWS, 1, R):
        for n, given in order:
            close(layers[n](given), expected.get(id(given), expected[id(x)])[n])


def test_an_input_that_is_written_to_in_between_is_another_input(base, gate):
    x = x_of(1)
    before, after = run(base, gate, x, ROWS), run(base, gate, x * -2, ROWS)
    with torch.no_grad(), gate.attached(siblings=siblings_of(base)), gate.open(ROWS, 1, R):
        close(base.q(x), before[0])
        x.mul_(-2)
        close(base.k(x), after[1])
        close(base.v(x), after[2])


def test_inference_mode_gives_the_same_numbers(base, gate):
    """Its tensors do not count how often they were written to; what is made inside serves outside as well."""
    ordinary = x_of(1)
    before, after = run(base, gate, ordinary, ROWS), run(base, gate, ordinary * -2, ROWS)
    with torch.inference_mode(), gate.attached(siblings=siblings_of(base)), gate.open(ROWS, 1, R):
        x = ordinary.clone()
        close(base.q(x), before[0])
        x.mul_(-2)
        close(base.k(x), after[1])
    assert not any(stack.is_inference() for stack in gate._stacks.values())
    for one, other in zip(run(base, gate, ordinary, ROWS, siblings_of(base)), before, strict=True):
        close(one, other)


def test_autocast_gives_the_numbers_of_layers_by_themselves():
    base = Layers(torch.float32)
    gate, x = LoraGate(base, lora_for("qkv")), x_of(1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = (run(base, gate, x, ROWS, siblings) for siblings in ((), siblings_of(base)))
    assert expected[0].dtype == torch.bfloat16
    assert all(map(torch.equal, found, expected))


def test_nothing_is_kept_behind_a_forward(base, gate):
    x = x_of(1)
    run(base, gate, x, ROWS, siblings_of(base))
    here = gate._here
    assert (here.rows, here._stack, here._input, here._low) == (None,) * 4
    other = run(base, gate, x, slice(0, 2), siblings_of(base))  # the same input, opened elsewhere
    for one, expected in zip(other, run(base, gate, x, slice(0, 2)), strict=True):
        close(one, expected)


def test_threads_do_not_take_each_others_products(base, gate):
    x, y, found = x_of(1), x_of(1, seed=1), {}
    mine, expected = run(base, gate, x, ROWS), run(base, gate, y, slice(0, 2))
    with torch.no_grad(), gate.attached(siblings=siblings_of(base)), gate.open(ROWS, 1, R):
        base.q(x)

        def elsewhere():
            found["k"] = run(base, gate, y, slice(0, 2), siblings_of(base))[1]

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        with Products() as products:
            close(base.k(x), mine[1])
    close(found["k"], expected[1])
    assert products.found["mm"] == 0  # q's product has served k


def test_layers_of_which_some_apply_the_lora_themselves_share_what_is_left(base, gate):
    x = x_of(1)
    expected = run(base, gate, x, ROWS)
    hooks = gate.attached(but=[base.k], siblings=siblings_of(base))
    with torch.no_grad(), hooks, gate.open(ROWS, 1, R), Products() as products:
        found = base(x)
    close(found[0], expected[0])
    close(found[2], expected[2])
    assert torch.equal(found[1], base.k(x))
    assert (products.found["mm"], products.found["addmm_"]) == (1, 2)


@pytest.mark.parametrize("batch", [1, 3])
def test_compiled_layers_keep_their_own_products_and_are_compiled_once(base, gate, batch):
    """What is remembered of one input must not become part of the code."""
    compiled = []

    def counting(module, inputs):
        compiled.append(module)
        return module.forward

    step = torch.compile(gate.around(base.forward, ROWS), backend=counting, fullgraph=True)
    with torch.no_grad(), gate.attached(siblings=siblings_of(base)):
        for seed in range(3):
            x = x_of(batch, seed)
            found = step(x)
            with gate.open(ROWS, batch, R):
                expected = base(x)
            for one, other in zip(found, expected, strict=True):
                close(one, other)
    assert len(compiled) == 1


def side_by_side(base: nn.Module, gate: LoraGate):
    """The layers as packed weights run them: one product, A's among it."""
    layers = list(base.children())
    a, b = gate.stacked(layers)
    weight, bias = torch.cat([*(one.weight for one in layers), a]), torch.cat([*(one.bias for one in layers)])
    bias = torch.cat([bias, bias.new_zeros(a.shape[0])])
    return lambda x: gate.add_stacked(nn.functional.linear(x, weight, bias), b).split(list(OUT.values()), dim=-1)


@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_compiled_code_neither_copies_outputs_nor_writes_into_them(base, gate, batch, packed, flattened):
    """In place it would make room for each sum before its product; as a sum of its own its readers make it."""
    operations = Counter()

    def look(module, inputs):
        operations.update(node.target.__name__.partition(".")[0] for node in module.graph.nodes if node.op[0] == "c")
        return make_boxed_func(module.forward)

    forward, x = side_by_side(base, gate) if packed else base.forward, x_of(batch)

    def run_layers(x):
        return [one.view(batch, R, -1) for one in forward(x.view(-1, IN) if flattened else x)]

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=look)
    step = torch.compile(gate.around(run_layers, ROWS), backend=backend, fullgraph=True, dynamic=False)
    with torch.no_grad(), gate.attached(but=list(base.children()) if packed else (), siblings=siblings_of(base)):
        found = step(x)
        assert not [name for name in operations if "copy" in name or "scatter" in name or "baddbmm" in name]
        assert operations["add"] == operations["constant_pad_nd"] == (1 if packed else 3)
        assert operations["addmm"] == (1 if packed else 3)  # of layers and their biases
        with gate.open(ROWS, batch, R):
            for one, other in zip(found, run_layers(x), strict=True):
                close(one, other)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "is_packed"),
    [(torch.float64, False), (torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True)],
)
def test_a_product_lands_on_the_open_rows_beside_it(batch, indexed, dtype, is_packed):
    if is_packed and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU packs no bfloat16")
    torch.manual_seed(2)
    wide, b = torch.randn(batch, R, 5 + 3).to(dtype), torch.randn(3, 5).to(dtype)
    rows = [row.tolist() for row in INDEX[:batch]] if indexed else [list(range(4, R))] * batch
    expected, found = wide.double(), wide.clone()
    for sequence, open_rows in enumerate(rows):
        for row in open_rows:
            for column in range(5):
                added = sum(expected[sequence, row, 5 + i] * b[i, column].double() for i in range(3))
                expected[sequence, row, column] += added
    add_beside(found, PackedMatrix(b.T.contiguous(), None) if is_packed else b, INDEX[:batch] if indexed else ROWS)
    assert torch.equal(found[..., 5:], wide[..., 5:])
    if dtype != torch.bfloat16:
        torch.testing.assert_close(found, expected.to(dtype))
    elif is_packed and not indexed:  # rounded once
        assert torch.equal(found, expected.to(dtype))
    else:
        torch.testing.assert_close(found.double(), expected, rtol=2**-6, atol=2**-6)
