"""Where mask embeddings start.

Knows the base's input embeddings alone.
Legend: D width of an input embedding.
"""

import torch
from torch import Tensor

from pardec.target.forward import TargetModel


@torch.no_grad()
def first_embeddings(target: TargetModel, rows: int, initialisation: str) -> Tensor:
    """So many rows, float32, shape [rows, D]: each the `mean` of all embeddings, or that of a `random_token`."""
    if initialisation == "random_token":
        return target.embed(torch.randint(target.vocab_size, (rows,), device=target.device)).float()
    return mean_embedding(target).repeat(rows, 1)


@torch.no_grad()
def mean_embedding(target: TargetModel, chunk_tokens: int = 16384) -> Tensor:
    """Mean input embedding over the vocabulary, shape [1, D], float32, in the space of the module's output."""
    total = torch.zeros(target.embedding_dim, dtype=torch.float64, device=target.device)
    for ids in torch.arange(target.vocab_size, device=target.device).split(chunk_tokens):
        total += target.embed(ids).double().sum(dim=0)
    return (total / target.vocab_size).float()[None]
