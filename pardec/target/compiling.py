"""Steps under torch.compile."""

from collections.abc import Callable
from typing import TypeVar

import torch

Returned = TypeVar("Returned")


def compiled(forward: Callable[..., Returned]) -> Callable[..., Returned]:
    """`forward` under torch.compile, specialised for every shape that it meets."""
    optimised = torch.compile(forward, dynamic=False)

    def run(*args) -> Returned:
        # each batch, number of rows and cache bucket is a compilation; torch gives up after 8 by default
        # hooks that a user adds later must be noticed
        limits = {"recompile_limit": 256, "skip_nnmodule_hook_guards": False}
        with torch._dynamo.config.patch(limits):  # type: ignore[attr-defined]
            return optimised(*args)

    return run
