"""The accountant: exact sums, golden values, and agreement with an independent library."""

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from clinifed.errors import PrivacyError
from clinifed.privacy.accountant import (
    budget_units,
    cost_units,
    delta_of,
    epsilon_of,
    mu_squared,
    noise_multiplier_for,
)

DELTA = 1e-5


@pytest.mark.parametrize(("epsilon", "sigma"), [(1.0, 26.38), (3.0, 9.83), (8.0, 4.24)])
def test_fifty_releases_have_the_published_sigma(epsilon: float, sigma: float) -> None:
    assert noise_multiplier_for(epsilon, DELTA, 50) == pytest.approx(sigma, abs=0.005)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("releases", [1, 20, 300])
def test_all_releases_together_never_cost_more_than_the_budget(epsilon: float, releases: int) -> None:
    sigma = noise_multiplier_for(epsilon, DELTA, releases)
    assert releases * cost_units(sigma) <= budget_units(epsilon, DELTA)
    assert (releases + 1) * cost_units(sigma) > budget_units(epsilon, DELTA)


@pytest.mark.parametrize(("epsilon", "releases"), [(1.0, 20), (3.0, 50), (8.0, 5)])
def test_sigma_agrees_with_an_independent_accountant(epsilon: float, releases: int) -> None:
    sigma = noise_multiplier_for(epsilon, DELTA, releases)
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(dp_accounting.GaussianDpEvent(sigma), releases)
    assert accountant.get_epsilon(DELTA) == pytest.approx(epsilon, rel=2e-3)


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 1.0, 10.0])
def test_epsilon_of_inverts_the_budget(epsilon: float) -> None:
    assert epsilon_of(budget_units(epsilon, DELTA), DELTA) == pytest.approx(epsilon, rel=1e-6)


def test_epsilon_of_nothing_is_zero() -> None:
    assert epsilon_of(0, DELTA) == 0.0


def test_delta_falls_with_epsilon_and_rises_with_mu() -> None:
    assert delta_of(1.0, 1.0) > delta_of(1.0, 2.0) > delta_of(0.5, 2.0) > 0


@pytest.mark.parametrize(("epsilon", "delta"), [(0, 1e-5), (-1, 1e-5), (1, 0), (1, 1), (float("nan"), 1e-5)])
def test_impossible_budgets_are_refused_with_their_values(epsilon: float, delta: float) -> None:
    with pytest.raises(PrivacyError, match="epsilon="):
        mu_squared(epsilon, delta)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("inf"), float("nan")])
def test_a_release_without_noise_has_no_cost(sigma: float) -> None:
    with pytest.raises(PrivacyError, match="no finite cost"):
        cost_units(sigma)


def test_no_releases_are_refused() -> None:
    with pytest.raises(PrivacyError, match="releases=0"):
        noise_multiplier_for(1.0, DELTA, 0)
