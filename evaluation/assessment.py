"""Models on the same patients of one specialty: every figure with its interval, and what is too small to be told.

The figures are by patient: the mean probability over a patient's images decides, as in
:mod:`clinifed.evaluation.metrics`. All models are judged on the same draws of patients, so that differences are paired.
Shapes: R images, N cases (a patient with a label), K labels, B draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax

from clinifed.evaluation.draws import Floats, auroc, calibration_error, patient_draws, recall
from clinifed.evaluation.intervals import REPLICATES, Interval, interval_of
from clinifed.evaluation.metrics import by_case

__all__ = ["FIGURES", "MIN_PATIENTS", "Drawn", "Panel"]

FIGURES = ("auroc", "balanced_accuracy", "corrected", "ece")
# A convention, after the ten events per variable of Peduzzi et al. (J Clin Epidemiol 1996;49:1373); percentile
# intervals of fewer patients are too narrow as well.
MIN_PATIENTS = 10
_BLOCK = 1 << 21  # weights handled at once; bounds memory, never the result


@dataclass(frozen=True)
class Drawn:
    """One model's figures on every draw, (1 + B, …); the first row is the sample's own."""

    auroc: Floats  # (1 + B, K), one label against the rest
    accuracy: Floats  # (1 + B, K), recall of the label; where any number may hold, the mean of both its outcomes
    ece: Floats  # (1 + B,)

    @classmethod
    def mean(cls, models: Sequence[Self]) -> Self:
        """The mean over several models, draw by draw: a site's neighbours, each with a model of its own."""
        return cls(*(np.mean([getattr(m, name) for m in models], axis=0) for name in ("auroc", "accuracy", "ece")))


class Panel:
    """The patients of one specialty on whom models are judged.

    A label with fewer than ``minimum`` patients on either side is suppressed: it has no figures of its own, and the
    figures that are means over labels are not told at all, since without it they would be of another question. With
    fewer than ``minimum`` patients altogether nothing is told.

    Args:
        patient: (R,), whose image each is.
        label: (R,) in [0, K); with ``multi_label`` bit k is set where label k holds.
        labels: the K names.
        multi_label: whether any number of labels holds.
        minimum: of patients, 1 or more.
        replicates: B.
        seed: of the draws.

    Guarantees:
        - The unit of a draw is the patient, whatever images and labels a patient has.
        - No figure is a mean over fewer labels than the specialty has.
    """

    def __init__(
        self,
        patient: NDArray[np.integer],
        label: NDArray[np.integer],
        labels: Sequence[str],
        *,
        multi_label: bool = False,
        minimum: int = MIN_PATIENTS,
        replicates: int = REPLICATES,
        seed: int = 0,
    ) -> None:
        self._patient, self._label = patient, label
        self.labels, self.multi_label, self.minimum = tuple(labels), multi_label, minimum
        _, self._code, of_case = by_case(np.zeros((len(label), len(labels))), patient, label)
        own, unit = np.unique(of_case, return_inverse=True)
        self.patients = len(own)
        self._weights = patient_draws(unit, replicates, seed)
        ranks = np.arange(len(labels))
        self._truth = (self._code[:, None] >> ranks) & 1 == 1 if multi_label else self._code[:, None] == ranks  # (N, K)
        counts = [[len(np.unique(of_case[side[:, k]])) for k in ranks] for side in (self._truth, ~self._truth)]
        self._support = counts[0]
        self._enough = [min(pair) >= minimum for pair in zip(*counts, strict=True)]

    @property
    def chance(self) -> float:
        """The balanced accuracy of deciding blindly."""
        return 0.5 if self.multi_label else 1 / len(self.labels)

    @property
    def suppressed(self) -> tuple[str, ...]:
        """The labels of which too few patients have, or have not, the finding."""
        return tuple(name for name, enough in zip(self.labels, self._enough, strict=True) if not enough)

    def support(self) -> dict[str, int | None]:
        """Patients with each label; None is fewer than ``minimum``."""
        counts = zip(self.labels, self._support, strict=True)
        return {name: count if count >= self.minimum else None for name, count in counts}

    def drawn(self, logits: NDArray[np.floating]) -> Drawn:
        """The figures of a model with ``logits`` (R, K); undefined where one is not finite."""
        shape = (len(self._weights), len(self.labels))
        if not np.isfinite(logits).all():
            return Drawn(np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape[0], np.nan))
        probability = expit(logits) if self.multi_label else softmax(logits, axis=1)
        mean, _, _ = by_case(probability, self._patient, self._label)  # (N, K)
        blocks = np.array_split(self._weights, -(-self._weights.size // _BLOCK))
        return Drawn(*map(np.concatenate, zip(*(self._of_draws(weights, mean) for weights in blocks), strict=True)))

    def _of_draws(self, weights: Floats, mean: Floats) -> tuple[Floats, Floats, Floats]:
        """The parts of a :class:`Drawn` for some draws, of probabilities ``mean`` (N, K)."""
        truth = self._truth
        if self.multi_label:
            right = (mean > 0.5) == truth
            accuracy = np.mean([recall(weights, side, right) for side in (truth, ~truth)], axis=0)
            ece = calibration_error(weights, mean, truth)
        else:
            right = (mean.argmax(axis=1) == self._code)[:, None]
            accuracy = recall(weights, truth, right)
            ece = calibration_error(weights, mean.max(axis=1, keepdims=True), right)
        return auroc(weights, mean, truth), accuracy, ece

    def _macro(self, drawn: Drawn) -> dict[str, Floats]:
        accuracy = drawn.accuracy.mean(axis=1)
        corrected = (accuracy - self.chance) / (1 - self.chance)
        figures = (drawn.auroc.mean(axis=1), accuracy, corrected, drawn.ece)
        return dict(zip(FIGURES, figures, strict=True))

    def _told(self, figures: dict[str, Floats]) -> dict[str, Interval]:
        told = {}
        for name, value in figures.items():
            over_labels = name != "ece" or self.multi_label
            hidden = (over_labels and self.suppressed) or self.patients < self.minimum
            told[name] = Interval() if hidden else interval_of(value, self.patients)
        return told

    def figures(self, drawn: Drawn) -> dict[str, Any]:
        """Each of :data:`FIGURES` and, in ``by_label``, AUROC and accuracy of each label; as JSON values."""
        by_label = {}
        for k, (name, enough) in enumerate(zip(self.labels, self._enough, strict=True)):
            both = {"auroc": drawn.auroc[:, k], "accuracy": drawn.accuracy[:, k]}
            by_label[name] = {
                what: (interval_of(value, self.patients) if enough else Interval()).to_dict()
                for what, value in both.items()
            }
        told = {name: value.to_dict() for name, value in self._told(self._macro(drawn)).items()}
        return {**told, "by_label": by_label}

    def gain(self, candidate: Drawn, reference: Drawn) -> dict[str, Any]:
        """Candidate − reference in each of :data:`FIGURES`, paired; as JSON values."""
        after, before = self._macro(candidate), self._macro(reference)
        told = self._told({name: after[name] - before[name] for name in FIGURES})
        return {name: value.to_dict() for name, value in told.items()}

    def to_dict(self) -> dict[str, Any]:
        """Who the patients are, in numbers; as JSON values."""
        return {
            "patients": self.patients,
            "minimum": self.minimum,
            "support": self.support(),
            "suppressed": list(self.suppressed),
            "chance": self.chance,
        }
