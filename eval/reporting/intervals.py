"""Intervals of figures that are sums over texts."""

import numpy as np

from pardec.measures.acceptance import BOOTSTRAP_SAMPLES


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray) -> list[float]:
    """95 % of the ratio of two sums over the same texts, by bootstrap over them; each of shape [texts]."""
    num_texts = len(denominators)
    draws = np.random.default_rng(0).integers(num_texts, size=(BOOTSTRAP_SAMPLES, num_texts))
    ratios = numerators[draws].sum(axis=1) / denominators[draws].sum(axis=1)
    return [round(float(x), 4) for x in np.percentile(ratios, [2.5, 97.5])]
