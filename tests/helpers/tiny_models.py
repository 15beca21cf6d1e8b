"""Tiny random models of many families, built from configurations, in float64 with weights large enough to matter."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING

COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

# family name -> (model_type, configuration, attention implementation)
FAMILIES: dict[str, tuple[str, dict, str]] = {
    "llama": ("llama", GROUPED, "sdpa"),
    "llama-eager": ("llama", GROUPED, "eager"),
    "qwen3": ("qwen3", GROUPED, "sdpa"),
    "qwen3-mixed-windows": (
        "qwen3",
        {**GROUPED, "use_sliding_window": True, "sliding_window": 8, "layer_types": MIXED},
        "sdpa",
    ),
    "mistral-window": ("mistral", {**GROUPED, "sliding_window": 8}, "sdpa"),
    "gemma3-mixed-windows": ("gemma3_text", {**GROUPED, "sliding_window": 8, "layer_types": MIXED}, "sdpa"),
    "gemma2-eager": ("gemma2", {**GROUPED, "sliding_window": 8, "layer_types": MIXED}, "eager"),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": 61,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 256,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        "sdpa",
    ),
    "gpt_neox": ("gpt_neox", COMMON, "sdpa"),
    "phi3-window": ("phi3", {**COMMON, "num_key_value_heads": 2, "sliding_window": 8}, "sdpa"),
    "opt": (
        "opt",
        {
            "vocab_size": 61,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 16,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 1,
        },
        "sdpa",
    ),
    "granite": ("granite", {**GROUPED, "embedding_multiplier": 3.0, "logits_scaling": 2.0}, "sdpa"),
}


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> PreTrainedModel:
    """A random model of `family`, in eval mode, without gradients."""
    model_type, values, attention = FAMILIES[family]
    config = CONFIG_MAPPING[model_type](**{**values, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 4  # attention and position must make a difference to the argmax
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def make_adapter(
    model: PreTrainedModel,
    num_speculative_tokens: int,
    *,
    lora_rank: int = 0,
    head_width: int = 0,
    shortlist: int = 8,
    seed: int = 1,
    **metadata,
):
    """An adapter of random numbers for `model`.

    With a LoRA on every linear layer if `lora_rank` > 0, and with a sampler head if `head_width` > 0.
    """
    from pardec.adapters.adapter import UNIFORM_NOISE, Adapter, AdapterMetadata, BaseReference, HeadShape
    from pardec.target.fingerprint import fingerprint

    generator = torch.Generator().manual_seed(seed)
    width = model.get_input_embeddings().weight.shape[1]
    shared = metadata.get("mask_sharing") == "shared"
    masks = torch.randn(1 if shared else num_speculative_tokens, width, generator=generator)
    facts = AdapterMetadata(
        num_speculative_tokens=num_speculative_tokens,
        base=BaseReference(name="tiny"),
        fingerprint=fingerprint(model, None),
        head=HeadShape(width=head_width, shortlist=shortlist) if head_width else None,
        **metadata,
    )
    lora = random_lora(model, lora_rank, generator) if lora_rank else None
    head = random_head(model, head_width, generator) if head_width else None
    return Adapter(None if facts.draft_input == UNIFORM_NOISE else masks, facts, lora, head)


def random_head(model: PreTrainedModel, width: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A sampler head of random numbers, large enough to change which token is likeliest."""
    hidden_dim = model.get_output_embeddings().weight.shape[1]
    embedding_dim = model.get_input_embeddings().weight.shape[1]
    shapes = {
        "inner.weight": (width, hidden_dim + embedding_dim),
        "inner.bias": (width,),
        "outer.weight": (hidden_dim, width),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def random_lora(model: PreTrainedModel, rank: int, generator: torch.Generator):
    """A LoRA of random numbers, in the names and shapes that PEFT writes."""
    from transformers.pytorch_utils import Conv1D

    from pardec.adapters.gated_lora import LoraWeights

    tensors = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear | Conv1D) or name == "lm_head" or name.endswith("embed_out"):
            continue
        out_in = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.shape[::-1]
        for half, shape in (("lora_A", (rank, out_in[1])), ("lora_B", (out_in[0], rank))):
            values = torch.randn(shape, generator=generator) * 0.3
            tensors[f"base_model.model.{name}.{half}.weight"] = values
    return LoraWeights({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}, tensors)
