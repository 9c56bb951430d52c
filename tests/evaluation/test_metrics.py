"""Metrics by patient: the mean over a patient's images decides; figures agree with hand-made ones."""

import numpy as np
import pytest

from clinifed.evaluation.metrics import Scores, mean_scores, patient_scores


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
