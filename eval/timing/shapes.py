"""Models and adapters of random numbers in the shapes of public ones, for timing: what a step costs depends on shapes.

Built from configurations in memory; nothing is downloaded and there is no tokenizer.
Legend: K num_speculative_tokens, D width of an input embedding, V vocabulary, r rank.
"""

from collections.abc import Iterator
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from pardec.adapters.gated_lora import LoraWeights
from pardec.decoding.engine import GIB
from pardec.run import dtype_name
from pardec.target.forward import embedding_weight

_LLAMA = {
    "model_type": "llama",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
_QWEN3 = {
    "model_type": "qwen3",
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}


def _sizes(
    vocabulary: int, hidden: int, intermediate: int, *, layers: int, heads: int, kv_heads: int, tied: bool
) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
    }


# sizes as in the config.json of the models named above them
SHAPES: dict[str, dict[str, Any]] = {
    # 0.1 M parameters: to see the script run
    "tiny": _LLAMA | _sizes(512, 64, 128, layers=2, heads=4, kv_heads=2, tied=False),
    # 100 M parameters with tied embeddings: larger than a CPU's caches, small enough to wait for
    "llama-100m": _LLAMA | _sizes(32000, 768, 2048, layers=12, heads=12, kv_heads=4, tied=True),
    # Llama-3.2-1B
    "llama-1b": _LLAMA | _sizes(128256, 2048, 8192, layers=16, heads=32, kv_heads=8, tied=True),
    # Llama-3.1-8B
    "llama-8b": _LLAMA | _sizes(128256, 4096, 14336, layers=32, heads=32, kv_heads=8, tied=False),
    # Qwen3-0.6B
    "qwen3-0.6b": _QWEN3 | _sizes(151936, 1024, 3072, layers=28, heads=16, kv_heads=8, tied=True),
    # Qwen3-8B
    "qwen3-8b": _QWEN3 | _sizes(151936, 4096, 12288, layers=36, heads=32, kv_heads=8, tied=False),
}


def config_of(shape: str) -> PretrainedConfig:
    """The configuration of a named shape.

    Raises:
        ValueError: for a name that is not known, naming those that are.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape: expected one of {', '.join(SHAPES)}, found {shape!r}")
    no_special_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    sizes: dict[str, Any] = {**SHAPES[shape], **no_special_tokens}
    return CONFIG_MAPPING[sizes.pop("model_type")](**sizes)


def random_model(config: PretrainedConfig, device: torch.device, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """A model of random weights made on `device`, in eval mode, without gradients.

    Its layers change the embeddings only a little, and an untied head is the table of embeddings moved by a row: so
    token t is followed by t + 1 (by t, where the head is tied) by such a margin that rounding never decides. That
    lets drafts be forced to be right or wrong in any dtype; to the kernels one matrix is as good as another.

    Raises:
        ValueError: if it does not fit into the memory that is free.
    """
    check_fits(config, device, dtype)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model = model.to(device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    table = embedding_weight(model)
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter is not table:
            parameter.normal_(std=0.2 / parameter.shape[1] ** 0.5, generator=generator)
    table.normal_(generator=generator)
    head = model.get_output_embeddings()
    if head is not None and head.weight is not table:
        head.weight.copy_(table.roll(1, 0))
    return model


def check_fits(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Refuses a model whose weights alone are more than the memory that is free."""
    needed = model_without_numbers(config, dtype).num_parameters() * dtype.itemsize
    on_cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_cuda else psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"shape: expected weights of at most {free / GIB:.1f} GiB, which are free on {device}, found "
            f"{needed / GIB:.1f} GiB in {dtype_name(dtype)}"
        )


def random_mask_embeddings(base: PreTrainedModel, num_speculative_tokens: int, seed: int) -> Tensor:
    """Mask embeddings of random numbers as large as those of `base`, shape [K, D], in its dtype and device."""
    table = embedding_weight(base)
    generator = torch.Generator(table.device).manual_seed(seed)
    masks = torch.empty(num_speculative_tokens, table.shape[1], device=table.device, dtype=table.dtype)
    return masks.normal_(generator=generator) * table[:256].float().std().to(table.dtype)


def random_lora(base: PreTrainedModel, rank: int, seed: int) -> LoraWeights:
    """A LoRA of random numbers on every linear layer but the head, in the names and shapes that PEFT writes."""
    device = embedding_weight(base).device
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator, device=device) * 0.2 / shape[1] ** 0.5
        for name, shape in _lora_shapes(base, rank)
    }
    return LoraWeights(_lora_config(rank), tensors)


def model_without_numbers(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose tensors have shapes and no memory, on the device `meta`, in eval mode, without gradients."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def lora_without_numbers(base: PreTrainedModel, rank: int) -> LoraWeights:
    """The LoRA of `random_lora`, of a single zero that stands in every place."""
    return LoraWeights(
        _lora_config(rank), {name: torch.zeros(()).expand(shape) for name, shape in _lora_shapes(base, rank)}
    )


def _lora_config(rank: int) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}


def _lora_shapes(base: PreTrainedModel, rank: int) -> Iterator[tuple[str, tuple[int, int]]]:
    head = base.get_output_embeddings()
    for name, module in base.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or module is head:
            continue
        features_out, features_in = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
        yield f"base_model.model.{name}.lora_A.weight", (rank, features_in)
        yield f"base_model.model.{name}.lora_B.weight", (features_out, rank)
