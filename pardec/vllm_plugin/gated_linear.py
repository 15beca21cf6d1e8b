"""The gated LoRA on vLLM's linear layers, several of which run projections of the base as one.

Knows torch alone. Legend: N rows of a forward, r rank; a pair is A, shape [r, in], and B, shape [out, r].
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


class GatedLinear(nn.Module):
    """A linear layer as vLLM's are, with a LoRA that acts at the rows where the gate is open."""

    a: Tensor
    b: Tensor
    gate: Tensor

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, gate: Tensor):
        """Wraps a layer.

        Args:
            base: gives (output, bias).
            a: shape [in, sum of r].
            b: shape [sum of r, out].
            gate: 1 at open rows, else 0, shape [at least N, 1]; whoever runs the forward writes it.
        """
        super().__init__()
        self.base = base
        for name, tensor in (("a", a), ("b", b), ("gate", gate)):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The layer's output, shape [N, out], and its bias where it leaves that to others."""
        output, bias = self.base(x)
        return torch.addmm(output, (x @ self.a) * self.gate[: x.shape[0]], self.b), bias


def by_layer(pairs: Mapping[str, Pair], packed: Mapping[str, Sequence[str]]) -> dict[str, list[Pair | None]]:
    """Pairs of the layers of vLLM, by name: one for each projection that a layer runs, None where it has none.

    Args:
        pairs: by the name of the projection in the base.
        packed: projections that a layer runs, by the last part of its name; others run one of their own name.
    """
    layer_of = {part: (layer, place) for layer, parts in packed.items() for place, part in enumerate(parts)}
    found: dict[str, list[Pair | None]] = {}
    for name, pair in pairs.items():
        parent, _, part = name.rpartition(".")
        layer, place = layer_of.get(part, (part, 0))
        parts = found.setdefault(f"{parent}.{layer}", [None] * len(packed.get(layer, [part])))
        parts[place] = pair
    return found


def stacked(name: str, pairs: Sequence[Pair | None], *, sizes: Sequence[int], width: int, scaling: float) -> Pair:
    """The LoRA of projections that run as one: A, shape [in, sum of r], and B, [sum of r, sum of out], scaled.

    Args:
        name: of the layer, for what is said.
        pairs: of its projections, not all None.
        sizes: out of each projection; added up where there is but one.
        width: in.
        scaling: factor on B A x.

    Raises:
        ValueError: if a pair is of other sizes.
    """
    sizes = [sum(sizes)] if len(pairs) == 1 else sizes
    shapes = [(b.shape[0], a.shape[1]) for a, b in (pair for pair in pairs if pair)]
    expected = [(size, width) for size, pair in zip(sizes, pairs, strict=True) if pair]
    if shapes != expected:
        raise ValueError(f"lora: {name}: expected {expected} features, found {shapes}")
    some = next(pair for pair in pairs if pair)[1]
    a = torch.cat([pair[0].T for pair in pairs if pair], dim=1)
    nothing = [some.new_zeros(0, size) for size in sizes]
    b = torch.block_diag(*[pair[1].T if pair else none for pair, none in zip(pairs, nothing, strict=True)])
    return a.contiguous(), (b.float() * scaling).contiguous()
