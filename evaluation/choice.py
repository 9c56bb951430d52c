"""One of several models by a small held-out set: the default, unless another is better beyond chance.

All are judged on the same patients, with the paired bootstrap of :mod:`clinifed.evaluation.intervals`. A model that was
made without looking at these patients is held against the default at the usual level. Of variants that differ in a
setting, the best of many would win by luck too often; their level is Bonferroni's, 1 − (1 − level) / variants.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_softmax, logit, logsumexp

from clinifed.errors import DataError
from clinifed.evaluation.intervals import LEVEL, Difference, paired_differences
from clinifed.evaluation.metrics import Scores, multi_label_scores, patient_scores

__all__ = ["Choice", "choose", "patient_logits"]

REPLICATES = 2000  # tails of 0.3 %, as of eight variants, are six draws
_FIGURE = "balanced_accuracy"
_TINY = 1e-12  # keeps logarithms finite


@dataclass(frozen=True)
class Choice:
    """What was chosen, and everything that it was held against."""

    chosen: str
    reason: str
    patients: int
    scores: Mapping[str, Scores]
    differences: Mapping[str, Difference]  # candidate → its balanced accuracy less the default's, with its interval

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "chosen": self.chosen,
            "reason": self.reason,
            "patients": self.patients,
            "candidates": {
                name: {
                    **scores.to_dict(),
                    "difference": asdict(self.differences[name]) if name in self.differences else None,
                }
                for name, scores in self.scores.items()
            },
        }


def patient_logits(
    logits: NDArray[np.floating], patient: NDArray[np.integer], label: NDArray[np.integer], *, multi_label: bool
) -> tuple[NDArray[np.float64], NDArray[np.integer], NDArray[np.integer]]:
    """One row for each patient and label: logits whose softmax (sigmoid) is the mean over the patient's images.

    Args:
        logits: (R, K), one row per image.
        patient: (R,), whose image it is.
        label: (R,), an index, or a bit set with ``multi_label``.

    Returns:
        logits (C, K), patient (C,) and label (C,) of the C cases, as :func:`clinifed.evaluation.metrics.patient_scores`
        counts them.
    """
    cases, case = np.unique(np.stack([patient, label]), axis=1, return_inverse=True)
    case = case.reshape(-1)
    images = np.bincount(case)
    mean = np.zeros((len(images), logits.shape[1]))
    np.add.at(mean, case, expit(logits) if multi_label else np.exp(log_softmax(logits, axis=1)))
    mean /= images[:, None]
    if multi_label:
        return logit(np.clip(mean, _TINY, 1 - _TINY)), cases[0], cases[1]
    scaled = np.log(np.maximum(mean, _TINY))
    return scaled - logsumexp(scaled, axis=1, keepdims=True), cases[0], cases[1]


def choose(
    candidates: Mapping[str, NDArray[np.floating]],
    default: str,
    patient: NDArray[np.integer],
    label: NDArray[np.integer],
    *,
    variants: Sequence[str] = (),
    never_worse_than: str | None = None,
    multi_label: bool = False,
    level: float = LEVEL,
    seed: int = 0,
) -> Choice:
    """The candidate with the best balanced accuracy by patient among those better than ``default`` beyond chance.

    Args:
        candidates: name → logits (R, K) on the same R held-out images; ``default`` is one of them.
        patient: (R,), whose image it is.
        label: (R,), an index, or a bit set with ``multi_label``.
        variants: candidates that differ in a setting which is chosen here.
        never_worse_than: a candidate that is taken instead where it is better than the chosen one beyond chance.
        level: of the intervals, in (0, 1).
        seed: of the draws; the same seed makes the same choice.

    Raises:
        DataError: a name among ``variants`` or ``never_worse_than``, or the default, is no candidate; no image.

    Guarantees:
        - Where no interval lies above 0, and with fewer than two patients, the default is chosen.
        - The chosen one is not worse than ``never_worse_than`` beyond the interval on these patients.
    """
    named = {default, *variants, *([] if never_worse_than is None else [never_worse_than])}
    if unknown := sorted(named - candidates.keys()):
        raise DataError(f"{', '.join(unknown)}: no candidate; there are {', '.join(candidates)}")
    if not len(patient):
        raise DataError("no held-out image to choose by")
    figures = multi_label_scores if multi_label else patient_scores
    scores = {name: figures(logits, patient, label) for name, logits in candidates.items()}
    units = {n: patient_logits(z, patient, label, multi_label=multi_label) for n, z in candidates.items()}
    whose = [int(p) for p in units[default][1]]

    def gain(name: str, over: str, at: float) -> Difference:
        (reference, _, truth), (candidate, _, _) = units[over], units[name]
        drawn = paired_differences(
            reference, candidate, truth, whose, multi_label=multi_label, replicates=REPLICATES, level=at, seed=seed
        )
        return drawn[_FIGURE]

    strict = 1 - (1 - level) / max(1, len(variants))
    gains = {name: gain(name, default, strict if name in variants else level) for name in candidates if name != default}
    better = [name for name, g in gains.items() if g.low is not None and g.low > 0]
    count = scores[default].patients
    chosen = max(better, key=lambda name: scores[name].balanced_accuracy, default=default)
    reason = (
        f"the best of those better than {default} beyond chance"
        if better
        else f"none is better than {default} beyond chance"
    )
    if never_worse_than is not None and chosen != never_worse_than:
        lead = gain(never_worse_than, chosen, level)
        if lead.low is not None and lead.low > 0:
            chosen, reason = never_worse_than, f"better than {chosen} beyond chance"
    return Choice(chosen, f"{reason}, on {count} held-out patients", count, scores, gains)
