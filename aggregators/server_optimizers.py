"""What the server makes of the combined update: it takes it as it is, with momentum, or as Adam would.

Each step sees one parameter at a time and has no state of its own: what it remembers goes in and comes out, so that a
server that starts again goes on where it was. Updates are noised already, so none of it costs epsilon.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from clinifed.config import Aggregation

__all__ = ["MOMENTUM", "SECOND_MOMENTUM", "adam", "as_it_is", "momentum"]

MOMENTUM = "momentum"
SECOND_MOMENTUM = "second_momentum"

Step = tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]


def as_it_is(combined: NDArray[np.float64], memory: Mapping[str, NDArray[np.float32]], settings: Aggregation) -> Step:
    """The combined update is the change; nothing is remembered."""
    return combined, {}


def momentum(combined: NDArray[np.float64], memory: Mapping[str, NDArray[np.float32]], settings: Aggregation) -> Step:
    """FedAvgM (Hsu et al., arXiv 1909.06335, section 4.3): m ← β·m + Δ; the change is η·m.

    This is the plain form of the paper's equation, without the Nesterov variant of its experiments.

    Args:
        combined: Δ, float64, the parameter's mean over the sites.
        memory: ``momentum`` → m of the round before; nothing before the first.
        settings: ``momentum`` is β, ``server_learning_rate`` is η.

    Returns:
        The change, and the new memory; both float64, of the shape of ``combined``.

    Guarantees:
        - It starts at m = 0.
        - It is linear in the updates: at β = 0 and η = 1 it is the mean.
    """
    velocity = combined
    if MOMENTUM in memory:
        velocity = combined + settings.momentum * memory[MOMENTUM].astype(np.float64)
    return settings.server_learning_rate * velocity, {MOMENTUM: velocity}


def adam(combined: NDArray[np.float64], memory: Mapping[str, NDArray[np.float32]], settings: Aggregation) -> Step:
    """FedAdam (Reddi et al., arXiv 2003.00295, Algorithm 2): the change is η·m / (√v + τ).

    m ← β₁·m + (1 − β₁)·Δ and v ← β₂·v + (1 − β₂)·Δ², without bias correction, as published.

    Args:
        combined: Δ, float64, the parameter's mean over the sites.
        memory: ``momentum`` → m and ``second_momentum`` → v of the round before; nothing before the first.
        settings: ``momentum`` is β₁, ``second_momentum`` is β₂, ``adaptivity`` is τ, ``server_learning_rate`` is η.

    Returns:
        The change, and the new memory; both float64, of the shape of ``combined``.

    Guarantees:
        - It starts at m = 0 and v = τ².
        - A parameter whose updates are zero in every round does not change.
    """
    first, second, tau = settings.momentum, settings.second_momentum, settings.adaptivity
    m = (1 - first) * combined
    v = (1 - second) * np.square(combined)
    if MOMENTUM in memory:
        m += first * memory[MOMENTUM].astype(np.float64)
        v += second * memory[SECOND_MOMENTUM].astype(np.float64)
    else:
        v += second * tau**2
    return settings.server_learning_rate * m / (np.sqrt(v) + tau), {MOMENTUM: m, SECOND_MOMENTUM: v}
