"""Is a difference between two models more than chance? Paired percentile bootstrap over patients.

Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13: patients are drawn with replacement, both models
are judged on the same draw, and the interval is read off the differences. A drawn patient brings all images along,
because images of one patient are not independent.

A draw is a row of weights, how often each image is in it, so that all draws are judged at once.
Shapes: N images, K labels, B draws.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax

from clinifed.errors import DataError
from clinifed.evaluation.metrics import CALIBRATION_BINS, calibration_bins

__all__ = ["FIGURES", "LEVEL", "REPLICATES", "Difference", "paired_differences"]

FIGURES = ("auroc", "balanced_accuracy", "ece")  # the keys of paired_differences
LEVEL = 0.95
REPLICATES = 1000  # Efron & Tibshirani 1993, section 14.3: what percentiles need

Floats = NDArray[np.float64]


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
    weights = _draws(unit, replicates, np.random.default_rng(seed))
    before, after = (_figures(weights, logits, label, multi_label) for logits in (reference, candidate))
    tail = (1 - level) / 2
    found = {}
    for name in FIGURES:
        one, other = before[name], after[name]
        drawn = other[1:] - one[1:]
        drawn = drawn[np.isfinite(drawn)]
        some = len(drawn) > 0 and unit.max() > 0 and np.isfinite(other[0] - one[0])
        low, high = np.quantile(drawn, [tail, 1 - tail]) if some else (np.nan, np.nan)
        found[name] = Difference(*map(_or_none, (one[0], other[0], other[0] - one[0], low, high)))
    return found


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _draws(unit: NDArray[np.integer], replicates: int, rng: np.random.Generator) -> Floats:
    """(1 + B, N): how often each image is in the sample itself (once), and in each draw of as many units."""
    units = int(unit.max()) + 1
    drawn = rng.integers(units, size=(replicates, units)) + units * np.arange(replicates)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=replicates * units).reshape(replicates, units)
    return np.concatenate([np.ones((1, len(unit))), counts[:, unit]])


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
        sides = (_recall(weights, side, right) for side in (truth, ~truth))
        recall = np.mean(list(sides), axis=0)
    else:
        present = np.unique(label)
        truth = label[:, None] == present  # (N, labels that occur)
        probability = softmax(logits, axis=1)
        confidence, decision = probability.max(axis=1, keepdims=True), logits.argmax(axis=1)
        probability = probability[:, present]
        outcome = (decision == label)[:, None]
        recall = _recall(weights, truth, outcome & whole[:, None])
    undefined = np.full(len(weights), np.nan)
    return {
        "auroc": _auroc(weights, probability, truth) if whole.all() else undefined,
        "balanced_accuracy": _mean_of_defined(recall),
        "ece": _ece(weights, confidence, outcome) if whole.all() else undefined,
    }


def _mean_of_defined(value: Floats) -> Floats:
    """Mean of each row without its NaN; NaN where there is nothing else."""
    defined = np.isfinite(value)
    total, count = np.where(defined, value, 0).sum(axis=1), defined.sum(axis=1)
    mean: Floats = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
    return mean


def _ratio(value: Floats, total: Floats) -> Floats:
    ratio: Floats = np.divide(value, total, out=np.full_like(total, np.nan), where=total > 0)
    return ratio


def _recall(weights: Floats, member: NDArray[np.bool_], right: NDArray[np.bool_]) -> Floats:
    """Per draw and column, the share of ``member`` (N, C) that is ``right`` (N, C or 1); NaN where there is none."""
    return _ratio(weights @ (member & right).astype(np.float64), weights @ member.astype(np.float64))


def _auroc(weights: Floats, score: Floats, truth: NDArray[np.bool_]) -> Floats:
    """Mann and Whitney's U over its largest value: how often a positive's score is above a negative's, ties half.

    The mean over the columns of ``score`` and ``truth`` (N, C) that have both.
    """
    columns = []
    for scores, positive in zip(score.T, truth.T, strict=True):
        order = np.argsort(scores, kind="stable")
        _, first = np.unique(scores[order], return_index=True)  # where each distinct score begins
        sides = (positive[order], ~positive[order])
        up, down = (np.add.reduceat(weights[:, order] * side, first, axis=1) for side in sides)
        below = np.cumsum(down, axis=1) - down
        columns.append(_ratio(np.sum(up * (below + down / 2), axis=1), up.sum(axis=1) * down.sum(axis=1)))
    return _mean_of_defined(np.stack(columns, axis=1))


def _ece(weights: Floats, confidence: Floats, outcome: NDArray[np.bool_]) -> Floats:
    """The mean over the columns of ``confidence`` and ``outcome`` (N, C)."""
    gap = outcome - confidence
    in_bin = calibration_bins(confidence)[:, None, :] == np.arange(CALIBRATION_BINS)[:, None]  # (N, bins, C)
    by_bin = np.einsum("bn,nmc->bmc", weights, in_bin * gap[:, None, :], optimize=True)
    error: Floats = np.abs(by_bin).sum(axis=1).mean(axis=1) / weights.sum(axis=1)
    return error
