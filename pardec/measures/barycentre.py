"""The law that has most in common with several laws: what one draft can do for all of them at once.

Knows numbers alone. Legend: N laws, V vocabulary; the overlap of p and q is sum min(p, q) = 1 - TV(p, q).
"""

from torch import Tensor


def barycentre(laws: Tensor, weights: Tensor) -> tuple[float, Tensor]:
    """The largest weighted mean of overlaps that one law q has with all of these, and q, shape [V], float64.

    Exact: raising q(v) from 0 gains the weights of those laws that are still above it at v, which can only fall while
    it rises. So q is filled where the gain is largest until it sums to 1, as linear programming would.

    Args:
        laws: shape [N, V].
        weights: shape [N], their sum 1.
    """
    laws, weights = laws.double(), weights.double()
    used = laws.any(dim=0).nonzero()[:, 0]
    levels, order = laws[:, used].sort(dim=0, descending=True)
    # between a level and the next lower one gain all laws that reach so high
    gains = weights[order].cumsum(dim=0)
    heights = levels.clone()
    heights[:-1] -= levels[1:]
    gain, place = gains.flatten().sort(descending=True, stable=True)
    height = heights.flatten()[place]
    before = height.cumsum(0) - height
    taken = (1 - before).clamp_min(0).minimum(height)
    q = laws.new_zeros(laws.shape[1])
    q.index_add_(0, used[place % len(used)], taken)
    return float((gain * taken).sum()), q


def mean_overlap(laws: Tensor, weights: Tensor, q: Tensor) -> float:
    """The weighted mean of overlaps that q, shape [V], has with the laws; arguments as in `barycentre`."""
    return float(weights.double() @ laws.double().minimum(q.double()).sum(dim=-1))
