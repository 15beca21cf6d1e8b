"""The rows at which a LoRA's gate is open, and the LoRA's two products there.

Knows no modules and no hooks. Legend: B batch, R rows, M open rows, r rank.
"""

import threading

import torch
from torch import Tensor, nn

from pardec.target.packed_matrix import PackedMatrix


class OpenRows:
    """Closed where `rows` is None.

    Attributes:
        rows: of the coming forward: a slice of its rows, or an index of shape [B, M], int64.
        shape: its (B, R).
    """

    def __init__(self) -> None:
        self.rows: slice | Tensor | None = None
        self.shape: tuple[int, int] = (0, 0)
        # the last product for layers that read one input: their A, that input as it then was, and A x
        self._stack: Tensor | None = None
        self._input: Tensor | None = None
        self._version = 0
        self._low: Tensor | None = None

    def close(self) -> None:
        """Closes the gate and lets go of what a forward has left here."""
        self.rows = self._stack = self._input = self._low = None

    def unflatten(self, x: Tensor) -> Tensor:
        """Some models flatten batch and rows for a part of a layer; the view shares memory with what they return.

        Raises:
            ValueError: if x has other rows than the coming forward.
        """
        B, R = self.shape
        if x.dim() != 2 or x.shape[0] != B * R:
            raise ValueError(f"lora: expected module inputs of {(B, R)} rows, found {tuple(x.shape)}")
        return x.view(B, R, -1)

    def low(self, given: Tensor, x: Tensor, a_t: Tensor, shared: tuple[Tensor, slice] | None) -> Tensor:
        """A x of the open rows, as `rows_of` gives them: made once for layers that share their input.

        Args:
            given: the input as the layer was given it, by which others know it again.
            x: the same in shape [B, R, in].
            a_t: the layer's own A, shape [in, r].
            shared: A of the layers that read this input, shape [in, sum r], and the columns that are this layer's.
        """
        assert self.rows is not None
        # compiled code would remember one input and no other; tensors of inference mode do not count their versions,
        # so that nobody could tell if one was written to
        if shared is None or torch.compiler.is_compiling() or given.is_inference():
            return rows_of(x, self.rows) @ a_t
        stack, columns = shared
        if self._stack is not stack or self._input is not given or self._version != given._version:
            self._low = None  # its memory may serve again
            self._stack, self._input, self._version = stack, given, given._version
            self._low = rows_of(x, self.rows) @ stack
        assert self._low is not None
        return self._low[..., columns]


class OpenRowsOfThread(OpenRows, threading.local):
    """Every thread has its own."""


def rows_of(x: Tensor, rows: slice | Tensor) -> Tensor:
    """Some rows of x, shape [B, R, n]: [M, n] of one sequence by a slice, else [B, M, n]."""
    if isinstance(rows, Tensor):
        return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))
    return x[0, rows] if x.shape[0] == 1 else x[:, rows]


def add_product(output: Tensor, low: Tensor, b: Tensor | PackedMatrix, rows: slice | Tensor) -> None:
    """Adds B A x to some rows of `output`, in place.

    Args:
        output: shape [B, R, out].
        low: A x of the rows, as `rows_of` gives them.
        b: B, as a tensor transposed, shape [r, out], or packed.
        rows: a slice of the rows, or an index of shape [B, M].
    """
    if isinstance(rows, Tensor):
        _add_at(output, rows, b(low) if isinstance(b, PackedMatrix) else low @ b)
    elif isinstance(b, Tensor) and output.shape[0] > 1:
        output[:, rows].baddbmm_(low, b.expand(output.shape[0], -1, -1))
    else:
        _add_to_all(rows_of(output, rows), low, b)


def add_beside(wide: Tensor, b: Tensor | PackedMatrix, rows: slice | Tensor) -> None:
    """`add_product` where output and A x of every row lie side by side in `wide`, shape [B, R, out + r]."""
    r, num_outputs = (b.num_inputs, b.num_outputs) if isinstance(b, PackedMatrix) else b.shape
    if isinstance(rows, slice) and wide.shape[0] == 1:
        # taking the rows first is two views less, which a step would make at every layer
        output, low = wide[0, rows].split_with_sizes((num_outputs, r), dim=-1)
        _add_to_all(output, low, b)
    else:
        output, low = wide.split_with_sizes((num_outputs, r), dim=-1)
        add_product(output, rows_of(low, rows), b, rows)


def sum_to_read(output: Tensor, low: Tensor, b: Tensor, rows: slice) -> Tensor:
    """What `add_product` would leave, as a new tensor, for torch.compile: whoever reads it makes the sum on the way.

    In place compiled code would copy the rows to add the product to, one launch for every product. Not as `torch.cat`,
    which it does not always fuse, nor with a sum of two dimensions, which it takes for the product's bias.
    """
    added = low @ b
    added = added if added.dim() == 3 else added[None]
    return output + nn.functional.pad(added, (0, 0, rows.start, output.shape[1] - rows.stop))


def _add_at(output: Tensor, rows: Tensor, added: Tensor) -> None:
    """Adds `added`, shape [B, M, out], to the rows of an index of shape [B, M], none of them twice."""
    # a CPU's scatter in half precision copies all of the output; a GPU's is none of torch's deterministic algorithms
    sequence = torch.arange(output.shape[0], device=rows.device)[:, None]
    output[sequence, rows] = output[sequence, rows] + added


def _add_to_all(output: Tensor, low: Tensor, b: Tensor | PackedMatrix) -> None:
    if isinstance(b, PackedMatrix):
        output.copy_(b.plus(low, output))
    else:
        output.addmm_(low, b)


def add_cast(output: Tensor, x: Tensor, a_t: Tensor, b_t: Tensor, rows: slice | Tensor) -> None:
    """Adds `x @ a_t @ b_t`, computed in their dtype, to some rows of an `output` of another one, in place.

    Args: as in `add_product`; x: shape [B, R, in].
    """
    added = (x.to(a_t.dtype) @ a_t @ b_t).to(output.dtype)
    if isinstance(rows, slice):
        output[:, rows] += added[:, rows]
    else:
        _add_at(output, rows, rows_of(added, rows))
