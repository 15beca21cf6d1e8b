"""Where the target's own next tokens stand in the dynamic trees that are drawn along its texts.

Teacher-forced along continuations that the target has emitted, see `place_rows`. The nodes of a dynamic tree come from
the likeliest on, so the tree of fewer nodes is the beginning of that of more, and one look serves all sizes.
Legend: B batch, P blocks of a forward, K num_speculative_tokens, N nodes.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pardec.decoding.drafting import HeadDrafter
from pardec.draft_tree import MAX_RANK, DynamicTree
from pardec.measures.place_rows import PlaceRows, look_by_place
from pardec.measures.share import ALL_OF_IT, Share
from pardec.model import SelfSpeculativeModel
from pardec.trees.drawing import Drawing, most_nodes


def drawn_rows_by_place(
    model: SelfSpeculativeModel,
    prompts: Sequence[list[int]],
    continuations: Sequence[list[int]],
    num_nodes: int,
    *,
    num_speculative_tokens: int | None = None,
    use_head: bool | None = None,
    batch_size: int = 16,
    share: Share = ALL_OF_IT,
) -> list[Tensor]:
    """Rows of the continuations' own tokens in the trees of N nodes at every place of each sequence, in order.

    Args:
        model: with an adapter.
        prompts: token ids, none empty.
        continuations: of each prompt, emitted by the model.
        num_nodes: N, at least K.
        num_speculative_tokens: K; default what the adapter was trained with.
        use_head: draw what the sampler head finds likeliest; default if the adapter has one.
        batch_size: sequences in one forward.
        share: the batches that this process looks at; results are of all.

    Returns:
        for each sequence a tensor [places, K, K], int64: at [t, s - 1, d] the row, from 1 to N, at which the first
        d + 1 tokens behind the bonus token end in the tree that is drawn from a run of s mask tokens; 0 where they are
        no path of it, or where the continuation has no such token.

    Raises:
        ValueError: as `pardec.measures.place_rows.look_by_place`.
    """
    return look_by_place(
        model,
        prompts,
        continuations,
        partial(_rows_of_paths, num_nodes),
        num_speculative_tokens=num_speculative_tokens,
        use_head=use_head,
        stride=1,
        batch_size=batch_size,
        share=share,
    )


def _rows_of_paths(num_nodes: int, head: HeadDrafter | None, rows: PlaceRows) -> Tensor:
    """Shape [B, P, K, K], see `drawn_rows_by_place`."""
    (B, P, K, V), device = rows.logits.shape, rows.logits.device
    num_ranked = min(MAX_RANK + 1 if head is None else head.shortlist, V)
    logits, wanted, bonus = rows.logits.flatten(0, 1), rows.wanted.flatten(0, 1), rows.before[:, :, 0].flatten()
    hidden = None if rows.hidden is None else rows.hidden.flatten(0, 1)
    found = wanted.new_zeros(B * P, K, K)
    for length in range(1, K + 1):
        # the nodes that are alive in a tree that is deeper, as only so many mask rows exist
        nodes = most_nodes(num_ranked, length, num_nodes)
        drawing = Drawing.of(DynamicTree((length, *(0,) * nodes)), device)
        run = None if hidden is None else hidden[:, :length]
        tree = drawing.draw(head, logits[:, :length], run, bonus, torch.full_like(bonus, length))
        row = torch.zeros_like(bonus)
        for depth in range(length):
            onward = (tree.parents == row[:, None]) & (tree.tokens == wanted[:, depth, None]) & (row[:, None] >= 0)
            place = onward.byte().argmax(dim=1)
            row = torch.where(onward.any(dim=1), place + 1, -1)
            found[:, length - 1, depth] = row.clamp_min(0)
    return found.view(B, P, K, K)
