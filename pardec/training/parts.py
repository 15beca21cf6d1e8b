"""A loss over the vocabulary, part by part: of rows x vocabulary nothing is alive but what one part needs.

A part is some whole blocks of some sequences, so that losses and weights of whole blocks can be made of it. Each is
differentiated as soon as it is there; what is kept of it is the gradient of its hidden states.
Legend: B sequences, T tokens, N blocks, M mask rows, H width of hidden states, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pardec.layout import TrainingLayout

# rows x vocabulary of a part: on a CPU 2 MiB in float32, which its cache holds, on a device 128 MiB; but so many rows
# that reading the head's weights for them pays
_ENTRIES_ON_CPU, _ENTRIES, _LEAST_ROWS = 2**19, 2**25, 64


@dataclass(frozen=True)
class Part:
    """Some whole blocks of some sequences, R rows in all, and the real rows whose law they follow.

    Attributes:
        sequences: which.
        blocks: which, of each of these sequences.
        rows: their rows, of the M.
        real_rows: b T + t of the real rows, each once, shape [U].
        follows: which of them each row follows, shape [R].
    """

    sequences: slice
    blocks: slice
    rows: slice
    real_rows: Tensor
    follows: Tensor

    def of(self, values: Tensor) -> Tensor:
        """Its rows of values of shape [B, M, ...], as [R, ...]."""
        return values[self.sequences, self.rows].flatten(0, 1)


def rows_at_once(vocab_size: int, device: torch.device) -> int:
    """Rows of a part, unless a single block has more."""
    return max(_LEAST_ROWS, (_ENTRIES_ON_CPU if device.type == "cpu" else _ENTRIES) // vocab_size)


def parts_of(layout: TrainingLayout, most_rows: int, device: torch.device) -> Iterator[Part]:
    """Parts of a layout whose tensors the host can read, each with about as many rows as asked for.

    Args:
        layout: on a CPU; the fewer real rows its neighbouring blocks follow, the fewer laws are made.
        most_rows: of a part; at least one block of one sequence is taken.
        device: where the parts' tensors are to be.
    """
    lengths, B, T = layout.block_lengths, layout.positions.shape[0], layout.num_tokens
    together = max(1, min(B, most_rows // max(lengths)))
    # a row at position s predicts what the real row at s predicts
    real_rows = torch.arange(B)[:, None] * T + layout.positions.clamp_max(T - 1)
    for b in range(0, B, together):
        sequences, first = slice(b, min(b + together, B)), 0
        while first < len(lengths):
            after, num_rows = first + 1, lengths[first]
            while after < len(lengths) and (num_rows + lengths[after]) * together <= most_rows:
                num_rows, after = num_rows + lengths[after], after + 1
            blocks = slice(first, after)
            rows, first = layout.rows_of(blocks), after
            if rows.stop == rows.start:
                continue
            each_once, follows = real_rows[sequences, rows].flatten().unique(return_inverse=True)
            yield Part(sequences, blocks, rows, each_once.to(device), follows.to(device))


def summed_by_parts(
    loss_of: Callable[[Part, Tensor], tuple[Tensor, Tensor]],
    parts: Sequence[Part],
    hidden: Tensor,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Sum of the parts' losses, with its gradient, and of what they measure, without one.

    Args:
        loss_of: loss, a scalar, and measures of a part and its hidden states, shape [R, H].
        parts: at least one.
        hidden: of all rows, shape [B, M, H].
        parameters: what else the losses depend on that is learned.
    """
    is_learning = torch.is_grad_enabled()
    return _Sum.apply(loss_of, parts, is_learning, hidden, *parameters)  # type: ignore[return-value]


class _Sum(torch.autograd.Function):
    """Losses of the parts, and in the same sweep their gradients."""

    @staticmethod
    def forward(ctx, loss_of, parts, is_learning: bool, hidden: Tensor, *parameters: Tensor):  # type: ignore[override]
        of_hidden = torch.zeros_like(hidden) if is_learning and hidden.requires_grad else None
        learned = [p for p in parameters if p.requires_grad] if is_learning else []
        of_learned = [torch.zeros_like(p) for p in learned]
        loss_sum, measured_sum = 0.0, 0.0
        for part in parts:
            rows = part.of(hidden).detach().requires_grad_(of_hidden is not None)
            with torch.set_grad_enabled(of_hidden is not None or bool(learned)):
                loss, measured = loss_of(part, rows)
            inputs = [*([rows] if of_hidden is not None else []), *learned]
            gradients = list(torch.autograd.grad(loss, inputs, materialize_grads=True)) if inputs else []
            if of_hidden is not None:
                of_rows = gradients.pop(0)
                into = of_hidden[part.sequences, part.rows]
                into.copy_(of_rows.view_as(into))
            for total, gradient in zip(of_learned, gradients, strict=True):
                total += gradient
            loss_sum, measured_sum = loss_sum + loss.detach(), measured_sum + measured
        found = iter(of_learned)
        ctx.gradients = (of_hidden, *(next(found) if p in set(learned) else None for p in parameters))
        ctx.mark_non_differentiable(measured_sum)
        return loss_sum, measured_sum

    @staticmethod
    def backward(ctx, slope: Tensor, _):  # type: ignore[override]
        return None, None, None, *(None if one is None else one * slope for one in ctx.gradients)
