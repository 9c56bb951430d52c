"""The mean of a run's last models: what is evaluated and written where ``aggregation.average_last`` asks for it.

Under noise every model is a random step away from the last; their mean is steadier than any of them (De et al., arXiv
2204.13650, average iterates likewise). It is made from models that were released anyway: post-processing, which costs
no epsilon, and no site hears of it.
"""

from collections.abc import Mapping
from math import ceil

import numpy as np
from numpy.typing import NDArray

from clinifed.messages import Parameters

__all__ = ["Totals", "add_model", "first_averaged", "mean_model"]

Totals = dict[str, NDArray[np.float64]]  # name → sum over the averaged rounds' models


def first_averaged(rounds: int, share: float) -> int:
    """The first of ``rounds`` rounds whose models are averaged; ``rounds`` itself where none is.

    Args:
        share: of the rounds, in [0, 1]: the last ceil(share · rounds) are averaged.
    """
    return rounds - ceil(share * rounds - 1e-9)  # 0.7 · 10 is a little more than 7


def add_model(totals: Mapping[str, NDArray[np.float64]], model: Mapping[str, NDArray[np.float32]]) -> Totals:
    """``totals`` with one more model; empty ones count as zero. What is given is not changed."""
    return {name: totals.get(name, 0.0) + value.astype(np.float64) for name, value in model.items()}


def mean_model(totals: Mapping[str, NDArray[np.float64]], models: int) -> Parameters:
    """The mean of ``models`` ≥ 1 models of which ``totals`` is the sum, float32."""
    return {name: (value / models).astype(np.float32) for name, value in totals.items()}
