"""Hidden states as the output head reads them, of an unmodified model: a hook in front of that head.

Knows no layout and no adapter.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def rows_of_each(x: Tensor, rows: Tensor) -> Tensor:
    """x[b, rows[b, i]], shape [B, n, W], for x of shape [B, R, W] and rows of shape [B, n]."""
    return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))


class _Seen(threading.local):
    hidden: Tensor | None = None


def _output_head(base: PreTrainedModel) -> nn.Module:
    output = base.get_output_embeddings()
    weight = getattr(output, "weight", None)
    is_matrix = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2
    if not isinstance(output, nn.Module) or not is_matrix:
        raise ValueError("adapter.head: expected a base whose output head has a weight matrix, found none")
    return output


class HiddenTap:
    """Keeps what the output head read in the last forward of this thread, while attached."""

    def __init__(self, base: PreTrainedModel):
        """Takes a base with an output head.

        Raises:
            ValueError: if it has none, or one without a weight matrix to score candidates with.
        """
        self._base, self._output = base, _output_head(base)
        self._here = _Seen()
        self._traced: Tensor | None = None

    @property
    def output_embeddings(self) -> Tensor:
        """Shape [V, H]."""
        return self._output.weight  # type: ignore[return-value]

    @property
    def has_seen(self) -> bool:
        """Whether there was such a forward."""
        return self._here.hidden is not None

    @property
    def hidden(self) -> Tensor:
        """Shape [..., H], rows as they are in the logits of the last forward."""
        # torch 2.11 reads from a `threading.local` what stood there before the code that it compiles
        hidden = self._traced if torch.compiler.is_compiling() else self._here.hidden
        assert hidden is not None
        return hidden

    def keep(self, rows: Tensor) -> None:
        """Keeps only some rows of each sequence, as `rows` of the logits were; shape [B, n], int64."""
        self._here.hidden = rows_of_each(self.hidden, rows)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Keeps the hook on the output head for the time of the context; contexts may overlap.

        Raises:
            ValueError: if the base has come to have another, without a weight matrix.
        """
        self._output = _output_head(self._base)  # which may have been replaced since
        handle = self._output.register_forward_pre_hook(self._see)
        try:
            yield
        finally:
            handle.remove()
            self._here.hidden = None

    def _see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden = args[0] if args else None
        if torch.compiler.is_compiling():
            self._traced = hidden
        else:
            self._here.hidden = hidden


def is_tap(hook: object) -> bool:
    """Whether a hook in front of a layer is that of a tap, which only looks."""
    return isinstance(getattr(hook, "__self__", None), HiddenTap)
