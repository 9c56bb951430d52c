"""Rounds of six sites with four specialties, one of which too few sites have for a robust rule, and one nobody has."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clinifed.aggregators import aggregate
from clinifed.config import Aggregation
from clinifed.messages import Parameters, Update, allowed_names

BOTH = ("dermatology", "radiology")
SITES = {
    "alder": BOTH,
    "birch": (*BOTH, "emergency"),
    "cedar": BOTH,
    "dogwood": BOTH,
    "elm": BOTH,
    "fir": ("emergency", "radiology"),
}
WEIGHTS = {site: float(number + 1) for number, site in enumerate(SITES)}
TRUNK, FULL, FIVE, TWO, NONE = (
    "trunk.projection.weight",
    "heads.radiology.weight",  # six sites
    "heads.dermatology.weight",  # five
    "heads.emergency.bias",  # two
    "heads.pathology.bias",
)
SHAPES: dict[str, tuple[int, ...]] = {TRUNK: (3, 4), FULL: (2, 4), FIVE: (3, 2), TWO: (3,), NONE: (2,)}

Memory = dict[str, NDArray[np.float32]]
Round = tuple[Parameters, Memory]


def settings(rule: str, **changes: Any) -> Aggregation:
    return Aggregation(**{"rule": rule, "quorum": 1, "round_timeout_s": 60, **changes})


def sent(seed: int, sites: Iterable[str] = SITES, scale: float = 0.1) -> list[Update]:
    """Normal updates of ``sites``; those of one site and seed are the same whoever else takes part."""
    made = []
    for site in sites:
        generator = np.random.default_rng([seed, list(SITES).index(site)])
        params = {
            name: generator.normal(scale=scale, size=SHAPES[name]).astype(np.float32)
            for name in sorted(allowed_names(SHAPES, SITES[site]))
        }
        made.append(Update(site, seed, params))
    return made


def equal(value: float, sites: Iterable[str] = SITES) -> list[Update]:
    """Updates of ``sites`` that hold ``value`` everywhere."""
    return [
        Update(site, 0, {n: np.full(SHAPES[n], value, np.float32) for n in allowed_names(SHAPES, SITES[site])})
        for site in sites
    ]


def one_round(
    updates: list[Update],
    how: Aggregation,
    memory: Mapping[str, NDArray[np.float32]] | None = None,
    weights: Mapping[str, float] = WEIGHTS,
) -> Round:
    return aggregate(updates, weights, SHAPES, how, memory or {})


def bits(result: Round) -> list[tuple[str, bytes]]:
    return [(name, value.tobytes()) for part in result for name, value in sorted(part.items())]
