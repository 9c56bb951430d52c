"""Figures on many bootstrap draws at once: a draw is a row of weights, how often each case is in it.

Shapes: N cases (images, or patients with a label), C columns (labels), B draws. Row 0 of all results is the sample
itself; NaN stands where a figure is undefined.
"""

import numpy as np
from numpy.typing import NDArray

from clinifed.evaluation.metrics import CALIBRATION_BINS, calibration_bins

__all__ = ["Floats", "auroc", "calibration_error", "mean_of_defined", "patient_draws", "recall"]

Floats = NDArray[np.float64]


def patient_draws(unit: NDArray[np.integer], replicates: int, seed: int) -> Floats:
    """(1 + B, N): how often each case is in the sample itself (once), and in each draw of as many patients.

    Args:
        unit: (N,) in [0, patients), whose case each is; a drawn patient brings all of them along.
        replicates: B.
        seed: of the draws; the same gives the same.
    """
    units = int(unit.max()) + 1
    drawn = np.random.default_rng(seed).integers(units, size=(replicates, units))
    drawn += units * np.arange(replicates)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=replicates * units).reshape(replicates, units)
    return np.concatenate([np.ones((1, len(unit))), counts[:, unit]])


def mean_of_defined(value: Floats) -> Floats:
    """Mean of each row without its NaN, (1 + B,); NaN where there is nothing else."""
    defined = np.isfinite(value)
    total, count = np.where(defined, value, 0).sum(axis=1), defined.sum(axis=1)
    mean: Floats = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
    return mean


def _ratio(value: Floats, total: Floats) -> Floats:
    ratio: Floats = np.divide(value, total, out=np.full_like(total, np.nan), where=total > 0)
    return ratio


def recall(weights: Floats, member: NDArray[np.bool_], right: NDArray[np.bool_]) -> Floats:
    """(1 + B, C): the share of ``member`` (N, C) that is ``right`` (N, C or 1)."""
    return _ratio(weights @ (member & right).astype(np.float64), weights @ member.astype(np.float64))


def auroc(weights: Floats, score: Floats, truth: NDArray[np.bool_]) -> Floats:
    """(1 + B, C): Mann and Whitney's U over its largest value, for each column of ``score`` and ``truth`` (N, C).

    That is how often a positive's score is above a negative's, ties half.
    """
    columns = []
    for scores, positive in zip(score.T, truth.T, strict=True):
        order = np.argsort(scores, kind="stable")
        _, first = np.unique(scores[order], return_index=True)  # where each distinct score begins
        sides = (positive[order], ~positive[order])
        up, down = (np.add.reduceat(weights[:, order] * side, first, axis=1) for side in sides)
        below = np.cumsum(down, axis=1) - down
        columns.append(_ratio(np.sum(up * (below + down / 2), axis=1), up.sum(axis=1) * down.sum(axis=1)))
    return np.stack(columns, axis=1)


def calibration_error(weights: Floats, confidence: Floats, outcome: NDArray[np.bool_]) -> Floats:
    """(1 + B,): ECE as in :mod:`clinifed.evaluation.metrics`, mean over the columns of ``confidence`` and ``outcome``.

    Args:
        weights: (1 + B, N).
        confidence: (N, C) in [0, 1].
        outcome: (N, C), what it is held against.
    """
    gap = outcome - confidence
    in_bin = calibration_bins(confidence)[:, None, :] == np.arange(CALIBRATION_BINS)[:, None]  # (N, bins, C)
    by_bin = np.einsum("bn,nmc->bmc", weights, in_bin * gap[:, None, :], optimize=True)
    error: Floats = np.abs(by_bin).sum(axis=1).mean(axis=1) / weights.sum(axis=1)
    return error
