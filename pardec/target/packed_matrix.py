"""A weight matrix in the form that oneDNN packs it into, multiplied in eager and in compiled code.

torch.compile can neither trace nor guard a tensor of oneDNN's own layout, so there the product is an operator that
knows the matrix by number.
"""

import itertools
import weakref

import torch
from torch import Tensor

# rows that oneDNN packs for; any other number is computed correctly, thousands as fast as if packed for them
_TYPICAL_ROWS = 16
_numbers = itertools.count()
_alive: "weakref.WeakValueDictionary[int, PackedMatrix]" = weakref.WeakValueDictionary()


class PackedMatrix:
    """x -> x W^T + bias on a CPU, for few rows faster than from W as it lies.

    Compiled code that holds the product does not keep it alive: whoever runs it does.

    Attributes:
        num_inputs: length of x.
        num_outputs: length of what comes of it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        """Packs a copy of `weight`, shape [out, in], float32 or bfloat16; `bias` of shape [out] is kept as it is."""
        self.num_outputs, self.num_inputs = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _TYPICAL_ROWS)
        self._bias = bias
        self._product = torch.ops.mkldnn._linear_pointwise.default
        self._sum = torch.ops.mkldnn._linear_pointwise.binary
        self._number = next(_numbers)
        _alive[self._number] = self

    def __call__(self, x: Tensor) -> Tensor:
        """The product for x, shape [..., in]; shape [..., out]."""
        if torch.compiler.is_compiling():
            return torch.ops.pardec.packed_product(x, self._number, self.num_outputs)
        return self._product(x, self._packed, self._bias, "none", [], "")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """The product and `other` of its shape, rounded once."""
        if torch.compiler.is_compiling():
            return torch.ops.pardec.packed_sum(x, other, self._number)
        return self._sum(x, other, self._packed, self._bias, "add")


def _multiply(x: Tensor, number: int, num_outputs: int) -> Tensor:
    matrix = _alive[number]
    return matrix._product(x, matrix._packed, matrix._bias, "none", [], "")


def _shape_alone(x: Tensor, number: int, num_outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], num_outputs)


def _multiply_and_add(x: Tensor, other: Tensor, number: int) -> Tensor:
    matrix = _alive[number]
    return matrix._sum(x, other, matrix._packed, matrix._bias, "add")


def _shape_of_sum(x: Tensor, other: Tensor, number: int) -> Tensor:
    return other.new_empty(other.shape)


_library = torch.library.Library("pardec", "DEF")
_library.define("packed_product(Tensor x, int number, int num_outputs) -> Tensor")
_library.impl("packed_product", _multiply, "CPU")
_library.impl("packed_product", _shape_alone, "Meta")
_library.define("packed_sum(Tensor x, Tensor other, int number) -> Tensor")
_library.impl("packed_sum", _multiply_and_add, "CPU")
_library.impl("packed_sum", _shape_of_sum, "Meta")
