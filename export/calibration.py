"""Calibration images for INT8. Quantisation ranges are functions of the images, so the images must be public.

An INT8 model carries the largest activations its calibration images caused. Ranges taken from patients would
leave the hospital inside every engine, outside any privacy budget.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clinifed.data.dataset import load_pixels
from clinifed.data.manifest import Manifest, Record
from clinifed.errors import DataError, PrivacyError
from clinifed.models.backbone import Preprocess

__all__ = ["PUBLIC", "CalibrationSet", "calibration_set", "pixels_sha256", "require_public", "select_evenly"]


PUBLIC = ("public", "synthetic")  # classes of data whose images may leave in any form


@dataclass(frozen=True)
class CalibrationSet:
    """Public images, ready for the model, and where they came from."""

    pixels: NDArray[np.float32]  # (N, 3, S, S), normalised
    sha256: str  # of the manifest
    data_class: str  # public | synthetic
    count: int  # N

    @property
    def public(self) -> bool:
        """Whether the images are nobody's secret."""
        return self.data_class in PUBLIC

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for the manifest of a bundle."""
        told = {"public": self.public, "data_class": self.data_class, "manifest_sha256": self.sha256}
        images = {"images": self.count, "pixels_sha256": pixels_sha256(self.pixels)}
        # What counts a hospital's patients' images, or recognises one of them, stays at home.
        return {**told, **(images if self.public else dict.fromkeys(images))}


def pixels_sha256(pixels: NDArray[np.float32]) -> str:
    """Of the shape and the bytes of ``pixels`` (N, 3, S, S): a manifest's hash does not say what its images show."""
    content = np.ascontiguousarray(pixels, dtype="<f4")
    return sha256(repr(content.shape).encode() + content.tobytes()).hexdigest()


def require_public(manifest: Manifest, purpose: str) -> None:
    """Refuse a hospital's manifest.

    Args:
        manifest: any manifest.
        purpose: what would leave the hospital, as the beginning of a sentence.

    Raises:
        PrivacyError: ``manifest`` is of class ``hospital``.
    """
    if manifest.data_class not in PUBLIC:
        raise PrivacyError(
            f"{manifest.path}: data of class {manifest.data_class!r} was given. {purpose} would be functions "
            "of patients' images and would leave with the bundle, outside any privacy budget; use a public or "
            "synthetic set, or --hospital-data, which marks the bundle as not exportable"
        )


def select_evenly(records: Sequence[Record], count: int) -> list[Record]:
    """At most ``count`` records, each specialty and label in turn; the same ones every time."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: str(r.image)):
        groups[record.specialty, str(record.label)].append(record)
    turns = zip_longest(*(groups[key] for key in sorted(groups)))
    return [record for record in chain.from_iterable(turns) if record is not None][:count]


def calibration_set(
    manifest: Manifest, preprocess: Preprocess, count: int, hospital_data: bool = False
) -> CalibrationSet:
    """At most ``count`` images of a public manifest, evenly over specialties and labels.

    Args:
        manifest: where they are listed.
        preprocess: the backbone's.
        count: an upper limit.
        hospital_data: a hospital's manifest is taken too; what is made of it must stay there.

    Raises:
        PrivacyError: the manifest is a hospital's, and that was not asked for.
        DataError: none of the chosen images can be read.

    Guarantees:
        - A hospital's images calibrate nothing unless that was asked for by name.
    """
    if not hospital_data:
        require_public(manifest, "The quantisation ranges")
    loaded = load_pixels(manifest, select_evenly(manifest.records, count), preprocess)
    if not loaded.records:
        raise DataError(f"{manifest.path}: none of the calibration images can be read: {loaded.skipped}")
    pixels = loaded.pixels.numpy()
    return CalibrationSet(pixels, manifest.sha256, manifest.data_class, len(pixels))
