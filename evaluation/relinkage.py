"""Re-linkage: can an image's embedding be linked back to its own report among those of a test set?

Retrieval's Recall@k read as an attack: the higher, the more an embedding gives away to whoever holds the reports. It is
told of the base model and of the trained one, so that one sees what training changed.
Shapes: R images, M reports, D embedding dimension.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clinifed.errors import DataError
from clinifed.evaluation.draws import Floats, patient_draws
from clinifed.evaluation.intervals import REPLICATES, interval_of

__all__ = ["RANKS", "linked", "recall_at", "reports_of"]

RANKS = (1, 5, 10)
_ROWS = 512  # images compared with all reports at once; changes memory only


def reports_of(patients: Sequence[str], captions: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The M reports of R captioned images, and which of them is each image's own, (R,).

    A report is a patient's: images of one patient with the same text share one, while two patients with the same text
    have two, which nothing can tell apart.
    """
    numbers: dict[tuple[str, str], int] = {}
    own = [numbers.setdefault(pair, len(numbers)) for pair in zip(patients, captions, strict=True)]
    return [text for _, text in numbers], np.array(own, dtype=np.int64)


def linked(
    image: NDArray[np.floating], report: NDArray[np.floating], own: NDArray[np.integer], ranks: Sequence[int] = RANKS
) -> Floats:
    """How likely each image's own report is among the k nearest, (R, ranks).

    Equally near reports are taken in random order: of t reports as near as the own one, with a nearer ones, it is among
    the first k with probability (k − a)/t, between 0 and 1.

    Args:
        image: (R, D), L2-normalised.
        report: (M, D), L2-normalised; equal texts must have equal rows.
        own: (R,) in [0, M).
        ranks: the k.
    """
    if not (np.isfinite(image).all() and np.isfinite(report).all()):
        raise DataError("an embedding is not finite; re-linkage cannot be told of a broken model")
    _, text = np.unique(report, axis=0, return_inverse=True)
    text = text.reshape(-1)  # equal texts must tie, whatever a matrix product makes of their last digits
    first = np.unique(text, return_index=True)[1]
    copies, distinct = np.bincount(text), report[first].astype(np.float64)
    found = np.empty((len(image), len(ranks)))
    for start in range(0, len(image), _ROWS):
        rows = slice(start, start + _ROWS)
        near = image[rows].astype(np.float64) @ distinct.T  # (rows, texts)
        mine = np.take_along_axis(near, text[own[rows]][:, None], axis=1)
        nearer, ties = ((compared * copies).sum(axis=1) for compared in (near > mine, near == mine))
        for column, k in enumerate(ranks):
            found[rows, column] = np.clip((k - nearer) / ties, 0, 1)
    return found


def recall_at(
    hits: Floats,
    patients: Sequence[str],
    reports: int,
    ranks: Sequence[int] = RANKS,
    *,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> dict[str, Any]:
    """Recall@k over images, with an interval by patient and what guessing gives; as JSON values.

    The reports stay all M of them in every draw: what is uncertain is whose images are asked about.

    Args:
        hits: of :func:`linked`, (R, ranks).
        patients: (R,), whose image each is.
        reports: M.
        ranks: the k.
        replicates: draws.
        seed: of the draws.
    """
    unit = np.unique(np.asarray(patients), return_inverse=True)[1]
    weights = patient_draws(unit, replicates, seed)
    drawn = (weights @ hits) / weights.sum(axis=1, keepdims=True)
    people = int(unit.max()) + 1
    return {
        str(k): {**interval_of(drawn[:, column], people).to_dict(), "chance": min(1.0, k / reports)}
        for column, k in enumerate(ranks)
    }
