"""The layers of a language model, whatever its family calls the list of them."""

from torch import nn
from transformers import PreTrainedModel

from pardec.target.forward import UnsupportedModelError, text_config


def decoder_layers(base: PreTrainedModel, setting: str) -> list[nn.Module]:
    """The layers of the language model, which hold nearly all of its parameters.

    Args:
        base: the model.
        setting: that needs them.

    Raises:
        UnsupportedModelError: if there is no list of them, naming the setting.
    """
    count = text_config(base).num_hidden_layers
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not lists:
        found = f"expected a list of {count} layers in a {type(base).__name__}, found none"
        raise UnsupportedModelError(f"{setting}: {found}")
    return list(max(lists, key=lambda one: sum(parameter.numel() for parameter in one.parameters())))
