"""Calibration images for INT8. Quantisation ranges are functions of the images, so the images must be public.

An INT8 model carries the largest activations its calibration images caused. Ranges taken from patients would
leave the hospital inside every engine, outside any privacy budget.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
from numpy.typing import NDArray

from clinifed.data.dataset import load_pixels
from clinifed.data.manifest import Manifest, Record
from clinifed.errors import DataError, PrivacyError
from clinifed.models.backbone import Preprocess

__all__ = ["CalibrationSet", "calibration_set", "require_public", "select_evenly"]


@dataclass(frozen=True)
class CalibrationSet:
    """Public images, ready for the model, and where they came from."""

    pixels: NDArray[np.float32]  # (N, 3, S, S), normalised
    sha256: str  # of the manifest
    data_class: str  # public | synthetic
    count: int  # N


def require_public(manifest: Manifest, purpose: str) -> None:
    """Refuse a hospital's manifest.

    Args:
        manifest: any manifest.
        purpose: what would leave the hospital, as the beginning of a sentence.

    Raises:
        PrivacyError: ``manifest`` is of class ``hospital``.
    """
    if manifest.data_class not in ("public", "synthetic"):
        raise PrivacyError(
            f"{manifest.path}: data of class {manifest.data_class!r} was given. {purpose} would be functions "
            "of patients' images and would leave with the bundle, outside any privacy budget; use a public or "
            "synthetic set"
        )


def select_evenly(records: Sequence[Record], count: int) -> list[Record]:
    """At most ``count`` records, each specialty and label in turn; the same ones every time."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: str(r.image)):
        groups[record.specialty, str(record.label)].append(record)
    turns = zip_longest(*(groups[key] for key in sorted(groups)))
    return [record for record in chain.from_iterable(turns) if record is not None][:count]


def calibration_set(manifest: Manifest, preprocess: Preprocess, count: int) -> CalibrationSet:
    """At most ``count`` images of a public manifest, evenly over specialties and labels.

    Raises:
        PrivacyError: the manifest is a hospital's.
        DataError: none of the chosen images can be read.
    """
    require_public(manifest, "The quantisation ranges")
    loaded = load_pixels(manifest, select_evenly(manifest.records, count), preprocess)
    if not loaded.records:
        raise DataError(f"{manifest.path}: none of the calibration images can be read: {loaded.skipped}")
    pixels = loaded.pixels.numpy()
    return CalibrationSet(pixels, manifest.sha256, manifest.data_class, len(pixels))
