"""What a classifier is worth on data that may be reported: balanced accuracy and AUROC by patient, and calibration."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.metrics import recall_score, roc_auc_score

__all__ = [
    "CALIBRATION_BINS",
    "Scores",
    "by_case",
    "calibration_bins",
    "expected_calibration_error",
    "mean_scores",
    "multi_label_calibration_error",
    "multi_label_scores",
    "patient_scores",
]

CALIBRATION_BINS = 15  # as in Guo et al. 2017, arXiv 1706.04599, table 1


@dataclass(frozen=True)
class Scores:
    """Figures of one model on one specialty."""

    balanced_accuracy: float  # mean recall over the labels (or the outcomes of each label) present, in [0, 1]
    auroc: float | None  # macro, one label against the rest; None where no label has both outcomes
    patients: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data for the summary."""
        return asdict(self)


def patient_scores(logits: NDArray[np.floating], patient: NDArray[np.integer], label: NDArray[np.integer]) -> Scores:
    """Scores by patient: the mean of the softmax over a patient's images decides.

    Args:
        logits: (R, K), one row per image.
        patient: (R,), which patient an image belongs to.
        label: (R,) in [0, K). A patient with images of two labels counts once per label.
    """
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    mean, truth, patients = by_case(shifted / shifted.sum(axis=1, keepdims=True), patient, label)
    present = np.unique(truth)
    auroc = None
    if len(present) > 1:
        # One label against the rest, over the labels that occur; for two labels both terms are equal.
        auroc = float(np.mean([roc_auc_score(truth == k, mean[:, k]) for k in present]))
    recall = recall_score(truth, mean.argmax(axis=1), labels=present, average="macro", zero_division=0)
    return Scores(float(recall), auroc, len(np.unique(patients)))


def multi_label_scores(
    logits: NDArray[np.floating], patient: NDArray[np.integer], label_bits: NDArray[np.integer]
) -> Scores:
    """Scores by patient where any number of labels holds: each label is a question of its own.

    The mean of the sigmoid over a patient's images decides; a label is said to hold above 0.5. Both figures are means
    over the labels that have patients with and without them. Where there is none, the balanced accuracy is the mean
    over all labels of how many are told right, and there is no AUROC.

    Args:
        logits: (R, K), one row per image.
        patient: (R,), which patient an image belongs to.
        label_bits: (R,), bit k set where label k holds. A patient whose images differ counts once per set of labels.
    """
    mean, bits, patients = by_case(expit(logits), patient, label_bits)
    truth = (bits[:, None] >> np.arange(logits.shape[1])) & 1 == 1  # (cases, K)
    said = mean > 0.5
    both = [k for k in range(truth.shape[1]) if truth[:, k].any() and not truth[:, k].all()]
    if not both:
        return Scores(float((said == truth).mean()), None, len(np.unique(patients)))
    recalls = [(said[truth[:, k], k].mean() + (~said[~truth[:, k], k]).mean()) / 2 for k in both]
    auroc = float(np.mean([roc_auc_score(truth[:, k], mean[:, k]) for k in both]))
    return Scores(float(np.mean(recalls)), auroc, len(np.unique(patients)))


def by_case(
    probability: NDArray[np.floating], patient: NDArray[np.integer], label: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.integer], NDArray[np.integer]]:
    """A case is a patient with a label: mean of ``probability`` (R, K) over its images, its label, its patient.

    Returns:
        (cases, K), (cases,) and (cases,), sorted by patient.
    """
    cases, case_of = np.unique(np.stack([patient, label]), axis=1, return_inverse=True)  # (2, cases), (R,)
    case_of = case_of.reshape(-1)
    mean = np.zeros((cases.shape[1], probability.shape[1]))
    np.add.at(mean, case_of, probability)
    mean /= np.bincount(case_of)[:, None]
    return mean, cases[1], cases[0]


def calibration_bins(confidence: NDArray[np.floating], bins: int = CALIBRATION_BINS) -> NDArray[np.int64]:
    """The bin of each confidence in [0, 1]: bin m of ``bins`` equally wide ones is (m / bins, (m + 1) / bins]."""
    bin_of: NDArray[np.int64] = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    return bin_of


def expected_calibration_error(
    probability: NDArray[np.floating], label: NDArray[np.integer], bins: int = CALIBRATION_BINS
) -> float:
    """How far a model's confidence is from how often it is right, in [0, 1]; 0 is best.

    ECE of the top label with equally wide bins (Guo et al. 2017, arXiv 1706.04599, eq. 3): the mean, over bins and
    weighted by their size, of |accuracy − mean confidence|.

    Args:
        probability: (R, K), each row a distribution; the largest is the decision and its confidence.
        label: (R,) in [0, K).
        bins: M of the equation.
    """
    return _calibration_gap(probability.max(axis=1), probability.argmax(axis=1) == label, bins)


def multi_label_calibration_error(
    probability: NDArray[np.floating], label_bits: NDArray[np.integer], bins: int = CALIBRATION_BINS
) -> float:
    """The mean over labels of the binary ECE, where any number of labels holds; in [0, 1], 0 is best.

    Of one label the confidence is the probability that it holds, and what it is held against is how often it does.

    Args:
        probability: (R, K) in [0, 1], one column a label.
        label_bits: (R,), bit k set where label k holds.
        bins: as in :func:`expected_calibration_error`.
    """
    truth = (label_bits[:, None] >> np.arange(probability.shape[1])) & 1 == 1  # (R, K)
    return float(np.mean([_calibration_gap(probability[:, k], truth[:, k], bins) for k in range(truth.shape[1])]))


def _calibration_gap(confidence: NDArray[np.floating], outcome: NDArray[np.bool_], bins: int) -> float:
    """Sum over bins of |sum of (outcome − confidence)|, over the number of rows; NaN where a confidence is."""
    if not np.isfinite(confidence).all():
        return float("nan")
    gap = np.bincount(calibration_bins(confidence, bins), weights=outcome - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def mean_scores(by_site: Mapping[str, Scores]) -> float:
    """Mean balanced accuracy over sites."""
    return float(np.mean([s.balanced_accuracy for s in by_site.values()]))
