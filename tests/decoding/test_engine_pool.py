"""Engines are lent to one caller at a time, and given up when what they were made for has changed."""

import itertools
from contextlib import ExitStack
from copy import copy, deepcopy

import pytest
import torch
from greedy_oracle import plain_generate, prompts
from peft import LoraConfig
from recorded_steps import rerun, tape
from tiny_models import make_adapter, tiny_model
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from pardec.decoding import engine_pool
from pardec.decoding.engine import Engine
from pardec.decoding.engine_pool import EnginePool, signature
from pardec.decoding.kept_cache import KeptCache
from pardec.model import SelfSpeculativeModel
from pardec.target.forward import UnsupportedModelError

K = 3
V = 61
NEW = 12


class Idle:
    """Stands for an engine."""


# ---------------------------------------------------------------------- the pool alone


def test_an_engine_is_lent_to_one_caller_at_a_time():
    pool, engine = EnginePool(), Idle()
    assert pool.take("a") is None
    pool.give_back("a", engine)
    assert pool.take("b") is None
    assert pool.take("a") is engine
    assert pool.take("a") is None
    pool.give_back("a", engine)
    assert pool.take("a") is engine


def test_the_engine_that_was_used_least_recently_goes_first(monkeypatch):
    monkeypatch.setattr(engine_pool, "_MAX_IDLE", 3)
    pool, engines = EnginePool(), {key: Idle() for key in "abcde"}
    for key in "abc":
        pool.give_back(key, engines[key])
    pool.give_back("a", pool.take("a"))  # used again
    pool.give_back("d", engines["d"])
    assert pool.take("b") is None
    pool.give_back("e", engines["e"])
    assert pool.take("c") is None
    assert [pool.take(key) for key in "ade"] == [engines[key] for key in "ade"]


def test_there_is_room_for_as_many_engines_as_are_asked_for_meanwhile(monkeypatch):
    monkeypatch.setattr(engine_pool, "_MAX_IDLE", 2)
    pool, engines = EnginePool(), {key: Idle() for key in "abcd"}
    with pool.room_for(4):
        for key in "abcd":
            pool.give_back(key, engines[key])
        for key in "abcd":
            assert pool.take(key) is engines[key]
            pool.give_back(key, engines[key])
        with pool.room_for(1):  # no fewer than otherwise
            pass
        assert pool.take("a") is engines["a"]
    assert [pool.take(key) is not None for key in "bcd"] == [False, True, True]


def test_rooms_of_several_callers_may_end_in_any_order(monkeypatch):
    monkeypatch.setattr(engine_pool, "_MAX_IDLE", 1)
    pool = EnginePool()

    def kept() -> int:
        for key in "abcd":
            pool.give_back(key, Idle())
        return sum(pool.take(key) is not None for key in "abcd")

    with ExitStack() as first, ExitStack() as second:
        first.enter_context(pool.room_for(2))
        second.enter_context(pool.room_for(3))
        assert kept() == 3
        first.close()
        assert kept() == 3
        second.close()
        assert kept() == 1


# ---------------------------------------------------------------------- a model that keeps engines


@pytest.fixture(params=[rerun, tape])
def capturing(request, monkeypatch):
    """Makes models that capture, as on CUDA; gives the function that makes one of a base, and the engines made."""
    monkeypatch.setitem(Engine.__init__.__kwdefaults__, "recorder", request.param)
    made: list[Engine] = []
    original = Engine.__init__

    def noted(self, *args, **options):
        original(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(Engine, "__init__", noted)

    def wrap(base) -> SelfSpeculativeModel:
        ours = SelfSpeculativeModel(base, None, make_adapter(base, K, lora_rank=2))
        ours.capture = True
        return ours

    return wrap, made


def test_calls_of_one_kind_share_an_engine_and_others_do_not(capturing):
    wrap, made = capturing
    base = tiny_model("llama")
    ours, rows = wrap(base), prompts(V, (5, 2))
    for options in ({}, {"max_new_tokens": 4}):
        ours.generate(rows, **{"max_new_tokens": NEW} | options)
    ours.generate(rows[:1], max_new_tokens=NEW, num_return_sequences=2)  # a batch of two again
    assert len(made) == 1
    kinds = [
        {"temperature": 0.7},
        {"temperature": 0.8},
        {"temperature": 0.8, "top_k": 5},
        {"temperature": 0.8, "top_k": 6},
        {"temperature": 0.8, "top_k": 6, "verification": "block"},
        {"mode": "plain"},
        {"mode": "two_pass"},
        {"num_speculative_tokens": 2},
        {"block_lengths": (2, 1, 0)},
        {"num_return_sequences": 2},
    ]
    for number, options in enumerate(kinds, 2):
        first = ours.generate(rows, max_new_tokens=4, seed=1, **options).token_ids
        assert len(made) == number
        assert ours.generate(rows, max_new_tokens=4, seed=1, **options).token_ids == first
        assert len(made) == number


def test_numbers_of_eos_ids_and_the_ids_themselves_may_change(capturing):
    wrap, _ = capturing
    base = tiny_model("llama")
    ours, row = wrap(base), prompts(V, (5,))[0]
    reference = plain_generate(base, row, NEW)
    for eos in (None, reference[3], reference[5], [reference[5], reference[2]], [reference[1], 60], None):
        base.generation_config.eos_token_id = eos
        expected = plain_generate(base, row, NEW)
        assert ours.generate([row], max_new_tokens=NEW).token_ids == [expected]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"mode": "plain"}], ids=str)
def test_streams_that_are_read_in_turn_get_their_own_tokens(capturing, options):
    wrap, made = capturing
    ours, rows = wrap(tiny_model("gemma3-mixed-windows")), prompts(V, (5, 9))
    alone = [[c.token_ids for c in ours.stream(row, max_new_tokens=NEW, **options)] for row in rows]
    assert len(made) == 1
    streams = [ours.stream(row, max_new_tokens=NEW, **options) for row in rows]
    found = [[], []]
    for _ in range(NEW):
        for stream, chunks in zip(streams, found, strict=True):
            chunk = next(stream, None)
            chunks += [] if chunk is None else [chunk.token_ids]
    assert found == alone
    assert len(made) == 2  # one for each that is open


def test_a_stream_left_half_way_gives_its_engine_back(capturing):
    wrap, made = capturing
    base = tiny_model("llama")
    ours, row = wrap(base), prompts(V, (5,))[0]
    stream = ours.stream(row, max_new_tokens=NEW)
    next(stream)
    next(stream)
    stream.close()
    assert ours.generate([row], max_new_tokens=NEW).token_ids == [plain_generate(base, row, NEW)]
    assert len(made) == 1
    for _ in ours.stream(row, max_new_tokens=NEW):
        break  # the generator is closed when it is collected
    assert ours.generate([row], max_new_tokens=NEW).token_ids == [plain_generate(base, row, NEW)]
    assert len(made) == 1


def test_an_engine_whose_call_failed_is_not_used_again(capturing, monkeypatch):
    wrap, made = capturing
    base = tiny_model("llama")
    ours, row = wrap(base), prompts(V, (5,))[0]
    stream = ours.stream(row, max_new_tokens=NEW)
    next(stream)

    def broken(self, state):
        raise KeyError

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_step", broken)
        with pytest.raises(KeyError):
            list(stream)
    assert ours.generate([row], max_new_tokens=NEW).token_ids == [plain_generate(base, row, NEW)]
    assert len(made) == 2


def replace_weight(base):
    up = base.model.layers[0].mlp.up_proj
    up.weight = torch.nn.Parameter(-up.weight, requires_grad=False)


def change_weight_in_place(base):
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight.mul_(-2)


def replace_module(base):
    old = base.model.layers[1].mlp
    base.model.layers[1].mlp = tiny_model("llama", seed=7).model.layers[1].mlp
    assert base.model.layers[1].mlp is not old


def put_a_copy_of_another_layer_in_place_of_a_layer(base):
    layer = deepcopy(base.model.layers[0])  # with a configuration of its own
    layer.self_attn.layer_idx = 1
    base.model.layers[1] = layer


def add_hook(base):
    base.model.layers[0].mlp.register_forward_hook(lambda module, args, output: -output)


def add_pre_hook(base):
    base.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (-args[0],))


def replace_forward(base):
    mlp = base.model.layers[0].mlp
    mlp.forward = lambda x: -type(mlp).forward(mlp, x)


class ByLargest(torch.nn.Module):
    """A layer whose numbers depend on what else is run with a row, as with one scale for all inputs."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x / x.abs().max())


class LargestScaled(torch.nn.Parameter):
    """Likewise by a weight of a class of its own, in the module that was there."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if function is torch.nn.functional.linear:
                args = (args[0] / args[0].abs().max(), *args[1:])
            return function(*args, **(kwargs or {}))


def mix_rows_by_a_module(base):
    base.model.layers[0].mlp = ByLargest(base.model.layers[0].mlp)


def mix_rows_by_a_weight(base):
    up = base.model.layers[0].mlp.up_proj
    up.weight = LargestScaled(up.weight.detach(), requires_grad=False)


@pytest.mark.parametrize("change", [mix_rows_by_a_module, mix_rows_by_a_weight])
@pytest.mark.parametrize("mode", ["plain", "fused"])
def test_a_base_that_can_no_longer_be_decoded_exactly_is_refused(change, mode):
    """What `load` sees of a base is seen again when it has been given other modules or kinds of weights."""
    base = tiny_model("llama")
    before = dict(base.model.layers[0].mlp.named_parameters()), base.model.layers[0].mlp
    ours = SelfSpeculativeModel(base, None, make_adapter(base, K, lora_rank=2))
    row = [5, 9, 2, 7]
    expected = ours.generate([row], max_new_tokens=NEW, mode=mode).token_ids
    change(base)
    for _ in range(2):  # not only the first time
        with pytest.raises(UnsupportedModelError, match=r"^llama: expected .*, found "):
            ours.generate([row], max_new_tokens=NEW, mode=mode)
    weights, base.model.layers[0].mlp = before
    base.model.layers[0].mlp.up_proj.weight = weights["up_proj.weight"]
    assert ours.generate([row], max_new_tokens=NEW, mode=mode).token_ids == expected


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_under_autocast_a_changed_base_is_looked_at_in_its_own_dtype(family):
    """Numbers of bfloat16 are not those that float32 may deviate by."""
    base = tiny_model(family, dtype=torch.float32)
    ours = SelfSpeculativeModel(base, None, make_adapter(base, K, lora_rank=2))
    ours.generate([[5, 9, 2, 7]], max_new_tokens=NEW)
    (name, first), *_ = [(n, m) for n, m in base.named_modules() if n.endswith("mlp")]
    base.set_submodule(name, deepcopy(first))
    with torch.autocast("cpu", torch.bfloat16):
        assert len(ours.generate([[5, 9, 2, 7]], max_new_tokens=NEW).token_ids[0]) == NEW


def test_a_base_that_drops_its_cache_is_refused_in_one_line():
    base = tiny_model("llama")
    ours = SelfSpeculativeModel(base, None, make_adapter(base, K, lora_rank=2))
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable  # older name
    enable()
    row = [5, 9, 2, 7]
    assert ours.generate([row], max_new_tokens=NEW).token_ids == [plain_generate(base, row, NEW)]
    base.train()
    with pytest.raises(ValueError, match=r"^base: expected no gradient checkpointing in training mode, found both; "):
        ours.generate([row], max_new_tokens=NEW)


CHANGES = [
    replace_weight,
    change_weight_in_place,
    replace_module,
    put_a_copy_of_another_layer_in_place_of_a_layer,
    add_hook,
    add_pre_hook,
    replace_forward,
]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_base_between_two_calls_are_honoured(capturing, change):
    wrap, _ = capturing
    base = tiny_model("llama")
    honours(wrap(base), base, change)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_base_between_two_calls_are_honoured_where_nothing_is_captured(change):
    base = tiny_model("llama")
    honours(SelfSpeculativeModel(base, None, make_adapter(base, K, lora_rank=2)), base, change)


def honours(ours, base, change):
    """Before and after the change calls give what the base itself then gives."""
    rows = prompts(V, (5, 2))
    before = [plain_generate(base, row, NEW) for row in rows]
    for mode in ("fused", "plain"):
        assert ours.generate(rows, max_new_tokens=NEW, mode=mode).token_ids == before
    change(base)
    after = [plain_generate(base, row, NEW) for row in rows]
    assert after != before
    for mode in ("fused", "plain"):
        assert ours.generate(rows, max_new_tokens=NEW, mode=mode).token_ids == after


def switch_a_layer_to_training(base):
    base.model.layers[0].mlp.train()


def move_a_buffer(base):
    rotary = base.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.clone()


def put_a_copy_in_place_of_a_module(base):
    base.model.layers[0].mlp = copy(base.model.layers[0].mlp)


def give_a_layer_another_setting(base):
    base.model.layers[0].self_attn.scaling *= 2


def give_a_layer_another_name_in_a_list(base):
    base.model.layers[0].names = ["a", {"b": (1, 2)}]


def read_a_weight_the_other_way_round(base):
    weight = base.model.layers[0].self_attn.o_proj.weight
    weight.data = weight.data.T


def read_a_weight_with_other_signs(base):
    weight = base.model.layers[0].self_attn.o_proj.weight
    weight.data = torch._neg_view(weight.data)


@pytest.mark.parametrize(
    "change",
    [
        replace_weight,
        replace_module,
        add_hook,
        add_pre_hook,
        replace_forward,
        read_a_weight_the_other_way_round,
        read_a_weight_with_other_signs,
        switch_a_layer_to_training,
        move_a_buffer,
        put_a_copy_in_place_of_a_module,
        give_a_layer_another_setting,
        give_a_layer_another_name_in_a_list,
    ],
)
def test_the_signature_of_a_base_changes_with_whatever_is_looked_at(change):
    base = tiny_model("llama")
    before = signature(base)
    assert signature(base) == before
    change(base)
    assert signature(base) != before


def test_a_forward_with_the_id_of_one_that_has_gone_is_another():
    layer = (base := tiny_model("llama")).model.layers[0].mlp
    own, seen = layer.forward, []
    for _ in range(50):
        layer.forward = lambda x: own(x)  # where the one before it was, as a rule
        seen.append((id(layer.forward), signature(base)))
        del layer.forward
    assert len({number for number, _ in seen}) < len(seen)
    assert all(one != other for (_, one), (_, other) in itertools.combinations(seen, 2))


def test_a_hook_that_is_removed_again_is_honoured(capturing):
    wrap, _ = capturing
    base = tiny_model("llama")
    ours, row = wrap(base), prompts(V, (5,))[0]
    expected = plain_generate(base, row, NEW)
    handle = base.model.layers[0].mlp.register_forward_hook(lambda module, args, output: -output)
    assert ours.generate([row], max_new_tokens=NEW).token_ids[0] == plain_generate(base, row, NEW) != expected
    handle.remove()
    assert ours.generate([row], max_new_tokens=NEW).token_ids == [expected]


def test_a_class_that_is_patched_between_two_calls_is_honoured(capturing, monkeypatch):
    wrap, _ = capturing
    base = tiny_model("llama")
    ours, row = wrap(base), prompts(V, (5,))[0]
    before = plain_generate(base, row, NEW)
    assert ours.generate([row], max_new_tokens=NEW).token_ids == [before]
    kind = type(base.model.layers[0].mlp)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: -own(self, x))
    assert ours.generate([row], max_new_tokens=NEW).token_ids == [plain_generate(base, row, NEW)] != [before]
    monkeypatch.undo()
    assert ours.generate([row], max_new_tokens=NEW).token_ids == [before]


def test_the_door_runs_captured_and_honours_its_own_arguments(capturing):
    wrap, made = capturing
    base = tiny_model("llama")
    ours = wrap(base)
    rows = prompts(V, (5, 2, 4))
    ids = torch.tensor([[0] * (5 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (5 - len(row)) + [1] * len(row) for row in rows])
    options = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0}
    for eos in ([3], plain_generate(base, rows[0], 4)[3:]):
        expected = base.generate(ids, max_new_tokens=NEW, eos_token_id=eos, **options)
        found = base.generate(ids, max_new_tokens=NEW, eos_token_id=eos, custom_generate=ours, **options)
        assert torch.equal(found, expected)
    assert len(made) == 1

    class StopAtFour(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 5 + 4)

    criteria = StoppingCriteriaList([StopAtFour()])
    found = base.generate(ids, max_new_tokens=NEW, stopping_criteria=criteria, custom_generate=ours, **options)
    assert torch.equal(found, base.generate(ids, max_new_tokens=4, **options))
    with pytest.warns(UserWarning, match="row by row on the host"):  # this one cannot be captured
        found = base.generate(
            ids[:1], max_new_tokens=NEW, repetition_penalty=1.7, do_sample=False, custom_generate=ours
        )
    assert torch.equal(found, base.generate(ids[:1], max_new_tokens=NEW, repetition_penalty=1.7, do_sample=False))


def test_other_settings_of_a_layer_are_noticed(capturing):
    """Such as which of PEFT's adapters are active on the base, and with what factor."""
    wrap, made = capturing
    base = tiny_model("llama")
    base.add_adapter(LoraConfig(r=2, lora_alpha=32, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    ours, row = wrap(base.eval()), prompts(V, (5,))[0]
    found = []

    def settle() -> None:
        found.append(plain_generate(base, row, NEW))
        for _ in range(2):
            assert ours.generate([row], max_new_tokens=NEW).token_ids == found[-1:]

    settle()
    base.disable_adapters()
    settle()
    base.enable_adapters()
    settle()
    assert len(made) == 2  # what was captured before serves again
    base.model.layers[0].self_attn.q_proj.scaling["default"] = -8.0
    settle()
    base.model.layers[1].input_layernorm.variance_epsilon = 5.0
    settle()
    assert found[0] == found[2]
    assert len(set(map(tuple, found))) == 4


def test_kept_keys_and_values_are_of_no_use_under_other_settings():
    base = tiny_model("llama")
    base.add_adapter(LoraConfig(r=2, lora_alpha=32, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    ours, row, kept = SelfSpeculativeModel(base.eval(), None, None), prompts(V, (5,))[0], KeptCache()
    for switch in (base.enable_adapters, base.disable_adapters):
        switch()
        steps = list(ours.stream(row, max_new_tokens=NEW, mode="plain", kept=kept))
        assert [token for step in steps for token in step.token_ids] == plain_generate(base, row, NEW)
    assert kept.num_reused == 0
