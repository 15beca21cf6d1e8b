"""Tiny GGUF files, written by the package gguf from the packaged model."""

import json
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType
from transformers import LlamaForCausalLM


def write_gguf(file: Path, model: LlamaForCausalLM, folder: Path, *, architecture: str = "llama") -> Path:
    """A GGUF file of float32 weights.

    Args:
        file: to write.
        model: a Llama with tied embeddings.
        folder: that holds its `tokenizer.json`, byte-level BPE.
        architecture: that the file names; any but `llama` is a lie.
    """
    config = model.config
    writer = GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, folder)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            _add_tensor(writer, config, name, weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: GGUFWriter, folder: Path) -> None:
    bpe = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = sorted(bpe["model"]["vocab"], key=bpe["model"]["vocab"].get)
    special = {token["content"] for token in bpe["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in bpe["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def _add_tensor(writer: GGUFWriter, config, name: str, weight: np.ndarray) -> None:
    if name.startswith("model.layers."):
        _, _, layer, *rest, _ = name.split(".")
        part = ".".join(rest)
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if part == "self_attn.q_proj" else config.num_key_value_heads
            # GGUF keeps the two halves of a head's rotation next to each other
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(f"blk.{layer}.{_NAMES[part]}.weight", weight.copy())
    else:
        writer.add_tensor(
            {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name], weight
        )
