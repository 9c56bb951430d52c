"""The accountant: exact sums, golden values, and agreement with an independent library."""

import random
from functools import cache
from itertools import permutations, product

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from scipy.optimize import brentq

from clinifed.errors import PrivacyError
from clinifed.privacy.accountant import (
    budget_units,
    cost_units,
    delta_of,
    epsilon_of,
    mu_squared,
    noise_multiplier_for,
    update_norm_bound,
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


# 30 points: epsilon × delta × releases
GRID = list(product([0.1, 0.5, 1.0, 3.0, 8.0], [1e-5, 1e-7], [1, 50, 1000]))


@cache
def independent_sigma(epsilon: float, delta: float, releases: int) -> float:
    """The sigma that dp-accounting needs when it composes every release numerically."""
    near = noise_multiplier_for(epsilon, delta, releases)

    def excess(sigma: float) -> float:
        # A step of a hundredth of mu: the default of 1e-4 overstates epsilon for many releases.
        accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 0.01 / near)
        event = dp_accounting.PoissonSampledDpEvent(1.0, dp_accounting.GaussianDpEvent(sigma))
        return float(accountant.compose(event, releases).get_epsilon(delta)) - epsilon

    return float(brentq(excess, 0.97 * near, 1.03 * near, rtol=1e-6))


@pytest.mark.parametrize(("epsilon", "delta", "releases"), GRID)
def test_sigma_agrees_with_an_independent_accountant(epsilon: float, delta: float, releases: int) -> None:
    ours, theirs = noise_multiplier_for(epsilon, delta, releases), independent_sigma(epsilon, delta, releases)
    assert ours == pytest.approx(theirs, rel=5e-3)
    assert ours >= theirs * (1 - 1e-3)


@pytest.mark.parametrize("releases", [1, 20])
def test_ten_jobs_of_epsilon_0_284_fit_a_lifetime_of_epsilon_1_and_the_eleventh_does_not(releases: int) -> None:
    lifetime, spent, jobs = budget_units(1.0, DELTA), 0, 0
    job = releases * cost_units(noise_multiplier_for(0.284, DELTA, releases))
    while spent + job <= lifetime:
        spent, jobs = spent + job, jobs + 1
    assert jobs == 10
    assert epsilon_of(spent, DELTA) <= 1.0 < epsilon_of(spent + job, DELTA)


def test_ten_jobs_of_a_tenth_of_the_budget_leave_nothing_and_no_unit_is_overdrawn() -> None:
    lifetime = budget_units(1.0, DELTA)
    assert lifetime == 71_851_404_654  # whole units of 1e-12
    job = lifetime // 10
    assert lifetime - 10 * job == lifetime % 10
    assert 11 * job > lifetime


def test_the_order_of_interleaved_releases_does_not_change_the_sum() -> None:
    runs = [[cost_units(noise_multiplier_for(e, DELTA, t))] * t for e, t in ((0.3, 7), (1.0, 50), (2.5, 20))]
    in_turn = [unit for run in runs for unit in run]
    interleaved = in_turn.copy()
    random.Random(1).shuffle(interleaved)
    assert sum(in_turn) == sum(interleaved) == sum(len(run) * run[0] for run in runs)
    assert len({sum(sum(run) for run in order) for order in permutations(runs)}) == 1


def test_the_same_patient_in_two_hospitals_has_epsilon_1_47() -> None:
    both = 2 * budget_units(1.0, DELTA)
    assert round(epsilon_of(both, DELTA), 2) == 1.47


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
    with pytest.raises(PrivacyError, match="could hold"):
        cost_units(sigma)


def test_no_releases_are_refused() -> None:
    with pytest.raises(PrivacyError, match="releases=0"):
        noise_multiplier_for(1.0, DELTA, 0)


BOUND = {"learning_rate": 4.0, "steps": 3, "dimension": 200}


@pytest.mark.parametrize("exceeded", [0.5, 0.1, 1e-2, 1e-3])
def test_noise_alone_goes_beyond_its_part_of_the_bound_as_often_as_claimed(exceeded: float) -> None:
    dice, draws = np.random.default_rng(5), 20_000
    sigma, clip, patients, steps = 2.0, 1.5, 40, 3
    bound = update_norm_bound(sigma, clip, patients, **BOUND, exceeded=exceeded)
    total = np.zeros((draws, 200))
    for _ in range(steps):  # as the sites make it: every step adds its own noise
        total += 4.0 * sigma * clip / patients * dice.normal(size=total.shape)
    norms = np.linalg.norm(total, axis=1)
    beyond = float(np.mean(norms > bound - 4.0 * steps * clip))
    assert beyond == pytest.approx(exceeded, abs=4 * np.sqrt(exceeded * (1 - exceeded) / draws))


def test_honest_updates_are_longer_than_the_bound_in_less_than_one_of_a_hundred() -> None:
    """The worst of honest sites: all patients pull one way at the full clip in every step."""
    dice, draws, dimension = np.random.default_rng(6), 4_000, 200
    for sigma, patients, steps in ((0.5, 1000, 1), (2.0, 40, 3), (26.0, 10, 2)):
        shape = {"learning_rate": 4.0, "steps": steps, "dimension": dimension}
        bound = update_norm_bound(sigma, 1.0, patients, **shape)
        noise = np.sqrt(steps) * 4.0 * sigma / patients * dice.normal(size=(draws, dimension))
        noise[:, 0] += 4.0 * steps
        assert np.mean(np.linalg.norm(noise, axis=1) > bound) < 0.01


@pytest.mark.parametrize(
    ("sooner", "later"),
    [
        ({"noise_multiplier": 1.0}, {"noise_multiplier": 1.1}),
        ({"max_grad_norm": 1.0}, {"max_grad_norm": 1.1}),
        ({"nominal_patients": 11}, {"nominal_patients": 10}),
        ({"learning_rate": 1.0}, {"learning_rate": 1.1}),
        ({"steps": 1}, {"steps": 2}),
        ({"dimension": 100}, {"dimension": 101}),
        ({"exceeded": 1e-2}, {"exceeded": 1e-3}),
    ],
)
def test_the_bound_grows_with_what_makes_an_update_longer(sooner: dict, later: dict) -> None:
    common = {
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "nominal_patients": 10,
        "learning_rate": 1.0,
        "steps": 1,
        "dimension": 100,
    }
    assert 0 < update_norm_bound(**{**common, **sooner}) < update_norm_bound(**{**common, **later}) < float("inf")


@pytest.mark.parametrize("dimension", [1, 10**6, 10**8])
def test_the_bound_is_finite_and_above_the_noise_at_every_size(dimension: int) -> None:
    bound = update_norm_bound(1.0, 1.0, 1, learning_rate=1.0, steps=1, dimension=dimension)
    assert 1 + dimension**0.5 < bound < 1 + dimension**0.5 + 4
