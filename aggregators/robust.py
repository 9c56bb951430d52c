"""Rules that a minority of hostile or broken sites cannot drag away, coordinate by coordinate.

They count every site once and ignore weights: a weight would be a lever for the site that has it. They need at least
``MIN_SITES`` sites for a parameter; with fewer, no rule can tell the odd one out, and the parameter keeps its value.
Under differential privacy honest updates are mostly noise: an attack smaller than that noise is not noticed by these
rules, nor by others.
"""

import math
from collections.abc import Sequence
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from clinifed.config import Aggregation
from clinifed.errors import ConfigError

__all__ = ["MIN_SITES", "cut_at_each_end", "median", "trimmed_mean"]

MIN_SITES = 5  # the fewest of which a fifth, cut at each end, is one site


def _ordered(values: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The values of all sites, coordinate by coordinate in ascending order, [sites, *shape] in float32."""
    stacked = np.stack(values)
    stacked.sort(axis=0)
    return stacked


def median(
    values: Sequence[NDArray[np.float32]], weights: Sequence[float], settings: Aggregation
) -> NDArray[np.float64]:
    """The median of every coordinate (Yin et al., arXiv 1803.01498, Option I of Algorithm 1).

    Args:
        values: one array per site, all of one shape; at least one. Of an even number the middle two are averaged.
        weights: ignored; every site counts once.
        settings: not read.

    Returns:
        float64, of the shape of one array.

    Guarantees:
        - While fewer than half of the sites are hostile, every coordinate stays in the range of the honest ones.
        - Equal arrays have themselves as median, to the bit.
    """
    ordered, count = _ordered(values), len(values)
    low, high = ordered[(count - 1) // 2], ordered[count // 2]
    return np.asarray((low.astype(np.float64) + high.astype(np.float64)) / 2)


def trimmed_mean(
    values: Sequence[NDArray[np.float32]], weights: Sequence[float], settings: Aggregation
) -> NDArray[np.float64]:
    """The mean of every coordinate without its extremes (Yin et al., arXiv 1803.01498, Option II of Algorithm 1).

    Args:
        values: one array per site, all of one shape.
        weights: ignored; every site counts once.
        settings: ``trim`` is β, the share of sites that is cut at each end.

    Returns:
        float64, of the shape of one array.

    Raises:
        ConfigError: ``trim`` cuts nobody of so many sites, or leaves nobody.

    Guarantees:
        - While no more sites are hostile than are cut at one end, every coordinate stays in the range of the honest
          ones.
        - Equal arrays average to themselves, to the last bit of float32.
    """
    cut = cut_at_each_end(settings.trim, len(values))
    return np.asarray(_ordered(values)[cut : len(values) - cut].mean(axis=0, dtype=np.float64))


def cut_at_each_end(trim: float, sites: int) -> int:
    """How many of ``sites`` a trimmed mean cuts at each end: ``trim`` of them, rounded down.

    Raises:
        ConfigError: it cuts nobody, which would be a plain mean under another name, or leaves nobody.
    """
    cut = int(Decimal(str(trim)) * sites)  # as written: 0.29 of 100 is 29, which floats make 28
    if cut < 1:
        enough = math.ceil(100 / sites) / 100
        raise ConfigError(
            f"aggregation.trim: {trim} cuts nobody of {sites} sites, which leaves a plain mean; raise it to {enough} "
            "or above"
        )
    if 2 * cut >= sites:
        raise ConfigError(f"aggregation.trim: {trim} leaves nobody of {sites} sites; lower it below 0.5")
    return cut
