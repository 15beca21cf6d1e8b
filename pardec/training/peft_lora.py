"""The gated LoRA in training: PEFT's layers around the base's modules, on only while mask rows run.

Knows PEFT and the weights that it writes; no mask rows.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from pardec.adapters.gated_lora import LoraWeights
from pardec.training.linear_layers import linear_layers
from pardec.training.smaller_lora import cut_lora

ALL_LINEAR = "all-linear"


def inject_lora(base: PreTrainedModel, *, r: int, alpha: float, target_modules: str | list[str]):
    """Wraps the target modules of `base` in PEFT's LoRA layers, switched off, and returns the PeftModel.

    Args:
        base: the frozen model.
        r: rank.
        alpha: of the scaling alpha / r.
        target_modules: names as PEFT takes them, or `all-linear`: all linear layers that read every row of a forward,
            see `pardec.training.linear_layers`, but for the output head.

    Raises:
        ValueError: if the base has adapters of PEFT already, or if no module of it is meant by `target_modules`, or
            one that a LoRA for mask rows alone cannot act on.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    others = sum(isinstance(module, BaseTunerLayer) for module in base.modules())
    if others:  # they would be switched off with the gated LoRA, and the target's law with them
        raise ValueError(
            f"base: expected none that carries adapters of PEFT while a LoRA is trained, found {others} such layers; "
            "merge them into it first (merge_and_unload)"
        )
    modules, parameters = _targets(base, target_modules)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=modules,
        target_parameters=parameters or None,
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
    head = base.get_output_embeddings()
    if head is not None and hasattr(head, "base_layer"):
        raise ValueError(
            "adapter.lora.target_modules: expected layers of the transformer's body, found the output head, which "
            "does not run on all rows"
        )
    return peft_model


def _targets(base: PreTrainedModel, asked: str | list[str]) -> tuple[str | list[str], list[str]]:
    """`target_modules` and `target_parameters` for PEFT's configuration."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    layers = linear_layers(base)
    usable = [name for name, reads_rows in layers.items() if reads_rows]
    if asked == ALL_LINEAR:
        chosen = usable
    else:
        config = LoraConfig(target_modules=asked)
        chosen = [name for name in layers if check_target_module_exists(config, name)]
        names = [] if isinstance(asked, str) else asked
        unmatched = [one for one in names if not any(name == one or name.endswith(f".{one}") for name in chosen)]
        wrong = [name for name in chosen if not layers[name]]
        wrong += unmatched  # of several, PEFT would pass over those that are none
        if wrong or not chosen:
            raise ValueError(
                "adapter.lora.target_modules: expected linear layers that read every row, such as "
                f"{', '.join(sorted({_last(name) for name in usable}))}, found {wrong[0] if wrong else asked}"
            )
    if not _means_experts(base, asked) and (asked != ALL_LINEAR or len(usable) == len(layers)):
        return asked, []
    of_experts = {last for last in {_last(name) for name in chosen} if _means_experts(base, [last])}
    modules = [name for name in chosen if _last(name) not in of_experts]
    # by its weight a layer can be named that shares its name with the experts
    return modules, [f"{name}.weight" for name in chosen if _last(name) in of_experts]


def _means_experts(base: PreTrainedModel, target_modules: str | list[str]) -> bool:
    """Whether PEFT takes these for a mixture's experts, which older checkpoints keep in layers of such names."""
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # older versions take every name as it stands
        return False
    config = LoraConfig(target_modules=target_modules)
    try:
        convert_peft_config_for_transformers(config, base, None)
    except ValueError:  # it wants all layers that a parameter of the experts holds
        return True
    return bool(config.target_parameters)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


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


def lora_weights(peft_model, base_name: str | None = None) -> LoraWeights:
    """A detached float32 copy, on the CPU, of the LoRA inside `peft_model`.

    Args:
        peft_model: from `inject_lora`.
        base_name: what the configuration calls the base; PEFT itself would write the path that it was loaded from.
    """
    from peft import get_peft_model_state_dict

    config = {**peft_model.peft_config["default"].to_dict(), "base_model_name_or_path": base_name}
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    config = {key: getattr(value, "value", value) for key, value in config.items()}
    tensors = {
        key: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for key, tensor in get_peft_model_state_dict(peft_model, save_embedding_layers=False).items()
    }
    return LoraWeights(config, tensors)


def load_lora_weights(peft_model, weights: LoraWeights) -> None:
    """Puts a saved LoRA into the one inside `peft_model`, cut to its layers and rank if it has more.

    Raises:
        ValueError: if it lacks a layer, or has a lower rank.
    """
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(peft_model, cut_lora(weights, lora_weights(peft_model)).tensors)
