"""How sure is a figure, and is a difference between two models chance? Percentile bootstrap over patients.

Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13: patients are drawn with replacement, both models
are judged on the same draw, and the interval is read off the figures, or off their differences. A drawn patient brings
all images along, because images of one patient are not independent.

All draws are judged at once (:mod:`clinifed.evaluation.draws`).
Shapes: N images, K labels, B draws.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax

from clinifed.errors import DataError
from clinifed.evaluation.draws import Floats, auroc, calibration_error, mean_of_defined, patient_draws, recall

__all__ = ["FIGURES", "LEVEL", "REPLICATES", "Difference", "Interval", "interval_of", "paired_differences"]

FIGURES = ("auroc", "balanced_accuracy", "ece")  # the keys of paired_differences
LEVEL = 0.95
REPLICATES = 1000  # Efron & Tibshirani 1993, section 14.3: what percentiles need


@dataclass(frozen=True)
class Interval:
    """One figure with its interval; None where it is undefined."""

    value: float | None = None  # of the sample itself
    low: float | None = None
    high: float | None = None

    @property
    def covers_zero(self) -> bool | None:
        """Does the interval hold 0? None where there is no interval."""
        return None if self.low is None or self.high is None else self.low <= 0 <= self.high

    def to_dict(self) -> dict[str, float | None]:
        """JSON values."""
        return asdict(self)


def interval_of(drawn: Floats, patients: int, level: float = LEVEL) -> Interval:
    """The percentile interval of a figure, or of a difference of two on the same draws.

    Args:
        drawn: (1 + B,), the sample's own and that of each draw; NaN is undefined, and a draw with it is left out.
        patients: how many were drawn from; of fewer than two there is no interval.
        level: of the interval, in (0, 1).
    """
    if not np.isfinite(drawn[0]):
        return Interval()
    defined = drawn[1:][np.isfinite(drawn[1:])]
    if patients < 2 or not len(defined):
        return Interval(float(drawn[0]))
    tail = (1 - level) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(float(drawn[0]), float(low), float(high))


@dataclass(frozen=True)
class Difference:
    """One figure of two models on the same images; None where it is undefined."""

    reference: float | None
    candidate: float | None
    difference: float | None  # candidate - reference
    low: float | None  # of the interval of the difference
    high: float | None

    @property
    def covers_zero(self) -> bool | None:
        """Does the interval hold 0? None where there is no interval."""
        return None if self.low is None or self.high is None else self.low <= 0 <= self.high

    def to_dict(self) -> dict[str, float | None]:
        """JSON values."""
        return asdict(self)


def paired_differences(
    reference: NDArray[np.floating],
    candidate: NDArray[np.floating],
    label: NDArray[np.integer],
    patients: Sequence[int | str] | None = None,
    *,
    multi_label: bool = False,
    replicates: int = REPLICATES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Difference]:
    """Candidate − reference in each of :data:`FIGURES`, with an interval; the same seed gives the same interval.

    The figures are those of :mod:`clinifed.evaluation.metrics`, by image. AUROC, one label against the rest, and
    balanced accuracy are means over the labels that occur; ECE is of the top label. With ``multi_label`` each label is
    a question of its own: the former two are means over the labels that have images with and without them, and ECE is
    the mean over all.

    A draw in which a figure is undefined (AUROC, where it holds one label) is left out of that figure's interval. An
    image on which a model's output is not finite is one that it decides wrongly, and leaves that model without AUROC
    and ECE.

    Args:
        reference: (N, K) logits, N ≥ 1.
        candidate: (N, K) logits of the other model on the same images.
        label: (N,) in [0, K); with ``multi_label`` bit k is set where label k holds.
        patients: (N,), whose image each is; without it every image is drawn on its own. Of fewer than two patients
            there is no interval.
        multi_label: whether any number of labels holds, each with the sigmoid of its logit; else one, with the softmax.
        replicates: B.
        level: of the interval, in (0, 1).
        seed: of the draws.

    Raises:
        DataError: a label is outside the K of the logits.
    """
    labels = reference.shape[1]
    limit = 2**labels if multi_label else labels
    if outside := sorted({int(value) for value in label if not 0 <= value < limit}):
        kind = "bit sets" if multi_label else "indices"
        raise DataError(f"labels {outside} are no {kind} of {labels} labels; encode them as the objective does")
    unit = np.arange(len(label)) if patients is None else np.unique(np.asarray(patients), return_inverse=True)[1]
    weights = patient_draws(unit, replicates, seed)
    before, after = (_figures(weights, logits, label, multi_label) for logits in (reference, candidate))
    found = {}
    for name in FIGURES:
        one, other = before[name], after[name]
        change = interval_of(other - one, int(unit.max()) + 1, level)
        found[name] = Difference(_or_none(one[0]), _or_none(other[0]), change.value, change.low, change.high)
    return found


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _figures(
    weights: Floats, logits: NDArray[np.floating], label: NDArray[np.integer], multi_label: bool
) -> dict[str, Floats]:
    """Each figure on every draw, (1 + B,); NaN where it is undefined."""
    whole = np.isfinite(logits).all(axis=1)
    logits = np.where(whole[:, None], logits, 0).astype(np.float64)
    if multi_label:
        probability = confidence = expit(logits)
        truth = outcome = (label[:, None] >> np.arange(logits.shape[1])) & 1 == 1  # (N, K)
        right = ((logits > 0) == truth) & whole[:, None]
        sides = (recall(weights, side, right) for side in (truth, ~truth))
        told = np.mean(list(sides), axis=0)
    else:
        present = np.unique(label)
        truth = label[:, None] == present  # (N, labels that occur)
        probability = softmax(logits, axis=1)
        confidence, decision = probability.max(axis=1, keepdims=True), logits.argmax(axis=1)
        probability = probability[:, present]
        outcome = (decision == label)[:, None]
        told = recall(weights, truth, outcome & whole[:, None])
    undefined = np.full(len(weights), np.nan)
    return {
        "auroc": mean_of_defined(auroc(weights, probability, truth)) if whole.all() else undefined,
        "balanced_accuracy": mean_of_defined(told),
        "ece": calibration_error(weights, confidence, outcome) if whole.all() else undefined,
    }
