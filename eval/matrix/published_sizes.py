"""Sizes of models that people run, as their publishers' configurations have them, and such a model without weights.

What does not change the size of anything, as rotary bases, is left at the family's defaults.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING

# hub name -> (model type, values of the configuration)
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen/Qwen3-0.6B": (
        "qwen3",
        {
            "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
        },
    ),
    "Qwen/Qwen3-4B": (
        "qwen3",
        {
            "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
        },
    ),
    "Qwen/Qwen3-8B": (
        "qwen3",
        {
            "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
        },
    ),
    "meta-llama/Llama-3.2-1B-Instruct": (
        "llama",
        {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
        },
    ),
    "meta-llama/Llama-3.1-8B-Instruct": (
        "llama",
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False,
        },
    ),
    "HuggingFaceTB/SmolLM3-3B": (
        "smollm3",
        {
            "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 4, "vocab_size": 128256, "tie_word_embeddings": True,
        },
    ),
    "google/gemma-3-270m-it": (
        "gemma3_text",
        {
            "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4,
            "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
        },
    ),
    "google/gemma-3-1b-it": (
        "gemma3_text",
        {
            "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
            "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144,
        },
    ),
    "google/gemma-3-4b-it": (
        "gemma3",
        {
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
                "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
            },
            "vision_config": {
                "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
                "image_size": 896, "patch_size": 14,
            },
        },
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": (
        "mistral",
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 32768, "sliding_window": None, "tie_word_embeddings": False,
        },
    ),
    "microsoft/Phi-4-mini-instruct": (
        "phi3",
        {
            "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 24,
            "num_key_value_heads": 8, "vocab_size": 200064, "tie_word_embeddings": True, "pad_token_id": 199999,
        },
    ),
    "openai/gpt-oss-20b": (
        "gpt_oss",
        {
            "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
            "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088, "num_local_experts": 32,
            "num_experts_per_tok": 4, "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip


def published_model(name: str, num_layers: int | None = None) -> PreTrainedModel:
    """A model of that size in bfloat16 on torch's device `meta`, which holds no numbers; of so many layers, or all.

    Raises:
        ValueError: for a name that is not in the table.
    """
    if name not in PUBLISHED:
        raise ValueError(f"base: expected one of {', '.join(PUBLISHED)}, found {name!r}")
    model_type, values = PUBLISHED[name]
    if num_layers is not None:
        values = _with_layers(values, num_layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**values), dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def num_layers_of(name: str) -> int:
    """Of the language model of that name, which is in the table."""
    values = PUBLISHED[name][1]
    return values.get("text_config", values)["num_hidden_layers"]


def _with_layers(values: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """The same configuration with another number of layers of its language model."""
    if "text_config" in values:
        return {**values, "text_config": _with_layers(values["text_config"], num_layers)}
    return {**values, "num_hidden_layers": num_layers}
