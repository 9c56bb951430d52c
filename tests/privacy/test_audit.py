"""The audits: the installed mechanism passes each of them, and each fails where noise or clip are not as claimed."""

import time
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from functools import partial
from math import comb, exp

import numpy as np
import pytest
import torch

from clinifed.errors import PrivacyError
from clinifed.privacy import engine
from clinifed.privacy import self_test as module
from clinifed.privacy.accountant import noise_multiplier_for
from clinifed.privacy.audit import audit, gradient_inversion, noise_ruler, one_run_audit
from clinifed.privacy.audit_neighbours import AuditResult, clipped_sum, neighbour_audit
from clinifed.privacy.audit_one_run import epsilon_lower_bound, epsilon_proved, p_value
from clinifed.privacy.engine import Mechanism, PatientDPOptimizer
from clinifed.privacy.noise import NoiseSource
from clinifed.privacy.objectives import OBJECTIVES
from clinifed.privacy.patient_gradients import PatientGradients
from clinifed.privacy.patient_means import Groups
from clinifed.privacy.self_test import self_test

DELTA, RELEASES, SEEDS = 1e-5, 50, range(5)
PLANNED = Mechanism(noise_multiplier_for(1.0, DELTA, RELEASES), 0.5, 400)
ALMOST_OFF = 1e-9  # parameters still move


@pytest.fixture
def scale_noise(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Multiply what the source draws: 0 is noise off."""
    honest = NoiseSource.standard_normal

    def patch(factor: float) -> None:
        monkeypatch.setattr(NoiseSource, "standard_normal", lambda self, *where: factor * honest(self, *where))

    return patch


@pytest.fixture(scope="module", autouse=True)
def in_time() -> Iterator[None]:
    """All audits of this file together take less than a minute on two cores."""
    began = time.process_time()
    yield
    assert time.process_time() - began < 60


class TestNoiseRuler:
    def test_the_installed_mechanism_passes(self):
        result = noise_ruler(PLANNED)
        assert result.passed
        assert result.draws >= 40_000
        assert result.std_ratio == pytest.approx(1, abs=0.02)
        assert result.loud_shift == pytest.approx(1, abs=1e-3)

    @pytest.mark.parametrize("factor", [0.0, ALMOST_OFF, 0.9, 1.1])
    def test_it_fails_with_the_noise_off_or_scaled(self, scale_noise, factor):
        scale_noise(factor)
        assert not noise_ruler(PLANNED).passed

    def test_it_fails_with_noise_of_the_right_deviation_and_another_shape(self, monkeypatch):
        uniform = partial(np.random.default_rng().uniform, -(3**0.5), 3**0.5)
        monkeypatch.setattr(NoiseSource, "standard_normal", lambda self, shape, _: torch.from_numpy(uniform(shape)))
        result = noise_ruler(PLANNED)
        assert result.std_ratio == pytest.approx(1, abs=0.02)
        assert not result.passed

    @pytest.mark.parametrize("factor", [0.5, 1.01, 2.0])
    def test_it_fails_with_another_clip(self, monkeypatch, factor):
        """The clip alone is wrong; the noise is as claimed."""
        honest = PatientDPOptimizer.clip_and_accumulate

        def wrong(self):
            self.max_grad_norm *= factor
            honest(self)
            self.max_grad_norm /= factor

        monkeypatch.setattr(PatientDPOptimizer, "clip_and_accumulate", wrong)
        result = noise_ruler(PLANNED)
        assert not result.passed
        assert result.loud_shift == pytest.approx(factor, rel=1e-3)
        assert result.std_ratio == pytest.approx(1, abs=0.02)

    def test_it_fails_with_a_mechanism_of_another_clip(self, monkeypatch):
        honest = PatientDPOptimizer.__init__

        def wrong(self, optimizer, mechanism):
            honest(self, optimizer, mechanism)
            self.max_grad_norm = 2 * mechanism.max_grad_norm

        monkeypatch.setattr(PatientDPOptimizer, "__init__", wrong)
        assert not noise_ruler(PLANNED).passed

    def test_it_fails_with_another_denominator(self, monkeypatch):
        def true_number(self):
            for parameter in self.params:
                parameter.grad.div_(len(self.gradients[0][1].squared_norms()))

        monkeypatch.setattr(PatientDPOptimizer, "scale_grad", true_number)
        assert not noise_ruler(PLANNED).passed


class TestNeighbours:
    @pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
    @pytest.mark.parametrize("max_grad_norm", [0.1, 1.0, 10.0])
    def test_every_objective_passes_at_every_clip(self, objective, max_grad_norm):
        result = neighbour_audit(objective, max_grad_norm, patients=(16, 256), images=(1, 20))
        assert result.passed
        assert result.cases == 16

    def test_it_fails_where_each_image_is_clipped_by_itself(self, monkeypatch):
        class ByImage(PatientGradients):
            """As Opacus itself would: every image is taken for a patient."""

            groups = property(
                lambda self: self.images,
                lambda self, of: setattr(self, "images", Groups(torch.arange(len(of.patient)))),
            )

        monkeypatch.setattr(engine, "PatientGradients", ByImage)
        result = neighbour_audit(OBJECTIVES["cross-entropy"], patients=(16,), images=(1, 20))
        assert not result.passed
        assert result.largest > 15

    def test_it_fails_where_patients_are_not_seen_at_all(self, monkeypatch):
        honest = PatientDPOptimizer.clip_and_accumulate

        def blind(self):
            self.max_grad_norm *= 0.1
            honest(self)
            self.max_grad_norm /= 0.1

        monkeypatch.setattr(PatientDPOptimizer, "clip_and_accumulate", blind)
        assert not neighbour_audit(OBJECTIVES["cross-entropy"], patients=(16,), images=(1,)).passed


class TestOneRun:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_the_installed_mechanism_proves_no_more_than_it_claims(self, seed):
        result = one_run_audit(1.0, DELTA, RELEASES, seed=seed)
        assert result.passed
        assert result.lower_bound <= 1.0

    @pytest.mark.parametrize("seed", SEEDS)
    def test_with_the_noise_off_it_proves_more_than_four(self, scale_noise, seed):
        scale_noise(ALMOST_OFF)
        result = one_run_audit(1.0, DELTA, RELEASES, seed=seed)
        assert not result.passed
        assert result.lower_bound >= 4.0

    def test_a_tenth_of_the_noise_is_noticed_too(self, scale_noise):
        scale_noise(0.1)
        assert not one_run_audit(1.0, DELTA, RELEASES).passed

    def test_the_seed_fixes_who_is_in_and_never_the_noise(self):
        results = [one_run_audit(8.0, DELTA, 1, canaries=100, seed=3) for _ in range(6)]
        assert len({(r.guesses, r.correct) for r in results}) > 1

    def test_no_budget_is_an_audit_that_failed(self):
        assert not one_run_audit(0.0, DELTA, RELEASES).passed


class TestLowerBound:
    @pytest.mark.parametrize(("canaries", "guesses", "correct"), [(30, 10, 8), (30, 30, 30), (30, 12, 0), (50, 40, 31)])
    @pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
    def test_it_is_the_formula_of_theorem_5_2(self, canaries, guesses, correct, epsilon):
        """Written out again, term by term."""
        q = exp(epsilon) / (exp(epsilon) + 1)
        pmf = [comb(guesses, k) * q**k * (1 - q) ** (guesses - k) for k in range(guesses + 1)]
        beta = sum(pmf[correct:])
        alpha = max((sum(pmf[max(0, correct - i) : correct]) / i for i in range(1, canaries + 1)), default=0.0)
        expected = min(1.0, beta + 2 * canaries * 0.001 * alpha)
        assert p_value(canaries, guesses, correct, epsilon, 0.001) == pytest.approx(expected, rel=1e-9)

    def test_all_right_is_the_largest_that_so_many_canaries_can_prove(self):
        # Without delta: q^500 = .05/6, so epsilon = log(q/(1 − q)) = 4.64.
        q = (0.05 / 6) ** (1 / 500)
        assert epsilon_lower_bound(500, 500, 500, 0.0, 0.05 / 6) == pytest.approx(np.log(q / (1 - q)), abs=1e-3)
        assert epsilon_lower_bound(500, 500, 250, DELTA, 0.05 / 6) == 0.0

    def test_delta_makes_the_bound_smaller(self):
        bounds = [epsilon_lower_bound(500, 100, 95, delta, 0.01) for delta in (0.0, 1e-4, 1e-3)]
        assert bounds == sorted(bounds, reverse=True)
        assert bounds[0] > bounds[-1]

    def test_randomised_response_is_rarely_overestimated(self):
        """The tightest mechanism there is: at 95 %, at most about one run in twenty may prove more than ε."""
        dice, epsilon, over = np.random.default_rng(5), 1.0, 0
        for _ in range(200):
            included = dice.random(500) < 0.5
            right = dice.random(500) < 1 / (1 + exp(-epsilon))
            scores = np.where(included == right, 1.0, -1.0)
            over += epsilon_proved(scores, included, 0.0)["lower_bound"] > epsilon
        assert over <= 20


class TestGradientInversion:
    def test_the_image_cannot_be_read_from_planned_releases_and_can_from_the_raw_gradient(self):
        for releases in (1, RELEASES):
            result = gradient_inversion(PLANNED, releases)
            assert result.passed
            assert result.from_release < 0.1
            assert result.from_raw_gradient >= 0.99

    def test_it_fails_with_the_noise_off(self, scale_noise):
        scale_noise(ALMOST_OFF)
        result = gradient_inversion(PLANNED)
        assert not result.passed
        assert result.from_release >= 0.99


class TestSelfTest:
    def test_it_passes_two_hundred_times(self):
        for _ in range(200):
            self_test()

    def test_it_is_quick_and_large(self):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            self_test()
            times.append(time.perf_counter() - began)
        assert min(times) < 0.2
        assert module._TEST_DRAWS >= 65_000

    @pytest.mark.parametrize("factor", [0.0, ALMOST_OFF, 0.9, 0.97, 1.03])
    def test_it_stops_with_the_noise_off_or_scaled(self, scale_noise, factor):
        scale_noise(factor)
        with pytest.raises(PrivacyError, match="of the deviation that is claimed"):
            self_test()

    def test_it_stops_with_noise_of_another_shape(self, monkeypatch):
        coin = partial(np.random.default_rng().choice, [-1.0, 1.0])
        monkeypatch.setattr(NoiseSource, "standard_normal", lambda self, shape, _: torch.from_numpy(coin(shape)))
        with pytest.raises(PrivacyError, match="not normal"):
            self_test()

    def test_it_stops_with_a_shifted_mean(self, monkeypatch):
        honest = NoiseSource.standard_normal
        monkeypatch.setattr(NoiseSource, "standard_normal", lambda self, *where: honest(self, *where) + 0.05)
        with pytest.raises(PrivacyError, match=r"mean 0\.0"):
            self_test()

    @pytest.mark.parametrize("sign", [1, -1])
    def test_it_stops_with_a_source_that_repeats_itself(self, monkeypatch, sign):
        fixed, signs = NoiseSource().standard_normal((module._TEST_DRAWS,)), [1, sign]
        monkeypatch.setattr(NoiseSource, "standard_normal", lambda self, *where: signs.pop() * fixed)
        with pytest.raises(PrivacyError, match="two releases have related noise"):
            self_test()


class TestAudit:
    @pytest.mark.parametrize("name", OBJECTIVES)
    def test_all_audits_of_a_configuration_pass(self, name):
        results = audit(name, 1.0, DELTA, RELEASES, 0.7, 300)
        assert [type(r).__name__ for r in results] == ["Ruler", "Neighbours", "OneRun", "Inversion"]
        assert all(r.passed for r in results), [r.says for r in results]
        assert all({"audit", "passed", "says"} < set(r.to_dict()) for r in results)

    def test_with_the_noise_off_the_audits_of_noise_fail_and_nothing_crashes(self, scale_noise):
        scale_noise(0.0)
        assert {r.audit for r in audit("cross-entropy", 1.0, DELTA, RELEASES) if not r.passed} == {
            "noise ruler",
            "one run, canaries",
            "gradient inversion",
        }

    def test_a_loss_over_the_batch_is_refused(self):
        with pytest.raises(PrivacyError, match="every other patient's gradient"):
            audit("infonce", 1.0, DELTA, RELEASES)

    def test_a_result_is_frozen(self):
        with pytest.raises(FrozenInstanceError):
            AuditResult("a", False, "b").passed = True

    def test_the_module_is_put_back_after_its_sum_was_read(self, build_part, build_patients):
        part, data = build_part(), build_patients([1, 2] * 8)
        before = {name: t.clone() for name, t in part.state_dict().items()}
        clipped_sum(part, data, OBJECTIVES["cross-entropy"], 1.0)
        assert all(torch.equal(t, before[name]) for name, t in part.state_dict().items())
