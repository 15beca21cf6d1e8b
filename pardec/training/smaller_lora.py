"""A LoRA cut down to fewer layers and a lower rank: where a cheaper one begins.

Every row that a LoRA acts on pays for each of its layers. What is left out is best learned anew by what remains.
Knows weights, no training and no base. Legend: r rank before, s rank after.
"""

import torch
from torch import Tensor, nn

from pardec.adapters.gated_lora import LoraWeights


def cut_lora(weights: LoraWeights, present: LoraWeights) -> LoraWeights:
    """`weights` with the layers, rank and scaling of `present`, a LoRA that has learned nothing.

    A lower rank is the best approximation of each layer's product in the Frobenius norm (Eckart and Young 1936). Where
    the product has fewer ranks than that, the others begin as in `present`: nothing would ever be learned from A = 0
    and B = 0.

    Raises:
        ValueError: if `present` has layers of other shapes, or that `weights` lacks, or a higher rank.
    """
    theirs, ours = weights.pairs(), present.pairs()
    lacking = [name for name in ours if name not in theirs]
    if lacking or present.rank > weights.rank:
        found = f"none for {lacking[0]}" if lacking else f"r {weights.rank}"
        raise ValueError(
            f"adapter.start_from: expected a LoRA of r {present.rank} or more for all layers of the recipe, "
            f"found {found}"
        )
    halves, factor = {}, weights.scaling / present.scaling
    for name, (own_a, own_b) in ours.items():
        a, b = theirs[name]
        if (a.shape[1], b.shape[0]) != (own_a.shape[1], own_b.shape[0]):
            expected, found = (own_b.shape[0], own_a.shape[1]), (b.shape[0], a.shape[1])
            raise ValueError(f"adapter.start_from: LoRA of {name}: expected {expected} features, found {found}")
        halves[name] = _of_rank(a, b, own_a, factor)
    return LoraWeights(present.config, {key: _half_of(key, halves) for key in present.tensors})


def _half_of(key: str, halves: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    name, _, half = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
    return halves[name][half == "lora_B"]


def _of_rank(a: Tensor, b: Tensor, fresh: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """A, shape [s, in], and B, shape [out, s], whose product is nearest to `factor` B A; `fresh` an A to learn from."""
    rank = fresh.shape[0]
    if rank == a.shape[0]:
        return a, b if factor == 1 else b * factor
    # the singular values of B A are those of a small matrix, at most r x r
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    left, values, right = torch.linalg.svd(factor * r_b @ r_a.T)
    noise = torch.finfo(values.dtype).eps * a.shape[0] * values[0]
    n = min(rank, int((values > noise).sum()))
    root = values[:n].sqrt()
    shorter = torch.cat([(root[:, None] * right[:n]) @ q_a.T, fresh[n:].double()])
    narrower = nn.functional.pad(q_b @ left[:, :n] * root, (0, rank - n))
    return shorter.to(a.dtype).contiguous(), narrower.to(b.dtype).contiguous()
