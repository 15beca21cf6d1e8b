"""Which rows a forward has, where they sit, and which of them see which: index arithmetic only.

Knows no model and no cache.
Legend: B sequences, K num_speculative_tokens, R rows of a forward, N anchors, T tokens of a sequence, M mask rows.
The shape of a fused tree is given by its nodes' parents and the mask tokens behind each, see `tree_layout`.
The shape of a fused chain is given by its block_lengths, K + 1 numbers from 0 to K of which K is the largest: behind i
accepted drafts, block_lengths[i] tokens are drafted next. With L copied tokens behind the drafts there are L more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BlockLengths = tuple[int, ...]
PLAIN: BlockLengths = (0,)  # plain decoding
MAX_SPECULATIVE_TOKENS = 64  # a fused step has (K + 1)^2 rows
MAX_COPY_TOKENS = 128  # behind them, a row each


@dataclass(frozen=True)
class RowLayout:
    """The rows of one decoding forward, relative to the number of committed tokens.

    Attributes:
        num_real: rows that hold real tokens (bonus token, drafts, copied tokens); they come first.
        offsets: position of each row minus the number of committed tokens, shape [R], int64.
        visible: whether row r (first index) attends to row s (second index), shape [R, R], bool.
            Every row also attends to all committed tokens.
        mask_indices: which mask token (0..K-1) each mask row holds, shape [R - num_real], int64.
    """

    num_real: int
    offsets: Tensor
    visible: Tensor
    mask_indices: Tensor

    @property
    def num_rows(self) -> int:
        """Rows of the forward, real ones and mask rows."""
        return self.offsets.shape[0]

    def to(self, device: torch.device) -> "RowLayout":
        """The same layout with its tensors on `device`."""
        return RowLayout(self.num_real, self.offsets.to(device), self.visible.to(device), self.mask_indices.to(device))


def real_layout(num_rows: int) -> RowLayout:
    """`num_rows` real tokens in a row: plain decoding (1) and the verifying forward of two_pass (K + 1)."""
    ones = torch.ones(num_rows, num_rows, dtype=torch.bool)
    return RowLayout(num_rows, torch.arange(num_rows), ones.tril(), torch.empty(0, dtype=torch.long))


def block_layout(num_speculative_tokens: int) -> RowLayout:
    """One real token and the block of K mask tokens behind it: the drafting forward of two_pass.

    Source: PaSS, arXiv:2311.13581, section 3 (look-ahead tokens behind the last token).
    """
    K = num_speculative_tokens
    ones = torch.ones(K + 1, K + 1, dtype=torch.bool)
    return RowLayout(1, torch.arange(K + 1), ones.tril(), torch.arange(K))


def full_blocks(num_speculative_tokens: int) -> BlockLengths:
    """Block lengths of the full fused chain: K mask tokens behind each of the K + 1 real rows."""
    return (num_speculative_tokens,) * (num_speculative_tokens + 1)


def check_block_lengths(block_lengths: Sequence[int], copy_tokens: int = 0) -> BlockLengths:
    """The same as a tuple.

    Raises:
        ValueError: unless these are K + 1 numbers from 0 to K of which K is the largest, and one more for each copied
            token, or if K is above `MAX_SPECULATIVE_TOKENS`.
    """
    blocks, most = tuple(block_lengths), MAX_SPECULATIVE_TOKENS + 1 + copy_tokens
    if len(blocks) > most:
        raise ValueError(f"block_lengths: expected at most {most}, found {len(blocks)}")
    if not blocks or min(blocks) < 0 or max(blocks) != len(blocks) - 1 - copy_tokens:
        count = f"K + 1 + {copy_tokens}" if copy_tokens else "K + 1"
        raise ValueError(
            f"block_lengths: expected {count} numbers from 0 to K of which K is the largest, found {blocks}"
        )
    return blocks


def chain_layout(block_lengths: Sequence[int]) -> RowLayout:
    """The fused chain `[bonus, d1..dK, copies | block_0 .. block_K ..]`, with `full_blocks(K)` (K + 1)^2 rows.

    block_i hangs behind real row i: its mask token j (1..block_lengths[i]) sits at offset i + j and sees real rows
    0..i and its own mask tokens up to j. Whatever number a of them is accepted, block_a holds the next drafts.
    `(0,)` is plain decoding.

    Args:
        block_lengths: mask tokens behind each real row, K + 1 numbers in 0..K, and one for each copied token.
    """
    return tree_layout(range(len(block_lengths) - 1), block_lengths)


def tree_layout(parents: Sequence[int], runs: Sequence[int]) -> RowLayout:
    """The fused tree `[bonus, node_1..node_N | run_0 .. run_N]`; of nodes with one child each it is the chain.

    A node sees the nodes that it descends from, the bonus token among them, and itself. run_i is a block behind real
    row i, which sees what row i sees and its own mask tokens up to each. Siblings share their positions.

    Args:
        parents: row of each node's parent, N numbers, each below the node's own row.
        runs: mask tokens behind each real row, N + 1 numbers.

    Source: token trees of SpecInfer, arXiv:2305.09781; mask tokens behind every node as in PPD, arXiv:2405.18628.
    """
    num_real, num_mask = len(runs), sum(runs)
    sees, depths = torch.eye(num_real, dtype=torch.bool), [0]
    for row, parent in enumerate(parents, start=1):
        sees[row] |= sees[parent]
        depths.append(depths[parent] + 1)
    depths, lengths = torch.tensor(depths), torch.tensor(runs)
    block = torch.arange(num_real).repeat_interleave(lengths)  # the real row that each mask row hangs behind
    within = torch.arange(num_mask) - block_starts(runs)[block] + num_real  # 0-based index within its block
    offsets = torch.cat([depths, depths[block] + within + 1])
    visible = torch.zeros(num_real + num_mask, num_real + num_mask, dtype=torch.bool)
    visible[:num_real, :num_real] = sees
    visible[num_real:, :num_real] = sees[block]
    visible[num_real:, num_real:] = (block[:, None] == block) & (within[:, None] >= within)
    return RowLayout(num_real, offsets, visible, within)


def block_starts(block_lengths: Sequence[int]) -> Tensor:
    """Row of the first mask token of each block of a fused chain, shape of `block_lengths`."""
    lengths = torch.tensor(block_lengths)
    return len(block_lengths) + lengths.cumsum(0) - lengths


def next_blocks(block_lengths: Sequence[int], copy_tokens: int = 0) -> Tensor:
    """By real row, the rows of the block behind it, which hold the next drafts, and its length: [real rows, K + 1].

    In a chain that is by number of accepted tokens. Rows behind the end of a short block repeat its last one; behind an
    empty block stands any row.

    Args:
        block_lengths: mask tokens behind each real row.
        copy_tokens: real rows beyond K + 1: copied tokens, or further nodes of a tree.
    """
    K, rows = len(block_lengths) - 1 - copy_tokens, []
    num_rows = len(block_lengths) + sum(block_lengths)
    for start, length in zip(block_starts(block_lengths).tolist(), block_lengths, strict=True):
        ends = min(start + max(length, 1), num_rows)
        rows.append([min(start + j, ends - 1) for j in range(K)] + [length])
    return torch.tensor(rows)


@dataclass(frozen=True)
class TrainingLayout:
    """The mask rows of a training forward: N blocks of up to K mask tokens over sequences of T real tokens.

    Attributes:
        positions: shape [B, M], int64; mask token j (1..K) behind anchor s sits at s + j.
        targets: index of the token that each row predicts, shape [B, M]; position + 1, may be >= T.
        behind: each row's anchor, shape [B, M].
        blocks: which block each row belongs to, 0..N-1, shape [M].
        depths: 0-based index of each row within its block, shape [M].
        block_lengths: mask tokens of each block, N numbers.
        num_tokens: T.
    """

    positions: Tensor
    targets: Tensor
    behind: Tensor
    blocks: Tensor
    depths: Tensor
    block_lengths: tuple[int, ...]
    num_tokens: int

    @property
    def sees_real(self) -> Tensor:
        """Real tokens that each row sees, up to and including its block's anchor, shape [B, M, T], bool."""
        return torch.arange(self.num_tokens, device=self.behind.device) <= self.behind[:, :, None]

    @property
    def visible(self) -> Tensor:
        """Whom each row sees, shape [B, M, T + M], bool: real tokens first, then the earlier rows of its own block."""
        own = (self.blocks[:, None] == self.blocks) & (self.depths[:, None] >= self.depths)
        return torch.cat([self.sees_real, own.expand(self.positions.shape[0], -1, -1)], dim=2)

    def rows_of(self, blocks: slice) -> slice:
        """Rows of neighbouring blocks."""
        first = sum(self.block_lengths[: blocks.start])
        return slice(first, first + sum(self.block_lengths[blocks]))

    def part(self, sequences: slice, blocks: slice) -> "TrainingLayout":
        """Some neighbouring blocks of some sequences, as a layout of its own."""
        rows = self.rows_of(blocks)
        return TrainingLayout(
            self.positions[sequences, rows],
            self.targets[sequences, rows],
            self.behind[sequences, rows],
            self.blocks[rows] - blocks.start,
            self.depths[rows],
            self.block_lengths[blocks],
            self.num_tokens,
        )

    def to(self, device: torch.device) -> "TrainingLayout":
        """The same layout with its tensors on `device`."""
        return TrainingLayout(
            self.positions.to(device),
            self.targets.to(device),
            self.behind.to(device),
            self.blocks.to(device),
            self.depths.to(device),
            self.block_lengths,
            self.num_tokens,
        )


def training_layout(anchors: Tensor, block_lengths: Sequence[int], num_tokens: int) -> TrainingLayout:
    """Rows, positions and visibility of the mask rows behind `anchors`.

    A block sees the real tokens up to and including its anchor and its own earlier mask tokens, nothing else.

    Args:
        anchors: positions of the anchors, shape [B, N], int64, in 0..T-1.
        block_lengths: mask tokens behind each of the N anchors.
        num_tokens: T.
    """
    lengths = torch.tensor(block_lengths)
    blocks = torch.arange(len(lengths)).repeat_interleave(lengths)
    depths = (torch.arange(len(blocks)) - (lengths.cumsum(0) - lengths)[blocks]).to(anchors.device)
    blocks = blocks.to(anchors.device)
    behind = anchors[:, blocks]
    positions = behind + depths + 1
    return TrainingLayout(positions, positions + 1, behind, blocks, depths, tuple(block_lengths), num_tokens)


def sorted_anchors(anchors: Tensor, block_lengths: Sequence[int]) -> Tensor:
    """Anchors, shape [B, N], with those of neighbouring blocks of one length rising: the same blocks in another order.

    Neighbours then see about the same real tokens and follow about the same rows of them.
    """
    _, sizes = torch.tensor(block_lengths).unique_consecutive(return_counts=True)
    return torch.cat([of_length.sort(dim=1).values for of_length in anchors.split(sizes.tolist(), dim=1)], dim=1)


def nested_block_lengths(num_anchors: int, num_speculative_tokens: int, ratio: float, floor: float) -> tuple[int, ...]:
    """Lengths of N blocks when at depth j only a share max(floor, ratio^(j-1)) of them is kept, in falling order.

    A mask token is kept only where those before it in its block are. Which blocks are long is decided by their order,
    so anchors must come in random order.

    Args:
        num_anchors: N.
        num_speculative_tokens: K.
        ratio: in (0, 1]; 1 keeps everything.
        floor: in [0, 1].

    Source: nested token dropping of PARD, arXiv:2504.18583, section 3.3 (conditional drop).
    """
    kept = blocks_by_depth(num_anchors, num_speculative_tokens, ratio, floor)
    return tuple(sum(number > block for number in kept) for block in range(num_anchors))


def blocks_by_depth(num_anchors: int, num_speculative_tokens: int, ratio: float, floor: float) -> tuple[int, ...]:
    """How many of the blocks of `nested_block_lengths` have each of their K mask tokens; together all mask rows."""
    shares = [max(floor, ratio**j) for j in range(num_speculative_tokens)]
    return tuple(max(1, round(share * num_anchors)) for share in shares)
