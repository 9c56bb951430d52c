"""The engine: the patient is the unit, the clip bounds what one patient changes, the noise is there."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from opacus.data_loader import DPDataLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clinifed.errors import DataError, PrivacyError
from clinifed.privacy import audit_neighbours
from clinifed.privacy.audit_neighbours import without_patient
from clinifed.privacy.engine import (
    Mechanism,
    PatientDPOptimizer,
    PatientTensors,
    physical_batches,
    plain_step,
    private_step,
    pull_towards,
)
from clinifed.privacy.objectives import OBJECTIVES

C = 0.5
QUIET = 1e-7  # a sigma that leaves the sum readable


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def clipped_sum(part, data, objective, batch_size=16) -> torch.Tensor:
    return audit_neighbours.clipped_sum(part, data, objective, C, batch_size)


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


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("views", [2, 16])
def test_augmented_views_count_in_the_patients_mean_before_the_clip(build_part, build_patients, objective, views):
    """Views that are alike change nothing; different ones change the mean, and the sensitivity stays C."""
    part, data = build_part(True), build_patients([1, 2, 1, 3] * 3)

    def augmented(blur: float) -> PatientTensors:
        rows = torch.arange(len(data.patient)).repeat_interleave(views)
        noise = torch.randn(len(rows), 8, generator=torch.Generator().manual_seed(2))
        return PatientTensors(data.features[rows] + blur * noise, *(t[rows] for t in list(vars(data).values())[1:]))

    once = clipped_sum(part, data, objective)
    assert torch.allclose(clipped_sum(part, augmented(0.0), objective), once, atol=1e-5)
    blurred = augmented(30.0)
    shift = clipped_sum(part, blurred, objective) - clipped_sum(part, without_patient(blurred, 11), objective)
    assert 0.5 * C < shift.norm() <= C * (1 + 1e-4)


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
        clipped_sum(part, broken, objective),
        clipped_sum(part, without_patient(data, 1), objective),
        atol=1e-5,
    )


class Headed(nn.Module):
    """A head behind ``inner``, 8 features to 8."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(8, 2)

    def forward(self, features):
        return {"radiology": self.head(self.inner(features))}


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


class Token(nn.Module):
    """Holds its parameter itself, as class tokens and position embeddings are held."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(8))

    def forward(self, features):
        return features + self.cls_token


class Counter(nn.Module):
    """Keeps a statistic of the patients under a name that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, features):
        self.seen = self.seen + features.detach().sum(dim=0)
        return features


class Unused(nn.Module):
    """A layer that trains and takes no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(8, 8)

    def forward(self, features):
        return features


class Across(nn.Module):
    """A layer over the patients of the batch instead of each one's features."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def forward(self, features):
        return self.mix(features.T).T


class Spatial(nn.Module):
    """InstanceNorm wants (B, C, L)."""

    def __init__(self, tracked: bool) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(2, affine=True, track_running_stats=tracked)

    def forward(self, features):
        return self.norm(features.view(-1, 2, 4)).view(-1, 8)


@pytest.mark.parametrize(
    ("inner", "says"),
    [
        (nn.BatchNorm1d(8), r"inner \(BatchNorm1d\): batch normalisation .* use GroupNorm or LayerNorm"),
        (frozen(nn.BatchNorm1d(8, track_running_stats=False)), "batch normalisation"),
        (nn.SyncBatchNorm(8), "batch normalisation"),
        (Spatial(True), r"inner.norm \(InstanceNorm1d\): running statistics .* set track_running_stats=False"),
        (Token(), r"inner \(Token\): cls_token: .* freeze them"),
        (nn.Bilinear(8, 8, 8), r"inner \(Bilinear\): weight, bias"),
        (Counter(), "inner.seen: a buffer changed while patients passed through"),
        (Unused(), "inner.spare.weight: no gradient per image"),
        (Across(), "inner.mix.weight: 8 gradients for 6 images"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_module_whose_gradient_is_not_one_patients_own_is_refused(build_patients, inner, says):
    with pytest.raises(PrivacyError, match=says):
        private_step(Headed(inner), build_patients([1] * 6), OBJECTIVES["cross-entropy"], Mechanism(1, C, 1), 1.0, 8)


@pytest.mark.parametrize("inner", [frozen(Token()), Spatial(False), nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.Dropout()])
def test_a_module_whose_gradient_is_one_patients_own_trains(build_patients, inner):
    module = Headed(inner)
    before = copy.deepcopy(module.state_dict())
    private_step(module, build_patients([1, 2] * 3), OBJECTIVES["cross-entropy"], Mechanism(1, C, 1), 1.0, 8)
    still = {n for n, t in module.state_dict().items() if torch.equal(t, before[n])}
    assert still == ({"inner.cls_token"} if isinstance(inner, Token) else set())


def test_every_unsound_part_is_told_at_once(build_patients):
    module = Headed(nn.Sequential(nn.BatchNorm1d(8), Token()))
    with pytest.raises(PrivacyError) as caught:
        private_step(module, build_patients([1]), OBJECTIVES["cross-entropy"], Mechanism(1, C, 1), 1.0, 8)
    assert len(caught.value.problems) == 2


def test_a_module_of_frozen_parameters_has_nothing_to_release(build_part, build_patients):
    with pytest.raises(PrivacyError, match="nothing to release"):
        private_step(frozen(build_part()), build_patients([1]), OBJECTIVES["cross-entropy"], Mechanism(1, C, 1), 1.0, 8)


@pytest.mark.parametrize(
    ("options", "sampler"), [({}, "SequentialSampler"), ({"shuffle": True}, "RandomSampler")], ids=["plain", "shuffled"]
)
def test_a_loader_is_refused_with_its_sampler(build_part, build_patients, options, sampler):
    data = build_patients([1, 2])
    loader = DataLoader(TensorDataset(data.features, data.label), batch_size=2, **options)
    with pytest.raises(PrivacyError, match=rf"DataLoader with a {sampler}: .* full batch \(q = 1\)"):
        private_step(build_part(), loader, OBJECTIVES["cross-entropy"], Mechanism(1, C, 1), 1.0, 8)


def test_opacus_own_loader_is_refused_too(build_part):
    loader = DPDataLoader(TensorDataset(torch.zeros(4, 8)), sample_rate=0.5, rand_on_empty=True)
    with pytest.raises(PrivacyError, match=r"DPDataLoader with a UniformWithReplacementSampler: .*rand_on_empty"):
        private_step(build_part(), loader, OBJECTIVES["cross-entropy"], Mechanism(1, C, 1), 1.0, 8)


@pytest.mark.parametrize("patient", [[0, 1, 0, 1], [1, 0, 0, 0], [1, 1, 2, 2], [0, 0, 2, 2], [-1, 0, 1, 2]])
def test_a_patient_in_two_places_or_a_missing_number_is_refused(patient):
    """Sorted and dense, or a patient in two runs of rows would get two clips."""
    zeros = torch.zeros(4).long()
    with pytest.raises(PrivacyError, match="rise from 0 without gaps"):
        PatientTensors(torch.zeros(4, 8), torch.tensor(patient), zeros, zeros)


def test_tensors_that_do_not_belong_together_are_refused():
    zeros = torch.zeros(4).long()
    with pytest.raises(PrivacyError, match=r"different lengths: .*'label': 3"):
        PatientTensors(torch.zeros(4, 8), zeros, zeros, zeros[:3])
    with pytest.raises(PrivacyError, match="int64"):
        PatientTensors(torch.zeros(4, 8), zeros.float(), zeros, zeros)


def test_tensors_that_were_changed_afterwards_are_refused_in_the_step(build_part, build_patients):
    data = build_patients([1, 1, 1])
    data.patient[:] = torch.tensor([0, 1, 0])
    with pytest.raises(PrivacyError, match="rise from 0 without gaps"):
        private_step(build_part(), data, OBJECTIVES["cross-entropy"], Mechanism(1, C, 1), 1.0, 8)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["noise_multiplier", "max_grad_norm"])
def test_a_mechanism_without_noise_or_clip_is_refused_with_its_value(name, value):
    with pytest.raises(PrivacyError, match=f"{name}={value!r}: must be above 0 and finite"):
        replace(Mechanism(1.0, 1.0, 1), **{name: value})


@pytest.mark.parametrize("value", [0, -5])
def test_a_mechanism_without_a_denominator_is_refused(value):
    with pytest.raises(PrivacyError, match=f"nominal_patients={value}: must be 1 or more"):
        Mechanism(1.0, 1.0, value)


def test_every_wrong_number_of_a_mechanism_is_told_at_once():
    with pytest.raises(PrivacyError) as caught:
        Mechanism(0, 0, 0)
    assert len(caught.value.problems) == 3


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


def test_plain_steps_do_not_remember_each_other(build_part, build_patients):
    """Two steps on one module are those on two modules, the second one begun where the first one ended."""
    data, objective = build_patients([3, 1, 4]), OBJECTIVES["cross-entropy"]
    part, first, second = build_part(), build_part(), build_part()
    for _ in range(2):
        plain_step(part, data, objective, 0.5, 5)
    plain_step(first, data, objective, 0.5, 5)
    second.load_state_dict(first.state_dict())
    plain_step(second, data, objective, 0.5, 5)
    assert torch.equal(flat(part), flat(second))


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_the_pull_draws_what_trains_towards_the_start(build_part, strength):
    part = build_part(True)
    part.heads["radiology"].requires_grad_(False)
    start = {name: t.clone() for name, t in part.state_dict().items()}
    with torch.no_grad():
        for parameter in part.parameters():
            parameter += 1
    pull_towards(part, start, strength)
    for name, parameter in part.named_parameters():
        left = 1 - strength if parameter.requires_grad else 1
        assert torch.allclose(parameter - start[name], torch.full_like(parameter, left), atol=1e-6)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_pull_beyond_its_range_is_refused(build_part, strength):
    with pytest.raises(PrivacyError, match=f"strength={strength}"):
        pull_towards(build_part(), {}, strength)


def test_a_loss_that_is_not_finite_is_an_error_in_the_plain_step(build_part, build_patients):
    data = build_patients([1])
    with pytest.raises(DataError, match="loss is nan"):
        plain_step(build_part(), replace(data, features=data.features * torch.nan), OBJECTIVES["cross-entropy"], 1.0, 8)
