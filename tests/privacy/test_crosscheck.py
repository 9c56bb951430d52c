"""Four accountants on one promise: they agree, they say which they are, and none takes the machine down."""

import pytest

from clinifed.errors import PrivacyError
from clinifed.privacy import crosscheck
from clinifed.privacy.accountant import noise_multiplier_for
from clinifed.privacy.crosscheck import MAX_POINTS, CrossCheck, agree, cross_checks

DELTA = 1e-5
NAMES = ["gdp", "pld", "prv", "rdp"]


@pytest.mark.parametrize(("epsilon", "releases"), [(1.0, 50), (3.0, 20), (8.0, 1), (0.1, 1000)])
def test_four_accountants_bound_the_same_epsilon(epsilon: float, releases: int) -> None:
    checks = cross_checks(noise_multiplier_for(epsilon, DELTA, releases), releases, DELTA)
    assert list(checks) == NAMES
    found = {name: check.epsilon for name, check in checks.items()}
    assert found["gdp"] == pytest.approx(epsilon, rel=1e-6)
    assert found["pld"] == pytest.approx(epsilon, rel=1e-4)
    assert found["prv"] == pytest.approx(epsilon + 0.01, abs=2e-3)  # its stated error of 0.01 on top
    assert 1.0 < found["rdp"] / epsilon < 1.25
    assert {check.reason for check in checks.values()} == {None}
    assert agree(checks)


def test_every_check_names_its_accountant_and_version() -> None:
    checks = cross_checks(5.0, 10, DELTA)
    assert [c.accountant.split()[0] for c in checks.values()] == ["Gaussian", "dp-accounting", "opacus", "opacus"]
    assert all(c.version[0].isdigit() for c in checks.values())


def test_the_setting_that_took_15_gb_is_skipped_with_its_reason() -> None:
    checks = cross_checks(0.3, 2000, DELTA)
    assert checks["prv"].epsilon is None
    assert "3.59e+08 grid points" in (checks["prv"].reason or "")
    assert "nothing is protected" in (checks["gdp"].reason or "")
    assert not agree(checks)


def test_a_million_releases_do_not_fill_the_memory() -> None:
    checks = cross_checks(noise_multiplier_for(1.0, DELTA, 1_000_000), 1_000_000, DELTA)
    assert checks["gdp"].epsilon == pytest.approx(1.0, rel=1e-4)
    assert checks["pld"].epsilon is None
    assert f"more than {MAX_POINTS}" in (checks["pld"].reason or "")


def test_the_estimate_of_grid_points_is_what_the_library_takes() -> None:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    for sigma, releases in ((1.4, 1), (26.4, 50), (373.0, 10_000)):
        accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 0.01 / sigma)
        event = dp_accounting.PoissonSampledDpEvent(1.0, dp_accounting.GaussianDpEvent(sigma))
        accountant.compose(event, releases)
        assert accountant._pld._pmf_remove.size == pytest.approx(crosscheck._pld_points(releases), rel=0.15)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("inf"), float("nan")])
def test_without_noise_every_check_is_skipped_with_the_value(sigma: float) -> None:
    checks = cross_checks(sigma, 10, DELTA)
    assert list(checks) == NAMES
    assert {c.epsilon for c in checks.values()} == {None}
    assert all(f"noise_multiplier={sigma!r}" in (c.reason or "") for c in checks.values())


@pytest.mark.parametrize(("releases", "delta"), [(0, DELTA), (1, 0.0), (1, 1.0)])
def test_impossible_questions_are_refused(releases: int, delta: float) -> None:
    with pytest.raises(PrivacyError, match="need releases"):
        cross_checks(1.0, releases, delta)


def test_a_library_that_fails_leaves_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> float:
        raise OverflowError("too large")

    broken = {**crosscheck._ACCOUNTANTS, "prv": ("PRVAccountant", "opacus", fail)}
    monkeypatch.setattr(crosscheck, "_ACCOUNTANTS", broken)
    check = cross_checks(5.0, 10, DELTA)["prv"]
    assert (check.epsilon, check.reason) == (None, "failed: OverflowError: too large")


def test_a_promise_below_the_independent_epsilon_is_refused() -> None:
    checks = cross_checks(noise_multiplier_for(1.0, DELTA, 50), 50, DELTA)
    ours = checks["gdp"]
    for share, fine in ((0.9995, True), (0.998, False)):
        claim = {**checks, "gdp": CrossCheck(ours.accountant, ours.version, share)}
        if fine:
            assert agree(claim)
        else:
            with pytest.raises(PrivacyError, match="too good"):
                agree(claim)
