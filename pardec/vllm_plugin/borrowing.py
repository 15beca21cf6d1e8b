"""A model whose layers are another's: it is emptied where it would have weights of its own, and filled by the other's.

What must stay its own, such as attention with its cache, stays, and so do the modules on the way there. Knows torch
alone, and no model.
"""

from collections.abc import Callable, Collection

from torch import nn

from pardec.vllm_plugin.gated_linear import GatedLinear


class Borrowed(nn.Module):
    """The place of a module of the target, before the target is there."""

    def forward(self, *args) -> None:
        """Raises RuntimeError."""
        raise RuntimeError("pardec: expected the target's layers in the draft before it runs, found none")


def hollow(model: nn.Module, *, stays: Callable[[nn.Module], bool], within: Collection[str]) -> None:
    """Puts `Borrowed` for every module that holds nothing of its own.

    Args:
        model: changed in place.
        stays: whether a module is the model's own.
        within: names of modules to be borrowed one by one, not with a module around them.
    """
    for name, child in list(model.named_children()):
        inner = [one.removeprefix(f"{name}.") for one in within if one.startswith(f"{name}.")]
        if stays(child):
            continue
        if inner or any(stays(module) for module in child.modules()):
            hollow(child, stays=stays, within=inner)
        else:
            setattr(model, name, Borrowed())


def borrow(model: nn.Module, target: nn.Module, *, stays: Callable[[nn.Module], bool]) -> None:
    """Puts the target's modules, and what its modules hold themselves, into a model that is hollow.

    Args:
        model: changed in place.
        target: of the same structure.
        stays: as in `hollow`.

    Raises:
        ValueError: naming the module, if the target has none of that name.
    """
    for name, child in list(model.named_children()):
        theirs = getattr(target, name, None)
        if not isinstance(theirs, nn.Module):
            raise ValueError(
                f"pardec: expected a target with {name} in its {type(target).__name__}, as the draft's "
                f"{type(model).__name__} has, found none"
            )
        if isinstance(child, Borrowed):
            setattr(model, name, theirs)
        elif isinstance(child, GatedLinear):
            child.base = theirs
        elif not stays(child):
            borrow(child, theirs, stays=stays)
    model._parameters.update(target._parameters)
    model._buffers.update(target._buffers)
