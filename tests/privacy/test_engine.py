"""The engine: the patient is the unit, the clip bounds what one patient changes, the noise is there."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from clinifed.errors import DataError, PrivacyError
from clinifed.privacy.engine import (
    Mechanism,
    PatientDPOptimizer,
    PatientTensors,
    physical_batches,
    plain_step,
    private_step,
)
from clinifed.privacy.objectives import OBJECTIVES

C = 0.5
QUIET = 1e-7  # a sigma that leaves the clipped sum readable


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def clipped_sum(part, data, objective, batch_size=16) -> torch.Tensor:
    """The sum that a step releases, read from a step with next to no noise, learning rate 1 and denominator 1."""
    trained = copy.deepcopy(part)
    private_step(trained, data, objective, Mechanism(QUIET, C, 1), 1.0, batch_size)
    return flat(part) - flat(trained)


def without(data: PatientTensors, patient: int) -> PatientTensors:
    keep = data.patient != patient
    renumbered = data.patient[keep] - (data.patient[keep] > patient).long()
    return PatientTensors(data.features[keep], renumbered, data.specialty[keep], data.label[keep])


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("projection", [False, True], ids=["heads", "projection"])
@pytest.mark.parametrize("images", [1, 2, 20, 200])
def test_one_patient_moves_the_sum_by_at_most_the_clip(build_part, build_patients, objective, projection, images):
    """The patient under test has ``images`` alike images, loud, spread over two specialties."""
    part = build_part(projection)
    data = build_patients([2] * 15 + [images])
    mine = data.patient == 15
    features = torch.where(mine.unsqueeze(1), 30 * data.features[-1], data.features)
    specialty = torch.where(mine, torch.arange(len(mine)) % 2, data.specialty)
    data = replace(data, features=features, specialty=specialty, label=torch.where(mine, 0, data.label))
    shift = clipped_sum(part, data, objective) - clipped_sum(part, without(data, 15), objective)
    assert shift.norm() <= C * (1 + 1e-4)
    assert shift.norm() > 0.5 * C  # or the test would hold for a step that ignores the patient


def test_stock_opacus_fails_the_same_bound(build_part, build_patients):
    """Control: clipping by image lets a patient of 20 images move the sum by far more than C."""
    from opacus.grad_sample import GradSampleHooks
    from opacus.optimizers import DPOptimizer

    part, data = build_part(), build_patients([20])
    data = replace(data, features=30 * data.features[:1].expand(20, -1), specialty=torch.zeros(20).long())
    data = replace(data, label=torch.zeros(20).long())
    trained = copy.deepcopy(part)
    optimizer = DPOptimizer(
        torch.optim.SGD(trained.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=C,
        expected_batch_size=1,
        loss_reduction="sum",
    )
    hooks = GradSampleHooks(trained, loss_reduction="sum")
    logits = trained(data.features.requires_grad_())
    OBJECTIVES["cross-entropy"](logits, data.specialty, data.label).sum().backward()
    optimizer.step()
    hooks.cleanup()
    assert (flat(part) - flat(trained)).norm() > 15 * C


@pytest.mark.parametrize("batch_size", [1, 3, 7, 1000])
def test_physical_batches_change_nothing_and_never_split_a_patient(build_part, build_patients, batch_size):
    part, data = build_part(), build_patients([3, 1, 5, 2, 8, 1])
    whole = clipped_sum(part, data, OBJECTIVES["cross-entropy"], 1000)
    assert torch.allclose(clipped_sum(part, data, OBJECTIVES["cross-entropy"], batch_size), whole, atol=1e-5)
    ranges = list(physical_batches(data.patient, batch_size))
    assert [r.start for r in ranges[1:]] == [r.stop for r in ranges[:-1]]
    assert (ranges[0].start, ranges[-1].stop) == (0, len(data.patient))
    for rows in ranges[1:]:
        assert data.patient[rows.start] != data.patient[rows.start - 1]


def test_a_patients_images_are_averaged_before_the_clip(build_part, build_patients):
    """A patient whose images are all the same counts like one with a single such image."""
    part, one = build_part(), build_patients([1, 1])
    many = PatientTensors(
        *(torch.cat([t[:1]] * 9 + [t[1:]]) for t in (one.features, one.patient, one.specialty, one.label))
    )
    objective = OBJECTIVES["cross-entropy"]
    assert torch.allclose(clipped_sum(part, one, objective), clipped_sum(part, many, objective), atol=1e-5)


def test_a_module_in_evaluation_mode_trains_all_the_same(build_part, build_patients):
    part, data = build_part().eval(), build_patients([1, 2] * 5)
    assert clipped_sum(part, data, OBJECTIVES["cross-entropy"]).norm() > 0


def test_the_denominator_is_the_public_number(build_part, build_patients):
    part, data = build_part(), build_patients([1] * 10)
    trained = copy.deepcopy(part)
    private_step(trained, data, OBJECTIVES["cross-entropy"], Mechanism(QUIET, C, 40), 1.0, 64)
    expected = clipped_sum(part, data, OBJECTIVES["cross-entropy"]) / 40
    assert torch.allclose(flat(part) - flat(trained), expected, atol=1e-5)


@pytest.mark.parametrize("sigma", [1.0, 6.2])
def test_the_noise_has_the_promised_deviation(sigma):
    """The ruler: patients without a gradient leave nothing but noise, N(0, (σC/N₀)²)."""
    part = nn.ModuleDict({"radiology": nn.Linear(400, 100)})
    before = flat(part).clone()
    data = PatientTensors(*(torch.zeros(1, 400), *(torch.zeros(1).long() for _ in range(3))))

    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = part

        def forward(self, features):
            return {"radiology": 0.0 * self.inner["radiology"](features)}

    private_step(Silent(), data, OBJECTIVES["cross-entropy"], Mechanism(sigma, C, 4), 1.0, 8)
    moved = (flat(part) - before).numpy().astype(np.float64)
    assert len(moved) > 40_000
    assert moved.std() == pytest.approx(sigma * C / 4, rel=0.02)


def test_two_runs_release_different_noise(build_part, build_patients):
    part, data = build_part(), build_patients([1, 2])
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        trained = copy.deepcopy(part)
        private_step(trained, data, OBJECTIVES["cross-entropy"], Mechanism(1.0, C, 1), 1.0, 8)
        results.append(flat(trained))
    assert not torch.equal(*results)


def test_a_patient_with_nan_counts_as_zero(build_part, build_patients):
    part, data = build_part(), build_patients([2, 3, 1])
    broken = replace(data, features=torch.where((data.patient == 1).unsqueeze(1), torch.nan, data.features))
    objective = OBJECTIVES["cross-entropy"]
    assert torch.allclose(
        clipped_sum(part, broken, objective), clipped_sum(part, without(data, 1), objective), atol=1e-5
    )


def test_batch_normalisation_is_refused(build_patients):
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    with pytest.raises(PrivacyError, match="batch normalisation"):
        private_step(module, build_patients([1]), OBJECTIVES["cross-entropy"], Mechanism(1, C, 1), 1.0, 8)


def test_a_parameter_that_does_not_move_is_refused(build_part, build_patients, monkeypatch):
    """The sentinel: without noise and gradient a parameter stays, and the release is not what it claims."""
    monkeypatch.setattr(
        PatientDPOptimizer, "add_noise", lambda self: [setattr(p, "grad", torch.zeros_like(p)) for p in self.params]
    )
    with pytest.raises(PrivacyError, match="did not move"):
        private_step(build_part(), build_patients([1]), OBJECTIVES["cross-entropy"], Mechanism(1, C, 1), 1.0, 8)


def test_no_patients_are_refused(build_part):
    empty = PatientTensors(torch.zeros(0, 8), *(torch.zeros(0).long() for _ in range(3)))
    for step in (
        lambda: private_step(build_part(), empty, OBJECTIVES["cross-entropy"], Mechanism(1, C, 1), 1.0, 8),
        lambda: plain_step(build_part(), empty, OBJECTIVES["cross-entropy"], 1.0, 8),
    ):
        with pytest.raises(DataError, match="no patients"):
            step()


def test_without_clip_and_noise_it_is_the_plain_step(build_part, build_patients):
    data = build_patients([3, 1, 4])
    private, plain = build_part(True), build_part(True)
    private_step(private, data, OBJECTIVES["cross-entropy"], Mechanism(1e-9, 100.0, 3), 0.5, 4)
    plain_step(plain, data, OBJECTIVES["cross-entropy"], 0.5, 5)
    assert torch.allclose(flat(private), flat(plain), atol=1e-4)


def test_a_loss_that_is_not_finite_is_an_error_in_the_plain_step(build_part, build_patients):
    data = build_patients([1])
    with pytest.raises(DataError, match="loss is nan"):
        plain_step(build_part(), replace(data, features=data.features * torch.nan), OBJECTIVES["cross-entropy"], 1.0, 8)
