"""Intervals of paired differences: right figures, right draws, right coverage, and none where there can be none."""

import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from clinifed.errors import DataError
from clinifed.evaluation.intervals import FIGURES, Difference, paired_differences
from clinifed.evaluation.metrics import (
    expected_calibration_error,
    multi_label_calibration_error,
    multi_label_scores,
    patient_scores,
)


def sample(images: int, labels: int, seed: int, signal: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits (images, labels) that know their label (images,) to some degree, with ties."""
    rng = np.random.default_rng(seed)
    label = rng.integers(labels, size=images)
    return np.round(rng.standard_normal((images, labels)) + signal * np.eye(labels)[label], 1), label


@pytest.mark.parametrize("labels", [2, 3, 7])
def test_the_figures_are_those_of_the_metrics(labels: int) -> None:
    reference, label = sample(90, labels, 1)
    candidate, _ = sample(90, labels, 2)
    found = paired_differences(reference, candidate, label, replicates=10)
    for which, logits in (("reference", reference), ("candidate", candidate)):
        scores = patient_scores(logits, np.arange(90), label)
        wanted = {
            "auroc": scores.auroc,
            "balanced_accuracy": scores.balanced_accuracy,
            "ece": expected_calibration_error(softmax(logits, axis=1), label),
        }
        assert {name: getattr(found[name], which) for name in FIGURES} == pytest.approx(wanted)
    assert found["auroc"].difference == pytest.approx(found["auroc"].candidate - found["auroc"].reference)


def test_with_several_labels_the_figures_are_those_of_the_metrics_too() -> None:
    reference, _ = sample(80, 4, 1)
    candidate, _ = sample(80, 4, 2)
    bits = np.random.default_rng(3).integers(8, size=80)  # of the four labels, the last never holds
    found = paired_differences(reference, candidate, bits, multi_label=True, replicates=50)
    for which, logits in (("reference", reference), ("candidate", candidate)):
        scores = multi_label_scores(logits, np.arange(80), bits)
        wanted = {
            "auroc": scores.auroc,
            "balanced_accuracy": scores.balanced_accuracy,
            "ece": multi_label_calibration_error(expit(logits), bits),
        }
        assert {name: getattr(found[name], which) for name in FIGURES} == pytest.approx(wanted)
    assert all(figure.low <= figure.difference <= figure.high for figure in found.values())


def test_the_interval_is_that_of_draws_made_one_by_one() -> None:
    """The same bootstrap, slowly: images are really repeated, and scikit-learn scores them."""
    reference, label = sample(60, 2, 3)
    candidate, _ = sample(60, 2, 3, signal=1.5)
    patients = np.arange(60) // 3
    found = paired_differences(reference, candidate, label, patients.tolist(), replicates=100, seed=5)
    draws = np.random.default_rng(5).integers(20, size=(100, 20))
    drawn: dict[str, list[float]] = {name: [] for name in FIGURES}
    for draw in draws:
        rows = np.concatenate([np.flatnonzero(patients == patient) for patient in draw])
        truth = label[rows]
        one, other = (softmax(value[rows], axis=1) for value in (reference, candidate))
        auroc = [np.mean([roc_auc_score(truth == k, p[:, k]) for k in (0, 1)]) for p in (one, other)]
        drawn["auroc"].append(auroc[1] - auroc[0])
        accuracy = [balanced_accuracy_score(truth, p.argmax(axis=1)) for p in (one, other)]
        drawn["balanced_accuracy"].append(accuracy[1] - accuracy[0])
        drawn["ece"].append(expected_calibration_error(other, truth) - expected_calibration_error(one, truth))
    for name in FIGURES:
        assert (found[name].low, found[name].high) == pytest.approx(tuple(np.quantile(drawn[name], [0.025, 0.975])))


def test_two_equally_good_models_mostly_cover_zero_and_a_better_one_does_not() -> None:
    covered = []
    for seed in range(100):
        reference, label = sample(120, 2, seed)
        noise = np.random.default_rng(1000 + seed).standard_normal((2, 120, 2))
        one, other = reference + noise[0], reference + noise[1]
        covered.append(paired_differences(one, other, label, replicates=300)["auroc"].covers_zero)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.06)
    better = paired_differences(reference + noise[0], reference + 3 * np.eye(2)[label], label)
    assert better["auroc"].low > 0
    assert better["balanced_accuracy"].covers_zero is False


def test_images_of_one_patient_widen_the_interval() -> None:
    """Ten copies of each image are no new evidence, and drawing patients says so."""
    reference, label = sample(30, 2, 8)
    candidate, _ = sample(30, 2, 9)
    copies = [np.repeat(value, 10, axis=0) for value in (reference, candidate, label)]
    single = paired_differences(reference, candidate, label)["balanced_accuracy"]
    by_patient = paired_differences(*copies, np.repeat(np.arange(30), 10).tolist())["balanced_accuracy"]
    by_image = paired_differences(*copies)["balanced_accuracy"]
    assert (by_patient.low, by_patient.high) == pytest.approx((single.low, single.high))
    assert by_image.high - by_image.low < 0.5 * (by_patient.high - by_patient.low)


def test_the_same_seed_gives_the_same_interval_and_names_of_patients_do_not_matter() -> None:
    reference, label = sample(40, 3, 4)
    candidate, _ = sample(40, 3, 5)
    numbers = [i // 2 for i in range(40)]
    names = [f"patient-{n:02}" for n in numbers]
    one = paired_differences(reference, candidate, label, numbers)
    assert one == paired_differences(reference, candidate, label, names)
    assert one != paired_differences(reference, candidate, label, names, seed=1)


def test_one_patient_has_no_interval() -> None:
    reference, label = sample(12, 2, 6)
    found = paired_differences(reference, reference + 1, label, ["p"] * 12)["balanced_accuracy"]
    assert found.difference is not None
    assert (found.low, found.high, found.covers_zero) == (None, None, None)


def test_draws_of_a_single_label_do_not_spoil_the_interval_of_the_auroc() -> None:
    reference, candidate = np.array([[0.0, 1], [1, 0], [0, 2]]), np.array([[1.0, 0], [0, 1], [0, 2]])
    found = paired_differences(reference, candidate, np.array([1, 0, 1]))["auroc"]
    assert found.reference == 1
    assert found.low is not None
    assert -1 <= found.low <= found.high <= 0


def test_one_label_has_no_auroc() -> None:
    logits, _ = sample(9, 2, 7)
    assert paired_differences(logits, logits, np.ones(9, int))["auroc"] == Difference(None, None, None, None, None)


@pytest.mark.parametrize(("label", "multi_label"), [(3, False), (-1, False), (8, True)])
def test_a_label_that_the_head_does_not_have_is_refused(label: int, multi_label: bool) -> None:
    logits, _ = sample(4, 3, 7)
    with pytest.raises(DataError, match=rf"labels \[{label}\] are no"):
        paired_differences(logits, logits, np.array([0, 1, 2, label]), multi_label=multi_label)
