"""Gaussian differential privacy: what a release costs, what a budget holds, and the noise that fits both.

Every release is a full-batch Gaussian mechanism with L2 sensitivity C and noise standard deviation σ·C, so it is
μ-GDP with μ = 1/σ, and releases add up in μ² (Dong, Roth & Su, "Gaussian Differential Privacy", 2019, corollary 3.3);
under full adaptivity the filter "stop when Σ μ² would exceed the budget" is valid at the same numbers
(Smith & Thakurta, arXiv 2210.17520). μ² is counted in whole units of 1e-12, so that sums are exact.
"""

from math import ceil, exp, floor, inf, sqrt

from scipy.optimize import brentq
from scipy.special import chdtri, log_ndtr

from clinifed.errors import PrivacyError

__all__ = [
    "MU2_UNIT",
    "budget_units",
    "cost_units",
    "delta_of",
    "epsilon_of",
    "mu_squared",
    "noise_multiplier_for",
    "update_norm_bound",
]

MU2_UNIT = 1e-12  # one unit of budget; ε = 1, δ = 1e-5 is 71,8xx,xxx,xxx of them
_MAX_EPSILON = 1000.0
_MU_RANGE = (1e-9, 100.0)  # wider than any ε in [1e-8, 1000] needs
_LEAST_SIGMA = 1 / _MU_RANGE[1]


def delta_of(mu: float, epsilon: float) -> float:
    """δ(ε) of μ-GDP: Φ(−ε/μ + μ/2) − e^ε·Φ(−ε/μ − μ/2) (Dong, Roth & Su 2019, corollary 2.13).

    Args:
        mu: > 0.
        epsilon: ≥ 0.
    """
    if mu <= 0:
        return 0.0
    first = exp(log_ndtr(-epsilon / mu + mu / 2))
    second = exp(epsilon + log_ndtr(-epsilon / mu - mu / 2))
    return max(0.0, first - second)


def mu_squared(epsilon: float, delta: float) -> float:
    """The largest μ² for which μ-GDP implies (ε, δ)-DP.

    Raises:
        PrivacyError: ε or δ is outside the open ranges (0, 1000) and (0, 1).
    """
    if not (0 < epsilon < _MAX_EPSILON and 0 < delta < 1):
        raise PrivacyError(f"epsilon={epsilon!r}, delta={delta!r}: need 0 < epsilon < 1000 and 0 < delta < 1")
    mu = brentq(lambda m: delta_of(m, epsilon) - delta, *_MU_RANGE, xtol=1e-15, rtol=1e-14)
    return float(mu) ** 2


def epsilon_of(mu2_units: int, delta: float) -> float:
    """The ε that ``mu2_units`` · 1e-12 of spent μ² amounts to at ``delta``; 0 where nothing was spent.

    Raises:
        PrivacyError: it is beyond 1000, where an ε promises nothing.
    """
    if mu2_units <= 0:
        return 0.0
    mu = sqrt(mu2_units * MU2_UNIT)
    if delta_of(mu, 0.0) <= delta:
        return 0.0
    if delta_of(mu, _MAX_EPSILON) > delta:
        raise PrivacyError(
            f"{mu2_units} units at delta {delta:g} are beyond epsilon {_MAX_EPSILON:g}: no promise at all"
        )
    return float(brentq(lambda e: delta_of(mu, e) - delta, 0.0, _MAX_EPSILON, xtol=1e-12, rtol=1e-12))


def budget_units(epsilon: float, delta: float) -> int:
    """The whole budget (ε, δ) in units of μ², rounded down.

    Guarantees:
        - Never more than the (ε, δ) it stands for: rounding is downwards.
    """
    return floor(mu_squared(epsilon, delta) / MU2_UNIT)


def cost_units(noise_multiplier: float) -> int:
    """What one release at σ = ``noise_multiplier`` costs, 1/σ² in units, rounded up.

    Guarantees:
        - Never less than the true cost: rounding is upwards.

    Raises:
        PrivacyError: σ is not finite, or below 0.01 (μ = 100, an ε in the thousands).
    """
    if not _LEAST_SIGMA <= noise_multiplier < inf:
        raise PrivacyError(
            f"noise_multiplier={noise_multiplier!r}: a release with so little noise has no cost that a budget could "
            f"hold; use {_LEAST_SIGMA} or more"
        )
    return ceil(1.0 / noise_multiplier**2 / MU2_UNIT)


def noise_multiplier_for(epsilon: float, delta: float, releases: int) -> float:
    """The smallest σ at which ``releases`` Gaussian releases together cost at most (ε, δ).

    It is found once, for all rounds of a run; calibrating anew in every round would spend the budget each time.

    Guarantees:
        - ``releases · cost_units(σ) ≤ budget_units(ε, δ)``, exactly, in whole units.

    Raises:
        PrivacyError: ``releases`` < 1, or so many that one of them costs less than a unit.
    """
    if releases < 1:
        raise PrivacyError(f"releases={releases!r}: at least one is needed")
    share = budget_units(epsilon, delta) // releases
    if share < 1:
        raise PrivacyError(f"releases={releases!r} is too many for epsilon={epsilon!r}: no budget is left for one")
    sigma = sqrt(1.0 / (share * MU2_UNIT))
    while cost_units(sigma) > share:  # at most a few steps: rounding of sqrt and of the division
        sigma *= 1 + 1e-13
    return sigma


def update_norm_bound(
    noise_multiplier: float,
    max_grad_norm: float,
    nominal_patients: int,
    *,
    learning_rate: float,
    steps: int,
    dimension: int,
    exceeded: float = 1e-3,
) -> float:
    """The public L2 bound of one site's update, from public numbers alone: what the mechanism may send, and no more.

    N₀ patients move each of T steps by at most η·C; the noise of T steps is Gaussian with standard deviation
    √T·η·σ·C/N₀ in each of d coordinates, so its norm is that times a χ variable with d degrees of freedom
    (Laurent & Massart 2000 bound the same quantile): η·(T·C + √T·σ·C/N₀·χ_d(1 − exceeded)).

    Args:
        steps: T, the local steps of one round.
        dimension: d, the coordinates of the update.
        exceeded: how often the noise alone goes beyond its part; such an update is projected, which costs nothing.
    """
    spread = sqrt(steps) * noise_multiplier * max_grad_norm / nominal_patients
    return learning_rate * (steps * max_grad_norm + spread * sqrt(float(chdtri(dimension, exceeded))))
