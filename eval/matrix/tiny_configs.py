"""A tiny random model of any causal language model that transformers knows, so that all of them can be tried.

Sizes are set by the names that configurations share; what only one family names stands in `EXTRA`.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING

VOCAB, WINDOW, LAYERS, POSITIONS = 61, 8, 4, 256
_DEPTHS = (
    "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_blocks"
)
_WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "window_size",
    "local_attention",
    "attention_chunk_size",
    "index_topk",
    "keep_window_size",
    "floor_scale",
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# several names, one meaning
_NAMES: tuple[tuple[int, str], ...] = (
    (VOCAB, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size"),
    (64, "hidden_size d_model n_embd emb_dim dim embed_dim attention_hidden_size backbone_hidden_size"),
    (64, "adapter_in_dim adapter_out_dim adapter_input_size"),
    (32, "embedding_size word_embed_proj_dim"),
    (
        48,
        "intermediate_size intermediate_size_mlp moe_intermediate_size dense_intermediate_size ffn_dim ffn_hidden_size "
        "encoder_ffn_dim decoder_ffn_dim dff dim_ff d_inner shared_expert_intermediate_size shared_intermediate_size "
        "expert_ffn_hidden_size moe_shared_expert_intermediate_size shared_experts_intermediate_size",
    ),
    (LAYERS, _DEPTHS),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
        "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads index_n_heads",
    ),
    (4, " ".join(_EXPERTS)),
    (4, "linear_num_heads linear_num_value_heads"),
    (2, "num_key_value_heads swa_num_key_value_heads num_kv_heads kv_n_heads linear_num_key_heads"),
    (4, "index_block_size block_size"),
    (1, "index_local_blocks num_random_blocks"),
    (2, "index_topk_blocks"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k"),
    (16, "head_dim swa_head_dim global_head_dim dim_head kv_channels kv_lora_rank q_lora_rank qk_nope_head_dim"),
    (16, "v_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim o_lora_rank"),
    (8, "qk_rope_head_dim hidden_size_per_layer_input laurel_rank rotary_dim d_rel"),
    (24, "qk_head_dim"),
    (1, "n_group topk_group num_expert_group first_k_dense_replace"),
    (POSITIONS, "max_position_embeddings n_positions n_ctx max_seq_len model_max_length"),
    (WINDOW, " ".join(_WINDOWS)),
    (0, "pad_token_id"),
    (1, "bos_token_id"),
    (2, "eos_token_id num_kv_shared_layers"),
)
SIZES = {name: value for value, names in _NAMES for name in names.split()}
# configurations that leave them out derive the same
_DERIVED = ("head_dim", "num_key_value_heads", "pad_token_id", "bos_token_id", "eos_token_id")
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SLIDING_LATENT = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
    "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
}  # fmt: skip
_INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
    "indexer_compress_ratio": 2, "ple_embed_dim": 16, "ngram_vocab_size_base": 100,
}  # fmt: skip
# a latent projection of keys and values leaves no heads to group
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}
# what a family needs besides
EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16},
    "blt": {"encoder_hash_byte_group_vocab": 61, "encoder_hash_byte_group_nb_functions": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"text_config": _SLIDING_LATENT},
    "dots3_note_text": _SLIDING_LATENT,
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_d_state": 16},
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_hidden_layers": LAYERS,
            "num_kv_shared_layers": LAYERS,
        }
    },
    "got_ocr2": {"vision_config": {"mlp_dim": 48, "output_channels": 16, "window_size": 4, "hidden_size": 32}},
    "granitemoehybrid": {
        "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "hrm_text": {"num_layers_per_stack": 1, "L_cycles": 1, "L_bp_cycles": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 16},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {
        "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16], "attention_head_size": 16,
        "feed_forward_size": 48, "attn_layers": ["local", "lsh"] * 2, "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "roc_bert": {
        "shape_vocab_size": 61, "pronunciation_vocab_size": 61, "pronunciation_embed_dim": 16, "shape_embed_dim": 16,
    },
    "xlstm": {"embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
# the same family otherwise configured, where another part of it then decides
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon with alibi": ("falcon", {"alibi": True}),
    "gemma4_text without embeddings per layer": (
        "gemma4_text",
        {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    ),
    "gpt_neo without windows": (
        "gpt_neo",
        {"attention_types": [[["global"], LAYERS]], "attention_layers": ["global"] * LAYERS},
    ),
    "qwen2 with windows": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """A configuration of four small layers with windows of eight tokens; every kind of layer that it mixes is there.

    Args:
        family: a model type, or one of `VARIANTS`.
        changes: of single values.

    Raises:
        ValueError: or what else the configuration itself raises for sizes that it does not take.
    """
    model_type, variant = VARIANTS.get(family, (family, {}))
    kind, extra = CONFIG_MAPPING[model_type], EXTRA.get(model_type, {})
    try:
        default = kind().to_dict()
    except Exception:  # its own defaults do not go together
        default = kind(**extra).to_dict()
    return kind(**_merged(_merged(_merged(_small(default), extra), variant), changes))


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    nested = {k: _merged(values.get(k, {}), v) for k, v in changes.items() if k.endswith("_config") and v is not None}
    return {**values, **changes, **nested}


def _small(default: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    depth = next((default[n] for n in _DEPTHS.split() if isinstance(default.get(n), int)), None)
    for name, value in default.items():
        if name.endswith("_config") and isinstance(value, Mapping):
            values |= {name: nested} if (nested := _small(value)) else {}
        elif name in SIZES and not isinstance(value, list | Mapping) and (value is not None or name in _DERIVED):
            values[name] = SIZES[name]
        elif isinstance(value, list) and value and len(value) == depth:
            values[name] = _few(value)
        elif name == "rope_parameters" and isinstance(value, Mapping) and value.get("rope_type") == "yarn":
            values[name] = {**value, "original_max_position_embeddings": WINDOW}  # queries may be scaled behind it
        elif name in ("is_decoder", "tie_word_embeddings"):  # tied ones would say their last token again
            values[name] = name == "is_decoder"
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int):
            values[name] = VOCAB - 1  # of images and the like
    return values | (_LATENT if "kv_lora_rank" in default else {})


def _few(of_layers: list) -> list:
    """Entries for four layers out of those for all: every kind there is, in turn."""
    if not all(isinstance(one, str) for one in of_layers):
        return of_layers[:LAYERS]
    kinds = list(dict.fromkeys(of_layers))
    return [kinds[i % len(kinds)] for i in range(LAYERS)]


def layer_kinds(family: str) -> str:
    """Kinds of the family's layers by its configuration, and its window, as text."""
    config = tiny_config(family).get_text_config(decoder=True)
    found = getattr(config, "layer_types", None) or ("full_attention",)
    kinds = sorted({kind.removesuffix("_attention") for kind in found})
    values = config.to_dict()
    windows = {name: values.get(name) for name in _WINDOWS if isinstance(values.get(name), int)}
    experts = any(isinstance(values.get(name), int) and values[name] > 1 for name in _EXPERTS)
    notes = [f"{name} {value}" for name, value in windows.items()] + (["experts"] if experts else [])
    return ", ".join(kinds) + (f" ({', '.join(notes)})" if notes else "")


@torch.no_grad()
def tiny_model(family: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model, in eval mode, without gradients, in which every token and position makes a difference.

    Args:
        family: a model type, or one of `VARIANTS`.
        dtype: of all weights.
        seed: of all weights.
        changes: of values of the configuration.
    """
    config = tiny_config(family, **changes)
    if dtype == torch.float64:
        config._experts_implementation = "eager"  # the fused kernels do not know it
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(dtype)
        elif float(parameter.std()) > 0:
            parameter *= 2 / min(parameter.shape[-2:]) ** 0.5 / float(parameter.std())
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight *= 0.5 / float(module.weight.std().clamp_min(1e-6))
    with suppress(Exception):  # a model that does not take this will be refused, or its failure be told, later
        _spread_logits(model, torch.randint(3, VOCAB - 1, (4, 32), generator=generator))
    model.generation_config = GenerationConfig(pad_token_id=0)  # its own may hold penalties
    return model


def _spread_logits(model: PreTrainedModel, ids: Tensor) -> None:
    """Takes what all rows share out of the head: else one token may always be the likeliest, and show no error."""
    head, seen = model.get_output_embeddings(), []
    assert isinstance(head, nn.Linear)
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(input_ids=ids, use_cache=False)
    handle.remove()
    rows = seen[0].flatten(0, -2)
    mean = rows.mean(dim=0)
    head.weight -= torch.outer(head.weight @ mean, mean) / (mean @ mean)
    head.weight *= 3 / (rows @ head.weight.T).std()
    if head.bias is not None:
        head.bias.zero_()
