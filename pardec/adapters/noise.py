"""Random tokens at mask rows instead of mask embeddings: which token stands where.

In training they are drawn anew for every row. In decoding they come from a table, the same in every process, so that
steps are reproducible, draw nothing and can be captured. Knows token ids only.
Legend: B batch, M mask rows.

Source: Uno, arXiv:2609.04010 (a LoRA that acts on draft rows only, which hold uniformly random tokens).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_SEED = 0
# no two rows of one forward may read the same place: their positions are less than 1,024 apart, or their depths differ
_POSITIONS, _DEPTHS = 1024, 64


@dataclass(frozen=True)
class NoiseTokens:
    """Token ids, uniform over a vocabulary, by position in the sequence and depth in a block.

    Attributes:
        table: shape [1024, 64], int64, of the position modulo 1024 and the depth modulo 64.
    """

    table: Tensor

    @classmethod
    def of(cls, vocab_size: int, device: torch.device) -> "NoiseTokens":
        """The table of a vocabulary; it depends on its size and on nothing else."""
        generator = torch.Generator().manual_seed(_SEED)  # a CPU's draws are the same everywhere
        return cls(torch.randint(vocab_size, (_POSITIONS, _DEPTHS), generator=generator).to(device))

    def at(self, positions: Tensor, depths: Tensor) -> Tensor:
        """Ids of mask rows, shape [B, M].

        Args:
            positions: in the sequence, shape [B, M], int64.
            depths: 0-based index of each row within its block, shape [M], int64.
        """
        return self.table[positions % _POSITIONS, depths % _DEPTHS]
