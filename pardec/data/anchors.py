"""Which tokens of a sequence blocks of mask tokens stand behind: drawn evenly, or more often where the data mark them.

Knows no files. Legend: T tokens of a sequence, N anchors.
"""

import torch
from torch import Tensor

from pardec.data.row_checks import DataError
from pardec.data.tokenising import Document


def draw_anchors(candidates: Tensor, num_anchors: int, generator: torch.Generator) -> Tensor:
    """N of the candidates in random order, all of them where there are fewer."""
    return candidates[torch.randperm(len(candidates), generator=generator)[:num_anchors]]


def draw_marked_anchors(
    candidates: Tensor, is_marked: Tensor, num_anchors: int, times: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The same, marked ones `times` as likely as others, as far as there are enough, and what each has to count.

    Both kinds are drawn evenly, each as many as its share says, which is rounded at random. Sums in which each anchor
    counts so are on average those of even draws: their weights are inverse to how likely they are drawn.

    Args:
        candidates: shape [C].
        is_marked: of each, shape [C], bool.
        num_anchors: N.
        times: above 0.
        generator: of the draws.

    Returns:
        anchors, shape [min(N, C)], in random order; weights of the same shape.

    Source: the estimator of Horvitz and Thompson (1952), of sums over strata.
    """
    marked, others = candidates[is_marked], candidates[~is_marked]
    num, M, U = min(num_anchors, len(candidates)), len(marked), len(others)
    if not M or not U:
        return draw_anchors(candidates, num, generator), torch.ones(num)
    expected = min(max(num * times * M / (times * M + U), num - U), M)
    num_marked = int(expected + float(torch.rand((), generator=generator)))
    chosen = torch.cat([draw_anchors(marked, num_marked, generator), draw_anchors(others, num - num_marked, generator)])
    of_marked, of_others = (count / share for count, share in ((M, expected), (U, num - expected)))
    weights = torch.tensor([of_marked] * num_marked + [of_others] * (num - num_marked)) * num / len(candidates)
    order = torch.randperm(num, generator=generator)
    return chosen[order], weights[order]


def check_marks(first: Document, where: str) -> None:
    """Refuses data without marks where some anchors are to be drawn more often.

    Args:
        first: sequence of the data.
        where: named in the error.

    Raises:
        DataError: if it has no `marked`.
    """
    if first.marked is None:
        raise DataError(
            f"{where}: expected rows with input_ids, loss_mask and marked (train.marked), found none marked"
        )
