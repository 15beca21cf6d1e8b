"""The gated LoRA in training: PEFT's layers around the base's modules, on only while mask rows run.

Knows PEFT and the weights that it writes; no mask rows.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pardec.adapters.gated_lora import LoraWeights


def inject_lora(base: nn.Module, *, r: int, alpha: float, target_modules: str | list[str]):
    """Wraps the target modules of `base` in PEFT's LoRA layers, switched off, and returns the PeftModel.

    Raises:
        ValueError: if no module of the base is meant by `target_modules`.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=target_modules,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft reads an attribute that newer transformers versions rename
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        # and says that it sets this by itself for transformers' Conv1D
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)
        peft_model = get_peft_model(base, config)  # type: ignore[arg-type]
    _set_enabled(base, False)
    head = base.get_output_embeddings()  # type: ignore[operator]
    if head is not None and hasattr(head, "base_layer"):
        raise ValueError(
            "adapter.lora.target_modules: expected layers of the transformer's body, found the output head, which "
            "does not run on all rows"
        )
    return peft_model


@contextmanager
def lora_enabled(base: nn.Module) -> Iterator[None]:
    """Switches the injected LoRA on for every row of the forwards inside; it is off everywhere else."""
    _set_enabled(base, True)
    try:
        yield
    finally:
        _set_enabled(base, False)


def _set_enabled(base: nn.Module, enabled: bool) -> None:
    from peft.tuners.lora import LoraLayer

    for module in base.modules():
        if isinstance(module, LoraLayer):
            # PEFT's enable_adapters() also flips requires_grad, which DistributedDataParallel does not survive
            module._disable_adapters = not enabled
            if module.disable_adapters is enabled:
                raise RuntimeError("this version of peft cannot switch a LoRA layer off by _disable_adapters")


def lora_weights(peft_model) -> LoraWeights:
    """A detached float32 copy, on the CPU, of the LoRA inside `peft_model`."""
    from peft import get_peft_model_state_dict

    config = peft_model.peft_config["default"].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    config = {key: getattr(value, "value", value) for key, value in config.items()}
    tensors = {
        key: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for key, tensor in get_peft_model_state_dict(peft_model, save_embedding_layers=False).items()
    }
    return LoraWeights(config, tensors)


def load_lora_weights(peft_model, weights: LoraWeights) -> None:
    """Puts a saved LoRA into the one inside `peft_model`.

    Raises:
        ValueError: if it adapts other modules, or with another rank or scaling.
    """
    from peft import set_peft_model_state_dict

    present = lora_weights(peft_model)
    shapes = [{name: tuple(t.shape) for name, t in one.tensors.items()} for one in (present, weights)]
    if shapes[0] != shapes[1] or present.scaling != weights.scaling:
        raise ValueError(
            f"lora: expected r {present.rank}, scaling {present.scaling} and {len(shapes[0])} matrices, as in the "
            f"recipe, found r {weights.rank}, scaling {weights.scaling} and {len(shapes[1])}"
        )
    set_peft_model_state_dict(peft_model, weights.tensors)
