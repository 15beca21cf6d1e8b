"""Steps under torch.compile."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from pardec.target.forward import UnsupportedModelError

Returned = TypeVar("Returned")
# inductor unrolls sums of fewer terms than this into the kernels beside them, by default of fewer than 8; the keys of
# a step of some 25 rows are in 8 parts (`split_keys`), whose sum as a kernel of its own took 8.8 us a layer on an H200
_UNROLLED = 9


def compiled(forward: Callable[..., Returned]) -> Callable[..., Returned]:
    """`forward` under torch.compile, specialised for every shape that it meets."""
    optimised = torch.compile(forward, dynamic=False, options={"unroll_reductions_threshold": _UNROLLED})

    def run(*args) -> Returned:
        # each batch, number of rows and cache bucket is a compilation; torch gives up after 8 by default
        # hooks that a user adds later must be noticed
        limits = {"recompile_limit": 256, "skip_nnmodule_hook_guards": False}
        with torch._dynamo.config.patch(limits):  # type: ignore[attr-defined]
            return optimised(*args)

    return run


def refuse_compiled(base: nn.Module) -> None:
    """Refuses a base that its user has compiled: code of another's does not see what hooks of a step are told.

    Raises:
        UnsupportedModelError: naming the module.
    """
    for module in base.modules():
        own = vars(module)
        if own.get("_compiled_call_impl") is not None or hasattr(own.get("forward"), "_torchdynamo_orig_callable"):
            raise UnsupportedModelError(
                f"base: expected no torch.compile of your own beside a LoRA or a sampler head, found it on "
                f"{type(module).__name__}; pardec.load(..., compile=True) compiles steps"
            )
