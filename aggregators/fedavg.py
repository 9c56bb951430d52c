"""Federated averaging: one parameter as the weighted mean over the sites that sent it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from clinifed.config import Aggregation

__all__ = ["weighted_mean"]


def weighted_mean(
    values: Sequence[NDArray[np.float32]], weights: Sequence[float], settings: Aggregation
) -> NDArray[np.float64]:
    """The weighted mean (McMahan et al., arXiv 1602.05629, Algorithm 1, on differences instead of models).

    Args:
        values: one array per site, all of one shape, in the order of the sites' names; at least one.
        weights: one per array, > 0, from the contract.
        settings: not read.

    Returns:
        float64, of the shape of one array.

    Guarantees:
        - The weights are normalised over the arrays given: sites that are missing pull nothing towards zero.
        - Equal arrays average to themselves, to the last bit of float32.
    """
    total = np.zeros(values[0].shape, dtype=np.float64)
    for value, weight in zip(values, weights, strict=True):  # a sum, not a stack: one array of float64 at a time
        total += weight * value.astype(np.float64)
    total /= sum(weights)
    return total
