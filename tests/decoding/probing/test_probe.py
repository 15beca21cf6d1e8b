"""What loading looks at: models that are right are accepted in every dtype, and what breaks a promise is found."""

from types import SimpleNamespace

import psutil
import pytest
import torch
from greedy_oracle import plain_generate, prompts
from matrix.tiny_configs import tiny_model as tiny_family
from tiny_models import FAMILIES, make_adapter, tiny_model
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING

import pardec
from pardec.adapters.files import save_adapter
from pardec.adapters.gated_lora import LoraGate
from pardec.decoding.probing.probe import probe, probe_lora
from pardec.decoding.probing.probe_lengths import probe_lengths
from pardec.decoding.probing.probe_step import probe_step
from pardec.decoding.probing.shared_length import shared_length_limit
from pardec.model import SelfSpeculativeModel
from pardec.target.forward import FULL, AttentionForm, TargetModel, UnsupportedModelError
from pardec.target.own_forward import jittered_embeddings

V, K = 61, 3
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SMALL = {"vocab_size": V, "hidden_size": 32, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
LLAMA4 = {
    **SMALL, **HEADS, "intermediate_size": 48, "intermediate_size_mlp": 48, "num_hidden_layers": 2,
    "max_position_embeddings": 4096, "no_rope_layers": [1, 0], "layer_types": ["chunked_attention", "full_attention"],
    "attention_chunk_size": 4096, "moe_layers": [], "attn_temperature_tuning": True, "floor_scale": 64,
    "attn_scale": 0.5,
}  # fmt: skip
GPT_NEO = {
    "vocab_size": V, "hidden_size": 32, "num_layers": 2, "attention_types": [[["global", "local"], 1]],
    "num_heads": 4, "window_size": 256, "max_position_embeddings": 1024, "intermediate_size": 48,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MPT = {"vocab_size": V, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}
MOE = {
    **SMALL, **HEADS, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 512,
}  # fmt: skip


def model_of(model_type: str, config: dict, dtype=torch.float64):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**config)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 8
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def target_of(*args, **options) -> TargetModel:
    return TargetModel.wrap(model_of(*args, **options))


# ---------------------------------------------------------------------- right models


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_right_models_are_accepted_in_every_dtype(family, dtype):
    positions = {} if family in ("gpt2", "opt") else {"max_position_embeddings": 4096}
    report = probe(TargetModel.wrap(tiny_model(family, dtype=dtype, **positions)))
    assert list(report.lengths.deviations) == ([300, 2500] if positions else [252])
    assert report.lengths.skipped == ()
    if dtype == torch.float64:
        assert max(report.deviation, *report.lengths.deviations.values()) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_of_any_length_may_share_a_batch(family):
    assert shared_length_limit(TargetModel.wrap(tiny_model(family))) is None


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_experts_that_batch_their_rows_round_otherwise_and_are_accepted(dtype):
    probe(target_of("qwen3_moe", MOE, dtype=dtype))


def test_models_that_make_much_of_rounding_are_measured_by_their_own():
    """As layers do that quantise their inputs: a small difference moves some of them by a step."""
    model = tiny_model("llama", dtype=torch.float32)
    sawtooth = lambda x: x + 3e4 * (x - x.half().float())  # noqa: E731
    model.get_submodule("model.norm").register_forward_hook(lambda module, args, output: sawtooth(output))
    report = probe(TargetModel.wrap(model))
    assert max(report.deviation, *report.lengths.deviations.values()) > 2e-3


def test_the_probes_leave_the_model_as_it_was():
    model = tiny_model("llama")
    target = TargetModel.wrap(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    probe(target)
    with jittered_embeddings(target):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


# ---------------------------------------------------------------------- what a short step shows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_real_rows_that_depend_on_other_rows_ever_so_little_are_refused(dtype):
    """Within any tolerance of numbers, but no promise; rounding of the model's own does not explain it."""
    model = tiny_model("llama", dtype=dtype)
    layer, least = model.get_submodule("model.layers.0.mlp.down_proj"), 8 * torch.finfo(dtype).eps
    layer.register_forward_hook(lambda module, args, output: output + least * output.mean(dim=1, keepdim=True))
    with pytest.raises(UnsupportedModelError, match="the same whatever stands at mask rows"):
        probe_step(TargetModel.wrap(model))


def test_models_whose_own_cached_decoding_is_another_law_are_refused():
    """What is theirs to be equal to, the forward or the cached one, nobody could tell."""
    model = tiny_model("llama", dtype=torch.float32)
    layer = model.get_submodule("model.layers.0.mlp")
    layer.register_forward_hook(lambda module, args, output: output * (2 if output.shape[1] == 1 else 1))
    with pytest.raises(UnsupportedModelError, match="expected cached decoding of its own"):
        probe_step(TargetModel.wrap(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_models_whose_texts_depend_on_each_other_in_a_batch_are_refused(dtype):
    model = tiny_model("llama", dtype=dtype)
    layer = model.get_submodule("model.layers.0.mlp")
    layer.register_forward_hook(lambda module, args, output: output + (output - output.mean(dim=0)))
    with pytest.raises(UnsupportedModelError, match="expected texts that do not depend on what stands beside them"):
        probe_step(TargetModel.wrap(model))


def test_one_scale_for_all_rows_of_a_quantised_layer_is_refused():
    """It makes every row depend on all others, more than rounding does."""
    model = tiny_model("llama", dtype=torch.float32)
    scaled = lambda x: (x / x.abs().max() * 127).round() * x.abs().max() / 127  # noqa: E731
    for layer in model.get_submodule("model.layers").children():
        layer.get_submodule("mlp.down_proj").register_forward_pre_hook(lambda module, args: (scaled(args[0]),))
    with pytest.raises(UnsupportedModelError):
        probe_step(TargetModel.wrap(model))


def test_biases_that_follow_the_order_of_keys_are_refused_under_any_name():
    with pytest.raises(UnsupportedModelError, match="follow their positions, not their order"):
        probe_step(target_of("mpt", MPT))


# ---------------------------------------------------------------------- what only length shows


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_window_that_the_configuration_does_not_name_is_found(dtype):
    target = target_of("gpt_neo", GPT_NEO, dtype=dtype)
    probe_step(target)  # a short text shows nothing
    with pytest.raises(UnsupportedModelError, match="behind 300 tokens: a window or a scaling"):
        probe_lengths(target)


@pytest.mark.parametrize(("window", "length"), [(200, 300), (1000, 2500)])
def test_a_window_that_the_masks_leave_out_is_found(window, length):
    model = tiny_model("mistral-window", sliding_window=window, max_position_embeddings=4096)
    assert probe_lengths(TargetModel.wrap(model)).deviations.keys() == {300, 2500}
    forgetful = TargetModel(model, AttentionForm((FULL,), None, None, additive=False))
    with pytest.raises(UnsupportedModelError, match=f"behind {length} tokens"):
        probe_lengths(forgetful)


def test_lengths_for_which_there_is_no_memory_are_left_out_and_named(monkeypatch, tmp_path):
    model = tiny_model("llama", max_position_embeddings=4096)
    needed = 2 * 768 * (2500 + 100)  # the tiny Llama takes 768 bytes for a token
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4 * needed // 2))
    report = probe_lengths(TargetModel.wrap(model))
    assert (list(report.deviations), report.skipped) == ([300], (2500,))
    save_adapter(make_adapter(model, K), tmp_path / "a")
    with pytest.warns(UserWarning, match="not compared with the base's own decoding behind 2500 tokens"):
        pardec.load(tmp_path / "a", base=model)


# ---------------------------------------------------------------------- a model that computes with the cache's length


@pytest.mark.parametrize("mode", ["plain", "two_pass", "fused"])
@pytest.mark.parametrize("length", [20, 63, 150])
def test_one_sequence_is_exact_where_the_model_computes_with_its_length(length, mode):
    model = model_of("llama4_text", LLAMA4)
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K))
    (row,) = prompts(V, (length,))
    assert ours.generate([row], max_new_tokens=40, mode=mode).token_ids == [plain_generate(model, row, 40)]


def test_several_sequences_are_decoded_up_to_where_their_lengths_matter_and_refused_beyond():
    model = model_of("llama4_text", LLAMA4)
    ours = SelfSpeculativeModel(model, None, make_adapter(model, K))
    limit = ours.engines.shared_limit
    assert 58 <= limit < 64
    rows = prompts(V, (limit - 20, 9))
    expected = [plain_generate(model, row, 20) for row in rows]
    assert ours.generate(rows, max_new_tokens=20).token_ids == expected
    words = f"expected at most {limit} for several sequences at once, .* found {limit + 1} for 2 sequences"
    with pytest.raises(ValueError, match=words):
        ours.generate(rows, max_new_tokens=21)
    with pytest.raises(ValueError, match="for 3 sequences"):
        ours.generate(rows[:1], max_new_tokens=21, num_return_sequences=3)
    (long,) = prompts(V, (100,))
    assert ours.generate([long], max_new_tokens=20).token_ids == [plain_generate(model, long, 20)]


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("phimoe", "expected layers that give a tensor, found a .*Router that gives more"),
        ("deepseek_v3", "expected module inputs of .* rows, found"),  # keys and values of all that is cached
        ("bert", "expected module inputs of .* rows, found"),  # the head's rows alone
    ],
)
def test_a_lora_on_layers_that_do_not_read_every_row_is_refused_as_it_is_loaded(tmp_path, model_type, words):
    base = tiny_family(model_type)
    adapter = make_adapter(base, K, lora_rank=2)
    with pytest.raises(ValueError, match=f"^lora: {words}"):
        probe_lora(TargetModel.wrap(base), LoraGate(base, adapter.lora))
    save_adapter(adapter, tmp_path)
    with pytest.raises(ValueError, match=f"^lora: {words}"):
        pardec.load(tmp_path, base=base)
