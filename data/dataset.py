"""Manifest → patients, each a bag of images; images → pixels as the backbone wants them, through MONAI transforms."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clinifed.data.decoding import Decoder, default_decoder
from clinifed.data.manifest import Manifest, Record
from clinifed.data.reasons import Reason
from clinifed.data.series import chosen_slices
from clinifed.data.volumes import KEY_FRAME, Frames
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
    records: tuple[Record, ...]  # of each row; of a volume with several frames the same record several times
    skipped: Counter[str]  # reason → images; reasons name nobody


def patients(
    manifest: Manifest, split: str | None, specialties: Sequence[str], frames: Mapping[str, Frames] | None = None
) -> tuple[Patient, ...]:
    """The patients of ``split`` (None: all) with their images of ``specialties``, sorted by key.

    Args:
        frames: specialty → how many slices stand for a stack of CT, MR or PET; where nothing is said, all.
    """
    bags: dict[str, list[Record]] = defaultdict(list)
    for record in chosen_slices(manifest.records, frames or {}):
        if record.specialty in specialties and split in (None, record.split):
            bags[record.patient].append(record)
    return tuple(Patient(key, tuple(sorted(bags[key], key=lambda r: r.image))) for key in sorted(bags))


# A strip of 1 × 65535 pixels would be resized to 224 × 14.7 million.
_MAX_ASPECT = 32


def _check_shape(pixels: NDArray[np.float32]) -> None:
    height, width = pixels.shape[:2]
    if max(height, width) > _MAX_ASPECT * min(height, width):
        raise DataError(Reason.ELONGATED)


def iter_pixels(
    manifest: Manifest,
    records: Sequence[Record],
    preprocess: "Preprocess",
    batch_size: int,
    *,
    frames: Mapping[str, Frames] | None = None,
    decoder: Decoder | None = None,
) -> Iterator[Batch]:
    """Batches of at most ``batch_size`` rows, in order; memory does not grow with the number of images.

    Files are read in processes of their own. The next batch is made while the caller works on this one. An image that
    cannot be read, or that ends its reader, is left out and counted, never fatal.

    Args:
        frames: specialty → how many frames of a file stand for it; the middle one where nothing is said. A file of
            several adds as many rows to its batch, and makes a batch of its own where it has more than ``batch_size``.
        decoder: the process's own where there is none.
    """
    from clinifed.data.transforms import transform  # MONAI takes six seconds to import: only where images are read

    if not records:
        return
    apply, reader = transform(preprocess), decoder or default_decoder()
    policies, size = frames or {}, preprocess.size_px
    parts = _parts(records, [policies.get(record.specialty, KEY_FRAME).count for record in records], batch_size)

    def batch(part: Sequence[Record]) -> Batch:
        tensors: list[Tensor] = []
        read: list[Record] = []
        skipped: Counter[str] = Counter()
        wanted = [(manifest.folder / record.image, policies.get(record.specialty, KEY_FRAME)) for record in part]
        for record, found in zip(part, reader.volumes(wanted), strict=True):
            try:
                if isinstance(found, DataError):
                    raise found
                _check_shape(found[0])
                images = [torch.as_tensor(np.asarray(apply(pixels))) for pixels in found]
            except DataError as reason:
                skipped[str(reason)] += 1
                continue
            tensors += images
            read += [record] * len(images)
        return Batch(torch.stack(tensors) if tensors else torch.zeros(0, 3, size, size), tuple(read), skipped)

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as ahead:
        following = ahead.submit(batch, next(parts))
        for part in parts:
            current = following.result()
            following = ahead.submit(batch, part)
            yield current
        yield following.result()


def _parts(records: Sequence[Record], rows: Sequence[int], batch_size: int) -> Iterator[Sequence[Record]]:
    """``records`` cut where the next one's ``rows`` would be too many; none of them is empty."""
    start = total = 0
    for number, more in enumerate(rows):
        if number > start and total + more > batch_size:
            yield records[start:number]
            start, total = number, 0
        total += more
    yield records[start:]


def load_pixels(
    manifest: Manifest,
    records: Sequence[Record],
    preprocess: "Preprocess",
    frames: Mapping[str, Frames] | None = None,
) -> Batch:
    """All of ``records`` at once, for small sets; ``frames`` as for :func:`iter_pixels`."""
    size = preprocess.size_px
    nothing = Batch(torch.zeros(0, 3, size, size), (), Counter())
    rows = sum((frames or {}).get(record.specialty, KEY_FRAME).count for record in records)
    return next(iter_pixels(manifest, records, preprocess, max(1, rows), frames=frames), nothing)
