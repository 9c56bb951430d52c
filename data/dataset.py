"""Manifest → patients, each a bag of images; images → pixels as the backbone wants them, through MONAI transforms."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from monai.transforms import CenterSpatialCrop, Compose, NormalizeIntensity, Transform
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from clinifed.data.dicom import read_pixels
from clinifed.data.manifest import Manifest, Record
from clinifed.errors import DataError

__all__ = ["Batch", "Patient", "Preprocess", "iter_pixels", "load_pixels", "patients", "transform"]


class Preprocess(Protocol):
    """What the backbone says of its input; all of it public constants."""

    @property
    def size_px(self) -> int:
        """Height = width, pixels."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, of pixels in [0, 1]."""

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel."""

    @property
    def interpolation(self) -> str:
        """``bicubic`` or ``bilinear``."""


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


class ToChannels(Transform):
    """(H, W) or (H, W, 3) → (3, H, W) tensor."""

    def __call__(self, pixels: NDArray[np.float32]) -> Tensor:
        """Grey is repeated in all three channels."""
        tensor = torch.from_numpy(np.ascontiguousarray(pixels))
        return tensor.expand(3, -1, -1) if tensor.ndim == 2 else tensor.permute(2, 0, 1)


class ResizeShortest(Transform):
    """The shortest side to ``size_px``, antialiased, as Pillow does and the backbone was trained with.

    MONAI's Resize smooths with a Gaussian instead, which differs visibly on X-rays.
    """

    def __init__(self, size_px: int, interpolation: str) -> None:
        self.size_px, self.interpolation = size_px, interpolation

    def __call__(self, image: Tensor) -> Tensor:
        """(3, H, W) → (3, H', W') with min(H', W') = ``size_px``, in [0, 1]."""
        height, width = image.shape[1:]
        shortest = min(height, width)
        if shortest == self.size_px:
            return image
        size = [max(self.size_px, int(self.size_px * side / shortest)) for side in (height, width)]
        resized = functional.interpolate(image[None], size, mode=self.interpolation, antialias=True)
        return resized[0].clamp(0, 1)  # bicubic overshoots at edges


def transform(preprocess: Preprocess) -> Compose:
    """Pixels in [0, 1] → (3, S, S) float32 as the backbone wants them (equal to open_clip's own within 1e-2)."""
    return Compose(
        [
            ToChannels(),
            ResizeShortest(preprocess.size_px, preprocess.interpolation),
            CenterSpatialCrop((preprocess.size_px, preprocess.size_px)),
            NormalizeIntensity(subtrahend=preprocess.mean, divisor=preprocess.std, channel_wise=True),
        ]
    )


def iter_pixels(
    manifest: Manifest, records: Sequence[Record], preprocess: Preprocess, batch_size: int
) -> Iterator[Batch]:
    """Batches of at most ``batch_size`` images, in order; memory does not grow with the number of images.

    An image that cannot be read is left out and counted, never fatal.
    """
    apply = transform(preprocess)
    for start in range(0, len(records), batch_size):
        tensors: list[Tensor] = []
        read: list[Record] = []
        skipped: Counter[str] = Counter()
        for record in records[start : start + batch_size]:
            try:
                image = apply(read_pixels(manifest.folder / record.image))
            except DataError as reason:
                skipped[str(reason)] += 1
                continue
            tensors.append(torch.as_tensor(np.asarray(image)))
            read.append(record)
        size = preprocess.size_px
        yield Batch(torch.stack(tensors) if tensors else torch.zeros(0, 3, size, size), tuple(read), skipped)


def load_pixels(manifest: Manifest, records: Sequence[Record], preprocess: Preprocess) -> Batch:
    """All of ``records`` at once, for small sets."""
    return next(iter_pixels(manifest, records, preprocess, max(1, len(records))), Batch(torch.zeros(0), (), Counter()))
