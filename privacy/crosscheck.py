"""The same promise by other people's accountants: epsilon four ways, each with its version or why it is missing.

============  ========================================  ==================================================
``gdp``       ours, closed form                         what is promised and charged
``pld``       dp-accounting, privacy loss distribution  every release composed; an upper bound, < 0.01 % above
``prv``       Opacus, privacy random variables          an upper bound with a stated error of 0.01
``rdp``       Opacus, Rényi                             an upper bound, about a tenth above
============  ========================================  ==================================================

All four speak of Gaussian releases on the full batch (sampling rate 1) under adding or removing one patient.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from math import inf, log, sqrt

from clinifed.errors import PrivacyError
from clinifed.privacy.accountant import MU2_UNIT, cost_units, delta_of, epsilon_of

__all__ = ["MAX_POINTS", "TOLERANCE", "CrossCheck", "agree", "cross_checks"]

MAX_POINTS = 1 << 22  # of a numeric accountant's grid, float64; a dozen such arrays are 400 MiB
TOLERANCE = 1e-3  # our epsilon may lie below the privacy loss distribution's by this share: its grid's error, no more

_GDP, _PLD = "gdp", "pld"
_HIGHEST = 1000.0  # epsilon; above it our accountant gives no number, and nobody is protected
# Opacus' PRVAccountant.get_epsilon: the stated error of epsilon, and delta's share of the error of delta.
_PRV_EPSILON_ERROR = 0.01
_PRV_DELTA_ERROR = 1e-3
# dp-accounting: PLD.self_compose truncates tails of this mass; Chernoff bounds at orders 1 … 20 over the list's length.
_PLD_TAIL = 1e-15
_PLD_ORDERS = range(1, 21)
_PLD_TRUNCATION = 9.9  # standard deviations beyond which a Gaussian has the mass e^-50 / 2 that one release loses


@dataclass(frozen=True)
class CrossCheck:
    """Epsilon according to one accountant."""

    accountant: str
    version: str  # of the package it comes from
    epsilon: float | None  # None: skipped or failed
    reason: str | None = None  # why there is no epsilon; beside an epsilon, what the library warned of


class _Skipped(Exception):  # noqa: N818 - not an error: the check is left out
    """Why a check is not made."""


def _too_many(points: float) -> None:
    if points > MAX_POINTS:
        raise _Skipped(
            f"skipped: it needs {points:.3g} grid points, more than {MAX_POINTS} ({points * 8e-9:.3g} GB each)"
        )


def _gdp(noise_multiplier: float, releases: int, delta: float) -> float:
    units = releases * cost_units(noise_multiplier)
    if delta_of(sqrt(units * MU2_UNIT), _HIGHEST) > delta:
        raise _Skipped(f"epsilon is above {_HIGHEST:g}: nothing is protected")
    return epsilon_of(units, delta)


def _pld_points(releases: int) -> float:
    """How many grid points the composed loss needs, in steps of a hundredth of one release's mu.

    One release's loss is N(mu²/2, mu²), cut at ±``_PLD_TRUNCATION`` standard deviations; all lengths are in mu.
    """
    width = 2 * _PLD_TRUNCATION
    tail = log(2 / _PLD_TAIL)
    half = min(releases * order / width / 2 + tail * width / order for order in _PLD_ORDERS)
    return 100 * max(width, min(releases * width, 2 * half))


def _pld(noise_multiplier: float, releases: int, delta: float) -> float:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    _too_many(_pld_points(releases))
    # The library's own step of 1e-4 is too coarse for thousands of releases: it overstates epsilon by 1 % at 10,000.
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 0.01 / noise_multiplier)
    # A sampled event with probability 1 is composed release by release; a bare Gaussian would be composed by our own
    # closed form.
    event = dp_accounting.PoissonSampledDpEvent(1.0, dp_accounting.GaussianDpEvent(noise_multiplier))
    return float(accountant.compose(event, releases).get_epsilon(delta))


def _prv_points(noise_multiplier: float, releases: int, delta: float) -> float:
    """How many grid points ``PRVAccountant`` takes: twice its safe domain over its mesh, as in ``_get_domain``."""
    from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV, compute_safe_domain_size

    error = delta * _PRV_DELTA_ERROR
    prv = PoissonSubsampledGaussianPRV(1.0, noise_multiplier)
    half = float(compute_safe_domain_size([prv], [releases], _PRV_EPSILON_ERROR, error))
    return 2 * half / (_PRV_EPSILON_ERROR / sqrt(releases * log(12 / error) / 2))


def _prv(noise_multiplier: float, releases: int, delta: float) -> float:
    import numpy as np
    from opacus.accountants import PRVAccountant

    # Rényi orders only size the grid here: few of them make it larger, never epsilon wrong.
    warnings.filterwarnings("ignore", message="Optimal order is the")
    _too_many(_prv_points(noise_multiplier, releases, delta))
    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, 1.0, releases)]
    with np.errstate(divide="ignore"):  # log(1 − q) of a full batch is −infinity, which is the right value
        return float(accountant.get_epsilon(delta))


def _rdp(noise_multiplier: float, releases: int, delta: float) -> float:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, 1.0, releases)]
    # Opacus stops at order 63, too low for an epsilon below 1; with a full batch any order costs the same.
    orders = [*RDPAccountant.DEFAULT_ALPHAS, *(2.0**k for k in range(6, 21))]
    return max(0.0, float(accountant.get_epsilon(delta, alphas=orders)))  # its conversion may fall just below zero


# name → accountant, its package, and epsilon of (noise_multiplier, releases, delta)
_ACCOUNTANTS: dict[str, tuple[str, str, Callable[[float, int, float], float]]] = {
    _GDP: ("Gaussian differential privacy, closed form", "clinifed", _gdp),
    _PLD: ("PLDAccountant", "dp-accounting", _pld),
    "prv": ("PRVAccountant", "opacus", _prv),
    "rdp": ("RDPAccountant", "opacus", _rdp),
}


def _check(name: str, noise_multiplier: float, releases: int, delta: float) -> CrossCheck:
    accountant, package, compute = _ACCOUNTANTS[name]
    title = accountant if package == "clinifed" else f"{package} {accountant}"
    epsilon: float | None = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            epsilon = compute(noise_multiplier, releases, delta)
            reason = "; ".join(sorted({str(w.message).splitlines()[0] for w in caught})) or None
            if not 0 <= epsilon < inf:
                epsilon, reason = None, f"failed: it says epsilon = {epsilon!r}"
        except _Skipped as skipped:
            reason = str(skipped)
        except Exception as error:
            # Other people's numerics fail in many ways (overflow, memory, no root); each becomes the reason.
            reason = f"failed: {type(error).__name__}: {error}"
    return CrossCheck(title, version(package), epsilon, reason)


def cross_checks(noise_multiplier: float, releases: int, delta: float) -> dict[str, CrossCheck]:
    """Epsilon of ``releases`` full-batch Gaussian releases, by every accountant.

    Args:
        noise_multiplier: sigma, in units of the clip C; without noise every check is skipped with that reason.
        releases: ≥ 1.
        delta: in (0, 1).

    Guarantees:
        - No check takes more than :data:`MAX_POINTS` grid points; one that would is skipped.
        - A check without an epsilon says why.

    Raises:
        PrivacyError: ``releases`` or ``delta`` is out of range.
    """
    if releases < 1 or not 0 < delta < 1:
        raise PrivacyError(f"releases={releases!r}, delta={delta!r}: need releases ≥ 1 and 0 < delta < 1")
    if not 0 < noise_multiplier < inf:
        reason = f"skipped: noise_multiplier={noise_multiplier!r}: without noise there is no finite epsilon"
        return {
            name: CrossCheck(title if package == "clinifed" else f"{package} {title}", version(package), None, reason)
            for name, (title, package, _) in _ACCOUNTANTS.items()
        }
    return {name: _check(name, noise_multiplier, releases, delta) for name in _ACCOUNTANTS}


def agree(checks: Mapping[str, CrossCheck]) -> bool:
    """Whether the privacy loss distribution confirms our epsilon; False where one of the two was not computed.

    Raises:
        PrivacyError: ours is lower by more than :data:`TOLERANCE`, so that we would promise too much.
    """
    ours, theirs = checks[_GDP], checks[_PLD]
    if ours.epsilon is None or theirs.epsilon is None:
        return False
    if ours.epsilon < theirs.epsilon * (1 - TOLERANCE):
        raise PrivacyError(
            f"epsilon is {ours.epsilon:.6g} by our accountant but {theirs.epsilon:.6g} by {theirs.accountant} "
            f"{theirs.version}: the promise would be too good; nothing may run on it"
        )
    return True
