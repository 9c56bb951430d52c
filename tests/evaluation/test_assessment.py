"""Figures by patient with intervals: scikit-learn's, draw by draw; none where too few patients are behind it."""

import numpy as np
import pytest
from scipy.special import expit, softmax
from scipy.stats import norm
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from clinifed.evaluation import assessment
from clinifed.evaluation.assessment import FIGURES, Panel
from clinifed.evaluation.metrics import (
    by_case,
    expected_calibration_error,
    multi_label_calibration_error,
    multi_label_scores,
    patient_scores,
)

LABELS = ("normal", "effusion", "mass")


def sample(patients: int, seed: int, signal: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits (R, 3), patient (R,), label (R,) of patients with one to three images."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), rng.integers(1, 4, patients))
    label = (np.arange(patients) % 3)[patient]
    return rng.standard_normal((len(patient), 3)) + signal * np.eye(3)[label], patient, label


def slow(probability: np.ndarray, label: np.ndarray, multi_label: bool) -> dict[str, float]:
    """The same figures of cases that are really repeated, by scikit-learn."""
    if multi_label:
        truth = (label[:, None] >> np.arange(3)) & 1
        accuracy = [balanced_accuracy_score(truth[:, k], probability[:, k] > 0.5) for k in range(3)]
        return {
            "auroc": roc_auc_score(truth, probability, average="macro"),
            "balanced_accuracy": np.mean(accuracy),
            "corrected": 2 * np.mean(accuracy) - 1,
            "ece": multi_label_calibration_error(probability, label),
        }
    said = probability.argmax(axis=1)
    return {
        "auroc": roc_auc_score(label, probability, multi_class="ovr", average="macro"),
        "balanced_accuracy": balanced_accuracy_score(label, said),
        "corrected": balanced_accuracy_score(label, said, adjusted=True),
        "ece": expected_calibration_error(probability, label),
    }


@pytest.mark.parametrize("multi_label", [False, True])
def test_figures_and_intervals_are_those_of_scikit_learn_draw_by_draw(multi_label: bool) -> None:
    logits, patient, label = sample(60, 1)
    if multi_label:
        label = np.random.default_rng(2).integers(1, 8, 60)[patient]
    panel = Panel(patient, label, LABELS, multi_label=multi_label, replicates=60, seed=3)
    found = panel.figures(panel.drawn(logits))
    mean, code, _ = by_case(expit(logits) if multi_label else softmax(logits, axis=1), patient, label)
    assert {name: found[name]["value"] for name in FIGURES} == pytest.approx(slow(mean, code, multi_label))
    draws = np.random.default_rng(3).integers(60, size=(60, 60))  # a patient has one case here: patients are cases
    each = [slow(mean[draw], code[draw], multi_label) for draw in draws]
    for name in FIGURES:
        wanted = np.quantile([figures[name] for figures in each], [0.025, 0.975])
        assert (found[name]["low"], found[name]["high"]) == pytest.approx(tuple(wanted)), name


def test_the_values_are_those_of_the_run_s_own_metrics() -> None:
    logits, patient, label = sample(40, 4)
    panel = Panel(patient, label, LABELS, replicates=10)
    found, scores = panel.figures(panel.drawn(logits)), patient_scores(logits, patient, label)
    assert found["auroc"]["value"] == pytest.approx(scores.auroc)
    assert found["balanced_accuracy"]["value"] == pytest.approx(scores.balanced_accuracy)
    many = Panel(patient, label + 1, LABELS, multi_label=True, replicates=10, minimum=1)
    told = many.figures(many.drawn(logits))
    bits = multi_label_scores(logits[:, :2], patient, label + 1)
    assert many.suppressed == ("mass",)
    assert np.mean([told["by_label"][name]["auroc"]["value"] for name in LABELS[:2]]) == pytest.approx(bits.auroc)


def test_the_unit_of_a_draw_is_the_patient_whatever_images_and_labels_a_patient_has() -> None:
    """Each patient copied into ten images of the same: no new evidence, the same interval."""
    logits, patient, label = sample(36, 5)
    first = np.unique(patient, return_index=True)[1]
    once = Panel(patient[first], label[first], LABELS)
    many = Panel(np.repeat(patient[first], 10), np.repeat(label[first], 10), LABELS)
    one, other = once.figures(once.drawn(logits[first])), many.figures(many.drawn(np.repeat(logits[first], 10, axis=0)))
    for name in FIGURES:
        assert other[name] == pytest.approx(one[name])
    for label_name in LABELS:
        assert other["by_label"][label_name]["auroc"] == pytest.approx(one["by_label"][label_name]["auroc"])
    assert many.support() == once.support() == dict.fromkeys(LABELS, 12)
    # A patient with two labels is two cases of one patient: with one patient in all, there is no interval.
    single = Panel(np.zeros(4, int), np.array([0, 0, 1, 2]), LABELS, minimum=1)
    figures = single.figures(single.drawn(np.eye(4, 3)))
    assert figures["balanced_accuracy"]["value"] is not None
    assert figures["balanced_accuracy"]["low"] is None


def test_no_figure_is_a_mean_over_fewer_labels_than_the_specialty_has() -> None:
    logits, patient, label = sample(60, 6)
    kept = (label != 2) | (patient < 15)  # five patients with a mass are left
    panel = Panel(patient[kept], label[kept], LABELS)
    drawn = panel.drawn(logits[kept])
    told = panel.figures(drawn)
    assert panel.suppressed == ("mass",)
    assert panel.support() == {"normal": 20, "effusion": 20, "mass": None}
    for name in ("auroc", "balanced_accuracy", "corrected"):
        assert told[name] == {"value": None, "low": None, "high": None}
        assert panel.gain(drawn, drawn)[name]["value"] is None
    assert told["by_label"]["mass"]["auroc"]["value"] is None
    assert told["by_label"]["normal"]["auroc"]["low"] is not None
    assert told["ece"]["value"] is not None, "it is a mean over patients, not over labels"
    assert Panel(patient[kept], label[kept], LABELS, minimum=5).suppressed == ()


def test_of_too_few_patients_nothing_is_told() -> None:
    logits, patient, label = sample(9, 7)
    panel = Panel(patient, label, LABELS)
    told = panel.figures(panel.drawn(logits))
    assert all(told[name]["value"] is None for name in FIGURES)
    assert panel.support() == dict.fromkeys(LABELS)


def test_a_label_that_nearly_everybody_has_is_suppressed_too() -> None:
    """Who lacks it are the negatives of its AUROC."""
    _, patient, _ = sample(40, 8)
    bits = np.where(patient < 3, 0b001, 0b011)
    panel = Panel(patient, bits, LABELS[:2], multi_label=True)
    assert panel.suppressed == ("normal", "effusion")
    assert panel.support() == {"normal": 40, "effusion": 37}


def test_a_gain_is_paired_so_that_a_small_one_shows_where_the_figures_overlap() -> None:
    logits, patient, label = sample(90, 9)
    better = logits + 0.2 * np.eye(3)[label]
    panel = Panel(patient, label, LABELS)
    one, other = panel.drawn(logits), panel.drawn(better)
    gain, figures = panel.gain(other, one), panel.figures(other)
    for name in ("auroc", "balanced_accuracy"):
        assert gain[name]["value"] == pytest.approx(figures[name]["value"] - panel.figures(one)[name]["value"])
        assert gain[name]["high"] - gain[name]["low"] < figures[name]["high"] - figures[name]["low"]
    assert gain["auroc"]["low"] > 0
    assert panel.figures(one)["auroc"]["high"] > figures["auroc"]["low"]
    assert panel.gain(one, one)["auroc"] == {"value": 0, "low": 0, "high": 0}


def test_a_mean_over_models_is_a_mean_on_every_draw() -> None:
    panels = sample(45, 10), sample(45, 10, signal=2.0)
    panel = Panel(panels[0][1], panels[0][2], LABELS)
    drawn = [panel.drawn(logits) for logits, _, _ in panels]
    mean = panel.figures(type(drawn[0]).mean(drawn))
    values = [panel.figures(one)["auroc"]["value"] for one in drawn]
    assert mean["auroc"]["value"] == pytest.approx(np.mean(values))
    assert mean["auroc"]["low"] < mean["auroc"]["value"] < mean["auroc"]["high"]


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Two labels whose scores are normal, a distance d apart: the AUROC is Φ(d/√2) (Hanley & McNeil 1982)."""
    distance, covered = 1.0, []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        label = np.arange(80) % 2
        score = rng.standard_normal(80) + distance * label
        panel = Panel(np.arange(80), label, LABELS[:2], replicates=200)
        figure = panel.figures(panel.drawn(np.stack([np.zeros(80), score], axis=1)))["auroc"]
        covered.append(figure["low"] <= norm.cdf(distance / np.sqrt(2)) <= figure["high"])
    assert 0.88 <= np.mean(covered) <= 0.99


def test_draws_handled_in_blocks_give_what_they_give_at_once(monkeypatch) -> None:
    logits, patient, label = sample(45, 12)
    panel = Panel(patient, label, LABELS, replicates=50)
    whole = panel.drawn(logits)
    monkeypatch.setattr(assessment, "_BLOCK", 100)
    parts = panel.drawn(logits)
    for name in ("auroc", "accuracy", "ece"):
        assert np.allclose(getattr(parts, name), getattr(whole, name))


def test_a_broken_model_has_no_figures() -> None:
    logits, patient, label = sample(45, 11)
    logits[3, 1] = np.nan
    panel = Panel(patient, label, LABELS)
    assert all(panel.figures(panel.drawn(logits))[name]["value"] is None for name in FIGURES)
