"""Manifest → patients, each a bag of images; images → pixels as the backbone wants them, through MONAI transforms."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clinifed.data.dicom import read_pixels
from clinifed.data.manifest import Manifest, Record
from clinifed.errors import DataError

if TYPE_CHECKING:
    from clinifed.data.transforms import Preprocess

__all__ = ["Batch", "Patient", "iter_pixels", "load_pixels", "patients"]


@dataclass(frozen=True)
class Patient:
    """The unit of privacy: one patient with all images, whatever their specialties."""

    key: str
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Batch:
    """Some images that were read, and why others were not."""

    pixels: Tensor  # (N, 3, S, S) float32, normalised
    records: tuple[Record, ...]
    skipped: Counter[str]  # reason → images; reasons name nobody


def patients(manifest: Manifest, split: str | None, specialties: Sequence[str]) -> tuple[Patient, ...]:
    """The patients of ``split`` (None: all) with their images of ``specialties``, sorted by key."""
    bags: dict[str, list[Record]] = defaultdict(list)
    for record in manifest.records:
        if record.specialty in specialties and split in (None, record.split):
            bags[record.patient].append(record)
    return tuple(Patient(key, tuple(sorted(bags[key], key=lambda r: r.image))) for key in sorted(bags))


# A strip of 1 × 65535 pixels would be resized to 224 × 14.7 million.
_MAX_ASPECT = 32


def _check_shape(pixels: NDArray[np.float32]) -> None:
    height, width = pixels.shape[:2]
    if max(height, width) > _MAX_ASPECT * min(height, width):
        raise DataError("image is too elongated")


def iter_pixels(
    manifest: Manifest, records: Sequence[Record], preprocess: "Preprocess", batch_size: int
) -> Iterator[Batch]:
    """Batches of at most ``batch_size`` images, in order; memory does not grow with the number of images.

    An image that cannot be read is left out and counted, never fatal.
    """
    from clinifed.data.transforms import transform  # MONAI takes six seconds to import: only where images are read

    apply = transform(preprocess)
    for start in range(0, len(records), batch_size):
        tensors: list[Tensor] = []
        read: list[Record] = []
        skipped: Counter[str] = Counter()
        for record in records[start : start + batch_size]:
            try:
                pixels = read_pixels(manifest.folder / record.image)
                _check_shape(pixels)
                image = apply(pixels)
            except DataError as reason:
                skipped[str(reason)] += 1
                continue
            tensors.append(torch.as_tensor(np.asarray(image)))
            read.append(record)
        size = preprocess.size_px
        yield Batch(torch.stack(tensors) if tensors else torch.zeros(0, 3, size, size), tuple(read), skipped)


def load_pixels(manifest: Manifest, records: Sequence[Record], preprocess: "Preprocess") -> Batch:
    """All of ``records`` at once, for small sets."""
    size = preprocess.size_px
    nothing = Batch(torch.zeros(0, 3, size, size), (), Counter())
    return next(iter_pixels(manifest, records, preprocess, max(1, len(records))), nothing)
