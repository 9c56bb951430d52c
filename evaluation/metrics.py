"""What a classifier is worth, by patient: balanced accuracy and AUROC on data that may be reported."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import recall_score, roc_auc_score

__all__ = ["Scores", "mean_scores", "patient_scores"]


@dataclass(frozen=True)
class Scores:
    """Figures of one model on one specialty."""

    balanced_accuracy: float  # mean recall over the labels present, in [0, 1]
    auroc: float | None  # macro, one label against the rest; None where only one label is present
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
    probability = shifted / shifted.sum(axis=1, keepdims=True)  # (R, K)
    cases, case_of = np.unique(np.stack([patient, label]), axis=1, return_inverse=True)  # (2, P), (R,)
    case_of = case_of.reshape(-1)
    truth = cases[1]
    mean = np.zeros((len(truth), logits.shape[1]))
    np.add.at(mean, case_of, probability)
    mean /= np.bincount(case_of)[:, None]
    present = np.unique(truth)
    auroc = None
    if len(present) > 1:
        # One label against the rest, over the labels that occur; for two labels both terms are equal.
        auroc = float(np.mean([roc_auc_score(truth == k, mean[:, k]) for k in present]))
    recall = recall_score(truth, mean.argmax(axis=1), labels=present, average="macro", zero_division=0)
    return Scores(float(recall), auroc, len(np.unique(cases[0])))


def mean_scores(by_site: Mapping[str, Scores]) -> float:
    """Mean balanced accuracy over sites."""
    return float(np.mean([s.balanced_accuracy for s in by_site.values()]))
