"""The gated LoRA against PEFT's own loader and forward, in float64, on tiny random models."""

import copy
import threading
import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from pardec.adapters.adapter import Adapter, AdapterMetadata, BaseReference
from pardec.adapters.files import load_adapter, save_adapter
from pardec.adapters.gated_lora import LoraGate, LoraWeights
from pardec.target.fingerprint import fingerprint
from pardec.training.peft_lora import inject_lora, lora_enabled, lora_weights

R, NUM_REAL = 9, 4
MASK_ROWS = slice(NUM_REAL, R)


def make_gpt2(dtype=torch.float64):
    """Its linear layers are transformers' Conv1D, which keep [in, out]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = GPT2Config(
            vocab_size=64, n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
            initializer_range=0.2,
        )  # fmt: skip
        return GPT2LMHeadModel(config).to(dtype).eval().requires_grad_(False)


def random_lora(base, *, r=4, alpha=8.0, target_modules: str | list[str] = "all-linear", seed=0):
    """A LoRA whose second half, zero at first, is random, injected into `base`."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out", category=UserWarning)  # has a test of its own
        torch.manual_seed(seed)
        peft_model = inject_lora(base, r=r, alpha=alpha, target_modules=target_modules)
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
    return peft_model


def save_lora(base, weights, folder):
    """Saved as an adapter's LoRA is; returns the folder that PEFT reads."""
    metadata = AdapterMetadata(
        num_speculative_tokens=2, base=BaseReference(name="random"), fingerprint=fingerprint(base, None)
    )
    save_adapter(Adapter(torch.zeros(2, 32), metadata, weights), folder)
    return folder / "lora"


def load_with_peft(base, path):
    """The base wrapped by PEFT's own loader, the LoRA on at every row."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out", category=UserWarning)
        return peft.PeftModel.from_pretrained(base, str(path)).eval()


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def family(request, make_llama):
    return {"llama": make_llama, "gpt2": make_gpt2}[request.param]


@pytest.fixture(scope="module")
def trained(family, tmp_path_factory):
    """An untouched base, the LoRA read back from disk, and the base wrapped by PEFT's own loader."""
    base, folder = family(), tmp_path_factory.mktemp("adapter")
    weights = lora_weights(random_lora(family()))
    path = save_lora(base, weights, folder)
    reloaded = load_adapter(folder).lora
    assert reloaded is not None
    oracle = load_with_peft(family(), path)
    return SimpleNamespace(base=base, weights=reloaded, oracle=oracle, make=family)


@pytest.fixture
def ids():
    return torch.randint(0, 64, (3, R), generator=torch.Generator().manual_seed(2))


def run(model, ids, visible=None):
    """Logits; `visible`, [R, R] bool, replaces causality."""
    mask = None if visible is None else visible.expand(ids.shape[0], 1, -1, -1)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def gated(model, gate, ids, rows, visible=None):
    with gate.attached(), gate.open(rows, *ids.shape):
        return run(model, ids, visible)


def peft_at_rows(oracle, ids, is_mask_token, visible=None):
    """PEFT's own forward with the LoRA silenced at every row that is not a mask token, [B, R]."""
    handles = [
        module.register_forward_hook(lambda m, args, out: out * is_mask_token.view(*out.shape[:-1], 1))
        for name, module in oracle.named_modules()
        if name.endswith("lora_A.default")
    ]
    try:
        return run(oracle, ids, visible)
    finally:
        for handle in handles:
            handle.remove()


def num_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------- the gate and PEFT agree


@pytest.mark.parametrize("batch", [1, 3])
def test_open_on_all_rows_it_is_the_lora_that_peft_loads(trained, ids, batch):
    ids = ids[:batch]
    expected = run(trained.oracle, ids)
    gate = LoraGate(trained.base, trained.weights)
    close(gated(trained.base, gate, ids, slice(0, R)), expected)
    close(gated(trained.base, gate, ids, torch.arange(R).expand(batch, -1)), expected)
    assert (expected - run(trained.base, ids)).abs().max() > 0.1


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("rows", [MASK_ROWS, slice(R - 1, R), slice(0, 2)])
def test_a_slice_and_an_index_open_the_same_rows(trained, ids, batch, rows):
    ids = ids[:batch]
    is_mask_token = torch.zeros(batch, R)
    is_mask_token[:, rows] = 1
    expected = peft_at_rows(trained.oracle, ids, is_mask_token)
    gate = LoraGate(trained.base, trained.weights)
    close(gated(trained.base, gate, ids, rows), expected)
    close(gated(trained.base, gate, ids, torch.arange(R)[rows].expand(batch, -1)), expected)


def test_a_batch_is_its_rows_one_by_one(trained, ids):
    gate = LoraGate(trained.base, trained.weights)
    together = gated(trained.base, gate, ids, MASK_ROWS)
    for b in range(3):
        close(gated(trained.base, gate, ids[b : b + 1], MASK_ROWS), together[b : b + 1])


def test_an_index_may_differ_from_row_to_row(trained, ids):
    """As in prefill, where prompts of different lengths have their mask rows at different places."""
    rows = torch.tensor([[2, 3], [7, 8], [0, 5]])
    expected = peft_at_rows(trained.oracle, ids, torch.zeros(3, R).scatter(1, rows, 1.0))
    gate = LoraGate(trained.base, trained.weights)
    close(gated(trained.base, gate, ids, rows), expected)
    for b in range(3):
        close(gated(trained.base, gate, ids[b : b + 1], rows[b : b + 1]), expected[b : b + 1])


def test_the_gate_reads_the_layers_below_peft_in_training(trained, ids):
    """Measured during training: the base is wrapped by PEFT, with its LoRA off."""
    wrapped = trained.make()
    random_lora(wrapped, seed=9)
    gate = LoraGate(wrapped, trained.weights)
    expected = gated(trained.base, LoraGate(trained.base, trained.weights), ids, MASK_ROWS)
    assert torch.equal(gated(wrapped, gate, ids, MASK_ROWS), expected)


def test_rank_stabilised_loras_are_scaled_as_peft_does(make_llama, ids, tmp_path):
    weights = lora_weights(random_lora(make_llama(), r=4, alpha=8.0))
    stabilised = LoraWeights(weights.config | {"use_rslora": True}, weights.tensors)
    assert stabilised.scaling == 8.0 / 2.0
    base = make_llama()
    oracle = load_with_peft(make_llama(), save_lora(base, stabilised, tmp_path))
    close(gated(base, LoraGate(base, stabilised), ids, slice(0, R)), run(oracle, ids))


def test_alpha_need_not_divide_by_the_rank(make_llama, ids, tmp_path):
    base, weights = make_llama(), lora_weights(random_lora(make_llama(), r=3, alpha=1.0))
    oracle = load_with_peft(make_llama(), save_lora(base, weights, tmp_path))
    out = gated(base, LoraGate(base, weights), ids, slice(0, R))
    torch.testing.assert_close(out, run(oracle, ids), rtol=1e-6, atol=1e-6)  # the factor is rounded to float32


def test_modules_that_see_a_flattened_batch_are_gated_too():
    """Some models reshape to [B * R, D] before their linear layers."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 5).double().requires_grad_(False)

        def forward(self, x):
            return self.linear(x.flatten(0, 1)).view(*x.shape[:-1], -1)

    generator = torch.Generator().manual_seed(4)
    model, x = Flat(), torch.randn(2, 7, 6, generator=generator).double()
    a, b = torch.randn(3, 6, generator=generator), torch.randn(5, 3, generator=generator)
    weights = toy_weights({"linear.lora_A": a, "linear.lora_B": b}, r=3, lora_alpha=6)
    expected = model(x)
    before = expected.clone()
    expected[:, 4:] += 2 * x[:, 4:] @ a.double().T @ b.double().T
    gate = LoraGate(model, weights)
    for rows in (slice(4, 7), torch.tensor([[4, 5, 6]] * 2)):
        with gate.attached(), gate.open(rows, 2, 7):
            close(model(x), expected)
    with (
        gate.attached(),
        gate.open(slice(4, 7), 2, 8),
        pytest.raises(ValueError, match=r"\(2, 8\).*found \(14, 6\)"),
    ):
        model(x)
    assert torch.equal(model(x), before)


# ---------------------------------------------------------------------- real rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("as_index", [False, True], ids=["slice", "index"])
def test_real_rows_are_bitwise_those_of_the_base(family, ids, dtype, batch, as_index):
    """In a forward of the same rows whose mask hides the mask rows from the real ones."""
    base, ids = family(dtype), ids[:batch]
    weights = lora_weights(random_lora(family(dtype)))
    visible = torch.ones(R, R, dtype=torch.bool).tril()
    rows = torch.arange(R)[MASK_ROWS].expand(batch, -1) if as_index else MASK_ROWS
    plain, out = run(base, ids, visible), gated(base, LoraGate(base, weights), ids, rows, visible)
    assert torch.equal(out[:, :NUM_REAL], plain[:, :NUM_REAL])
    assert (out[:, NUM_REAL:] != plain[:, NUM_REAL:]).any(dim=-1).all()


def test_mask_rows_see_each_other_through_the_lora_and_real_rows_do_not(trained, ids):
    """The mask rows' inputs may change too: real rows stay what they are."""
    visible = torch.ones(R, R, dtype=torch.bool).tril()
    visible[:NUM_REAL, NUM_REAL:] = False
    gate, other = LoraGate(trained.base, trained.weights), ids.clone()
    other[:, NUM_REAL:] = (other[:, NUM_REAL:] + 1) % 64
    one, two = (gated(trained.base, gate, x, MASK_ROWS, visible) for x in (ids, other))
    assert torch.equal(one[:, :NUM_REAL], two[:, :NUM_REAL])
    is_mask_token = (torch.arange(R) >= NUM_REAL).double().expand(3, -1)
    close(one, peft_at_rows(trained.oracle, ids, is_mask_token, visible))


# ---------------------------------------------------------------------- closed and detached


def test_closed_or_detached_it_leaves_the_base_bitwise_alone(trained, ids):
    plain, state = run(trained.base, ids), copy.deepcopy(trained.base.state_dict())
    gate = LoraGate(trained.base, trained.weights)
    assert num_hooks(trained.base) == 0
    assert torch.equal(run(trained.base, ids), plain)
    with gate.attached():
        assert num_hooks(trained.base) == len(trained.weights.pairs())
        assert torch.equal(run(trained.base, ids), plain)  # attached, closed
        with gate.open(MASK_ROWS, *ids.shape):
            assert not torch.equal(run(trained.base, ids), plain)
        assert torch.equal(run(trained.base, ids), plain)  # closed again
    assert num_hooks(trained.base) == 0
    with gate.open(MASK_ROWS, *ids.shape):
        assert torch.equal(run(trained.base, ids), plain)  # open, but not attached
    assert all(torch.equal(value, state[key]) for key, value in trained.base.state_dict().items())


def test_an_exception_leaves_no_hooks_and_a_closed_gate(trained, ids):
    plain, gate = run(trained.base, ids), LoraGate(trained.base, trained.weights)
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        gate.attached(),
        gate.open(MASK_ROWS, *ids.shape),
    ):
        raise RuntimeError("in the middle")
    assert num_hooks(trained.base) == 0
    with gate.attached():
        assert torch.equal(run(trained.base, ids), plain)


def test_an_exception_inside_an_open_gate_closes_it(trained, ids):
    plain, gate = run(trained.base, ids), LoraGate(trained.base, trained.weights)
    with gate.attached():
        with pytest.raises(KeyError), gate.open(MASK_ROWS, *ids.shape):
            raise KeyError
        assert torch.equal(run(trained.base, ids), plain)


def test_layers_that_apply_the_lora_themselves_have_no_hooks(trained, ids):
    """What `but` leaves out, `add_stacked` adds: together they are the LoRA."""
    base, gate, gated_modules = trained.base, LoraGate(trained.base, trained.weights), []
    with gate.attached():
        gated_modules += [module for module in base.modules() if module._forward_hooks]
    own = gated_modules[::2]
    with gate.attached(but=own):
        assert [module for module in base.modules() if module._forward_hooks] == gated_modules[1::2]
        with gate.attached():  # contexts may overlap, as with a prefill while a stream is open
            assert num_hooks(base) == len(gated_modules)
        assert num_hooks(base) == len(gated_modules) - len(own)
    assert num_hooks(base) == 0

    def add(module, args, output):
        a, b = gate.stacked([module])
        wide = torch.cat([output, args[0] @ a.T], dim=-1)
        gate.add_stacked(wide, b)
        return wide[..., : output.shape[-1]]

    expected = gated(base, gate, ids, MASK_ROWS)
    handles = [module.register_forward_hook(add) for module in own]
    with torch.no_grad(), gate.attached(but=own), gate.open(MASK_ROWS, *ids.shape):
        close(run(base, ids), expected)
    assert not torch.equal(run(base, ids), expected)
    for handle in handles:
        handle.remove()


def test_stacked_pairs_are_those_of_the_layers_side_by_side():
    base = nn.Module()
    widths = {"q": 6, "k": 4, "v": 5}
    for name, width in widths.items():
        setattr(base, name, nn.Linear(8, width, dtype=torch.float64))
    tensors = {}
    for name in ("q", "v"):
        # powers of two, so that scaling them in float32 rounds nothing
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, 8)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(widths[name], 2).sign() / 4
    gate = LoraGate(base, LoraWeights({"peft_type": "LORA", "r": 2, "lora_alpha": 6}, tensors))
    a, b = gate.stacked([base.q, base.k, base.v])
    assert a.dtype == b.dtype == torch.float64
    assert a.shape == (4, 8)
    assert b.shape == (4, 15)
    x = torch.randn(7, 8, dtype=torch.float64)
    parts = []
    for name, width in widths.items():
        pair = [tensors.get(f"base_model.model.{name}.lora_{half}.weight") for half in "AB"]
        parts.append(torch.zeros(7, width) if pair[0] is None else 3 * x @ pair[0].double().T @ pair[1].double().T)
    close(x @ a.T @ b, torch.cat(parts, dim=1))
    assert gate.stacked([base.k]) is None
    outputs = torch.randn(1, 7, 15, dtype=torch.float64)
    low = (x @ a.T)[None]
    closed, opened = torch.cat([outputs, low], dim=2), torch.cat([outputs, low], dim=2)
    gate.add_stacked(closed, b)
    assert torch.equal(closed[..., :15], outputs)
    with gate.open(slice(5, 7), 1, 7):
        gate.add_stacked(opened, b)
    assert torch.equal(opened[:, :5, :15], outputs[:, :5])
    assert torch.equal(opened[..., 15:], low)
    close(opened[:, 5:, :15], outputs[:, 5:] + torch.cat(parts, dim=1)[None, 5:])


def test_other_threads_find_the_gate_closed(trained, ids):
    gate, base = LoraGate(trained.base, trained.weights), trained.base
    before, seen = run(base, ids), []
    with gate.attached(), gate.open(MASK_ROWS, *ids.shape):
        thread = threading.Thread(target=lambda: seen.append(run(base, ids)))
        thread.start()
        thread.join()
        assert not torch.equal(run(base, ids), before)
    assert torch.equal(seen[0], before)


def test_the_gate_can_be_attached_again(trained, ids):
    gate = LoraGate(trained.base, trained.weights)
    first = gated(trained.base, gate, ids, MASK_ROWS)
    assert torch.equal(gated(trained.base, gate, ids, MASK_ROWS), first)


def test_rows_that_do_not_fit_the_forward_are_refused(trained, ids):
    gate = LoraGate(trained.base, trained.weights)
    with gate.attached(), gate.open(MASK_ROWS, 3, R + 1), pytest.raises(ValueError, match=rf"\(3, {R + 1}\)"):
        run(trained.base, ids)


# ---------------------------------------------------------------------- training


def test_layers_that_give_more_than_a_tensor_are_refused(make_llama, ids):
    class Router(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    base = make_llama()
    inject = random_lora(copy.deepcopy(base), target_modules=["up_proj"])
    weights = lora_weights(inject)
    for layer in base.model.layers:
        layer.mlp.up_proj.__class__ = Router
    gate, R = LoraGate(base, weights), ids.shape[1]
    with (
        gate.attached(),
        gate.open(slice(1, R), ids.shape[0], R),
        pytest.raises(ValueError, match="lora: expected layers that give a tensor, found a Router that gives more"),
    ):
        base(ids)


def test_injected_but_off_the_base_is_bitwise_unchanged(family, ids):
    base = family()
    plain = run(base, ids)
    random_lora(base)
    assert torch.equal(run(base, ids), plain)


def test_injecting_says_nothing_about_layers_that_keep_their_weights_transposed():
    """PEFT notices Conv1D and does the right thing; a warning (here an error) would only worry people."""
    inject_lora(make_gpt2(), r=2, alpha=4.0, target_modules="all-linear")


def test_a_fresh_lora_changes_nothing_even_when_on(make_llama, ids):
    """Its second half starts at 0."""
    base = make_llama()
    plain = run(base, ids)
    inject_lora(base, r=2, alpha=4.0, target_modules="all-linear")
    with lora_enabled(base):
        assert torch.equal(run(base, ids), plain)


def test_switched_on_it_is_the_lora_that_decoding_adds_to_every_row(family, ids):
    base = family()
    plain, peft_model = run(base, ids), random_lora(base)
    gate = LoraGate(base, lora_weights(peft_model))
    expected = gated(base, gate, ids, slice(0, R))
    with lora_enabled(base):
        on = run(base, ids)
    # trained in float64 here and saved in float32
    torch.testing.assert_close(on, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(run(base, ids), plain)
    with pytest.raises(KeyError), lora_enabled(base):
        raise KeyError
    assert torch.equal(run(base, ids), plain)


def test_switching_does_not_change_what_is_trained(make_llama):
    base = make_llama()
    random_lora(base)

    def trainable():
        return {name for name, parameter in base.named_parameters() if parameter.requires_grad}

    before = trainable()
    assert before == {name for name, _ in base.named_parameters() if "lora_" in name}
    with lora_enabled(base):
        assert trainable() == before
    assert trainable() == before


def test_only_the_lora_is_trained(make_llama, ids):
    base = make_llama()
    random_lora(base)
    with lora_enabled(base):
        base(input_ids=ids, use_cache=False).logits.square().mean().backward()
    for name, parameter in base.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("lora_" in name), name


def test_only_the_named_modules_are_wrapped(make_llama):
    weights = lora_weights(random_lora(make_llama(), target_modules=["q_proj", "down_proj"]))
    assert set(weights.pairs()) == {
        f"model.layers.{n}.{name}" for n in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert weights.config["target_modules"] == ["down_proj", "q_proj"]
    for name, (a, b) in weights.pairs().items():
        assert a.shape == (4, 48 if "down" in name else 32)
        assert b.shape == (32, 4)


def test_all_linear_leaves_the_output_layer_out(make_llama):
    names = set(lora_weights(random_lora(make_llama())).pairs())
    assert {name.rpartition(".")[2] for name in names} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


def test_target_modules_that_mean_nothing_are_refused(make_llama):
    with pytest.raises(ValueError, match="no_such_proj"):
        inject_lora(make_llama(), r=2, alpha=4.0, target_modules=["no_such_proj"])


def test_the_copied_weights_do_not_change_with_training(make_llama):
    peft_model = random_lora(make_llama(torch.float32))
    weights = lora_weights(peft_model)
    before = {key: tensor.clone() for key, tensor in weights.tensors.items()}
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.add_(1)
    assert all(torch.equal(weights.tensors[key], before[key]) for key in before)
    assert all(not t.requires_grad and t.dtype == torch.float32 for t in weights.tensors.values())


# ---------------------------------------------------------------------- refusals


def toy_weights(halves, **config):
    tensors = {f"base_model.model.{name}.weight": tensor for name, tensor in halves.items()}
    return LoraWeights({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config, tensors)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "expected peft_type LORA, found 'IA3'"),
        ({"peft_type": None}, "expected peft_type LORA, found None"),
        ({"use_dora": True}, "expected use_dora=False, found True"),
        ({"lora_bias": True}, "expected lora_bias=False, found True"),
        ({"bias": "all"}, "expected bias='none', found 'all'"),
        ({"rank_pattern": {"q_proj": 8}}, r"expected rank_pattern=\{\}, found \{'q_proj': 8\}"),
        ({"alpha_pattern": {"q_proj": 8}}, r"expected alpha_pattern=\{\}, found \{'q_proj': 8\}"),
    ],
)
def test_loras_that_act_otherwise_are_refused(config, message):
    with pytest.raises(ValueError, match=f"lora: {message}"):
        toy_weights({}, **config)


def test_settings_that_say_the_default_are_accepted():
    weights = toy_weights({}, use_dora=False, bias="none", rank_pattern={}, alpha_pattern=None)
    assert (weights.rank, weights.scaling) == (2, 2.0)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("halves", "message"),
    [
        ({f"{Q}.lora_A": (2, 32)}, f"lora: {Q}: expected lora_A and lora_B, found only lora_A"),
        ({f"{Q}.lora_B": (32, 2)}, f"lora: {Q}: expected lora_A and lora_B, found only lora_B"),
        (
            {f"{Q}.lora_magnitude_vector": (32,)},
            r"expected names base_model\.model\.\*\.lora_A\|lora_B\.weight, found",
        ),
        ({"lm_head": (64, 32)}, r"expected names base_model\.model\.\*\.lora_A\|lora_B\.weight, found"),
        (
            {"model.layers.7.mlp.up_proj.lora_A": (2, 32), "model.layers.7.mlp.up_proj.lora_B": (48, 2)},
            r"expected modules of the base, found 'model\.layers\.7\.mlp\.up_proj'",
        ),
        (
            {"model.layers.0.mlp.lora_A": (2, 32), "model.layers.0.mlp.lora_B": (32, 2)},
            r"module model\.layers\.0\.mlp: expected a linear layer, found LlamaMLP",
        ),
        (
            {f"{Q}.lora_A": (2, 31), f"{Q}.lora_B": (32, 2)},
            rf"{Q}: expected \(32, 32\) features, found \(32, 31\)",
        ),
        (
            {f"{Q}.lora_A": (2, 32), f"{Q}.lora_B": (48, 2)},
            rf"{Q}: expected \(32, 32\) features, found \(48, 32\)",
        ),
    ],
    ids=["only-A", "only-B", "magnitude", "other-tensor", "no-module", "no-weight", "wrong-in", "wrong-out"],
)
def test_tensors_that_do_not_fit_the_base_are_refused(make_llama, halves, message):
    weights = toy_weights({name: torch.zeros(shape) for name, shape in halves.items()})
    with pytest.raises(ValueError, match=message):
        LoraGate(make_llama(), weights)


def test_in_and_out_features_cannot_be_exchanged(make_llama):
    down = "model.layers.0.mlp.down_proj"  # 48 -> 32
    weights = toy_weights({f"{down}.lora_A": torch.zeros(2, 32), f"{down}.lora_B": torch.zeros(48, 2)})
    with pytest.raises(ValueError, match=rf"{down}: expected \(32, 48\) features, found \(48, 32\)"):
        LoraGate(make_llama(), weights)


@pytest.mark.parametrize(("rank_a", "rank_b"), [(4, 4), (2, 4), (4, 2)])
def test_tensors_of_another_rank_than_the_configuration_are_refused(make_llama, rank_a, rank_b):
    """The scaling alpha / r would silently be another one; PEFT's loader refuses it too."""
    weights = toy_weights({f"{Q}.lora_A": torch.zeros(rank_a, 32), f"{Q}.lora_B": torch.zeros(32, rank_b)}, r=2)
    with pytest.raises(ValueError, match=rf"{Q}: expected rank 2, found"):
        LoraGate(make_llama(), weights)
