"""The one private function of vLLM that is replaced: what it does with a loaded draft and the target.

vLLM lets a draft of the method `draft_model` share nothing with its target. There is no public place to change that.
"""

import inspect
from typing import Any, Protocol, runtime_checkable

from torch import nn

from pardec.vllm_plugin.architectures import TESTED_VERSIONS

_NAME, _PARAMETERS = "_maybe_share_embeddings", ["self", "target_language_model"]


@runtime_checkable
class Borrower(Protocol):
    """A draft that is not whole before it has the target's layers."""

    def borrow_layers(self, target: nn.Module) -> None:
        """Takes them."""
        ...


def let_drafts_borrow(proposer: type[Any]) -> None:
    """Lets drafts that are borrowers have the target's layers; others are treated as before. Once is enough.

    Args:
        proposer: vLLM's class that loads drafts of the method `draft_model`.

    Raises:
        ValueError: if it has no such function as the versions that were tested.
    """
    original = getattr(proposer, _NAME, None)
    if getattr(original, "lets_drafts_borrow", False):
        return
    parameters = list(inspect.signature(original).parameters) if inspect.isfunction(original) else None
    if original is None or parameters != _PARAMETERS:
        tested = ", ".join(TESTED_VERSIONS)
        found = "none" if parameters is None else f"one with ({', '.join(parameters)})"
        raise ValueError(
            f"vllm: expected {proposer.__name__}.{_NAME}({', '.join(_PARAMETERS)}), as in {tested}, "
            f"which pardec was tested with, found {found}"
        )

    def share(self, target_language_model: nn.Module) -> None:
        if isinstance(self.model, Borrower):
            self.model.borrow_layers(target_language_model)
        else:
            original(self, target_language_model)

    share.lets_drafts_borrow = True  # type: ignore[attr-defined]
    setattr(proposer, _NAME, share)


def version_note(installed: str) -> str | None:
    """What to say of a version of vLLM that was not tested; None of one that was."""
    if installed.partition("+")[0] in TESTED_VERSIONS:
        return None
    tested = ", ".join(TESTED_VERSIONS)
    return f"vllm: expected {tested}, which pardec was tested with, found {installed}; going on"
