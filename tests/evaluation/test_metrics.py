"""Metrics by patient: the mean over a patient's images decides; figures agree with hand-made ones."""

import numpy as np
import pytest
from PIL import Image

from clinifed.config import Specialty, Training
from clinifed.data.manifest import Record, write_manifest
from clinifed.errors import DataError
from clinifed.evaluation.metrics import (
    Scores,
    calibration_bins,
    expected_calibration_error,
    mean_scores,
    multi_label_calibration_error,
    multi_label_scores,
    patient_scores,
)
from clinifed.evaluation.scoring import score_part
from clinifed.executors.features import patient_tensors
from clinifed.models.adapters import FrozenPart, build_trainable
from clinifed.models.backbone import load_backbone
from clinifed.privacy.objectives import OBJECTIVES


def logits(*probabilities: float) -> np.ndarray:
    p = np.array(probabilities)
    return np.log(np.stack([1 - p, p], axis=1))


def test_a_patients_images_vote_by_their_mean_probability() -> None:
    scores = patient_scores(logits(0.9, 0.4, 0.4, 0.1), np.array([0, 0, 0, 1]), np.array([1, 1, 1, 0]))
    assert scores == Scores(1.0, 1.0, 2)


def test_balanced_accuracy_is_the_mean_recall() -> None:
    scores = patient_scores(logits(0.9, 0.9, 0.9, 0.1), np.arange(4), np.array([1, 1, 0, 0]))
    assert scores.balanced_accuracy == pytest.approx(0.75)


def test_one_label_alone_has_no_auroc() -> None:
    assert patient_scores(logits(0.9, 0.2), np.arange(2), np.array([1, 1])).auroc is None


def test_more_than_two_labels_are_each_held_against_the_rest() -> None:
    sure = np.eye(3) * 9
    scores = patient_scores(sure, np.arange(3), np.arange(3))
    assert (scores.balanced_accuracy, scores.auroc) == (1.0, 1.0)


def test_the_mean_is_over_sites() -> None:
    assert mean_scores({"x": Scores(0.5, None, 1), "y": Scores(0.7, None, 100)}) == pytest.approx(0.6)


SURE = 9.0


def test_labels_that_hold_together_are_scored_one_by_one() -> None:
    # Label 0 is always told right; of label 1 one of two that hold is missed; label 2 holds nowhere and counts not.
    logits = SURE * np.array([[1, 1, -1], [1, -1, -1], [-1, -1, -1], [-1, -1, -1]])
    scores = multi_label_scores(logits, np.arange(4), np.array([0b011, 0b011, 0, 0]))
    assert scores.balanced_accuracy == pytest.approx((1 + (0.5 + 1) / 2) / 2)
    assert scores.auroc == pytest.approx((1 + 0.75) / 2)
    assert scores.patients == 4


def test_with_several_labels_a_patients_images_vote_by_their_mean_probability_too() -> None:
    p = np.array([[0.9], [0.4], [0.4], [0.1]])
    assert multi_label_scores(np.log(p / (1 - p)), np.array([0, 0, 0, 1]), np.array([1, 1, 1, 0])) == Scores(1, 1, 2)


def test_where_no_label_has_both_outcomes_there_is_no_auroc() -> None:
    logits = SURE * np.array([[1, -1], [-1, -1]])
    assert multi_label_scores(logits, np.arange(2), np.array([0b01, 0b01])) == Scores(0.75, None, 2)


def test_a_manifest_with_several_labels_reaches_the_scores(tmp_path) -> None:
    specialty = Specialty(labels={"effusion": ("effusion",), "mass": ("a mass",), "nodule": ("a nodule",)})
    (tmp_path / "images").mkdir()
    records = []
    for number, label in enumerate(["effusion|nodule", "", "mass"]):
        image = f"images/{number}.png"
        Image.fromarray(np.full((32, 32), 80 * number, np.uint8)).save(tmp_path / image)
        records.append(Record(image, f"p{number}", "radiology", label, "", "train"))
    manifest = write_manifest(tmp_path / "manifest.csv", records, "synthetic")
    backbone = load_backbone("tiny")
    part = build_trainable(backbone, {"radiology": specialty}, Training(train="heads"))
    model, many = FrozenPart(backbone, part), OBJECTIVES["multi-label-bce"]
    options = {"split": None, "batch_size": 8, "cache": None}
    data = patient_tensors(model, backbone, manifest, {"radiology": specialty}, objective=many, **options)
    assert data.label.tolist() == [0b101, 0, 0b010]
    assert score_part(part, data, ["radiology"], many)["radiology"].patients == 3
    with pytest.raises(DataError, match="2 images of radiology have a label outside"):
        patient_tensors(model, backbone, manifest, {"radiology": specialty}, **options)


def test_a_model_as_sure_as_it_is_right_has_no_calibration_error() -> None:
    probability = np.tile([0.75, 0.25], (8, 1))
    assert expected_calibration_error(probability, np.array([0] * 6 + [1] * 2)) == pytest.approx(0)


def test_calibration_error_is_the_weighted_gap_of_the_bins() -> None:
    # Three rows in the bin of 0.9, two of them right; one row in the bin of 0.6, wrong.
    probability = np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.6, 0.4]])
    found = expected_calibration_error(probability, np.array([0, 1, 1, 1]))
    assert found == pytest.approx((3 * abs(2 / 3 - 0.9) + 1 * abs(0 - 0.6)) / 4)


def test_a_bin_reaches_from_above_its_lower_edge_to_its_upper_edge() -> None:
    assert calibration_bins(np.array([0.0, 0.2, 0.21, 0.4, 1.0]), 5).tolist() == [0, 0, 1, 1, 4]


def test_with_several_labels_the_calibration_error_is_the_mean_over_labels() -> None:
    # Label 0 is said to hold at 0.8 and holds always; label 1 at 0.3 and holds never.
    probability = np.tile([0.8, 0.3], (5, 1))
    assert multi_label_calibration_error(probability, np.full(5, 0b01)) == pytest.approx((0.2 + 0.3) / 2)


def test_a_broken_probability_has_no_calibration_error() -> None:
    assert np.isnan(expected_calibration_error(np.array([[np.nan, 0.5]]), np.array([1])))
