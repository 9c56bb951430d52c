"""Slices that are files of their own: which series of CT, MR or PET a file belongs to, and where in it it lies.

Two photographs or two views of a chest may be one series as well; they are no volume, and each of them counts.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydicom.dataset import Dataset

from clinifed.data.volumes import Frames

if TYPE_CHECKING:  # readers import this file; what they do not need takes their memory
    from clinifed.config import Specialty
    from clinifed.data.manifest import Record

__all__ = ["SLICE_TAGS", "chosen_slices", "frames_of", "slice_of"]

_VOLUMES = ("CT", "MR", "PT")  # Modality (0008,0060) whose series are stacks of slices
_PLANES = ("sagittal", "coronal", "axial")  # by the axis, x, y or z, that the normal is nearest to (PS3.3 C.7.6.2.1.1)
_LEAST_NORMAL = 0.5  # of the cross product of two directions that are orthogonal unit vectors by the standard
# PS3.5 9.1: components without leading zeros, 64 characters at most.
_UID = re.compile(r"(?=.{1,64}\Z)(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))*\Z")

# Modality, SeriesInstanceUID, InstanceNumber, ImagePositionPatient, ImageOrientationPatient, NumberOfFrames
SLICE_TAGS = (0x00080060, 0x0020000E, 0x00200013, 0x00200032, 0x00200037, 0x00280008)


def slice_of(ds: Dataset) -> tuple[str, str]:
    """Which stack the file is a slice of, and where it lies in it; both empty where it is none.

    A stack is the slices of one series in one plane: a localizer's three planes are three. Position is
    ImagePositionPatient (0020,0032) along the normal of ImageOrientationPatient (0020,0037), in mm (PS3.3 C.7.6.2.1.1);
    without these, InstanceNumber (0020,0013), in a stack apart.
    """
    series = _text(ds, "SeriesInstanceUID")
    if _text(ds, "Modality") not in _VOLUMES or not _UID.match(series) or _text(ds, "NumberOfFrames") not in ("", "1"):
        return "", ""
    corner, directions = _numbers(ds, "ImagePositionPatient", 3), _numbers(ds, "ImageOrientationPatient", 6)
    if corner and directions:
        (a, b, c), (d, e, f) = directions[:3], directions[3:]
        normal = (b * f - c * e, c * d - a * f, a * e - b * d)
        length = math.hypot(*normal)
        if length >= _LEAST_NORMAL:
            position = sum(x * n for x, n in zip(corner, normal, strict=True)) / length
            plane = _PLANES[max(range(3), key=lambda axis: abs(normal[axis]))]
            return f"{series} {plane}", f"{position:.3f}"
    number = _numbers(ds, "InstanceNumber", 1)
    return (series, f"{number[0]:.0f}") if number else ("", "")


def _text(ds: Dataset, keyword: str) -> str:
    try:
        return str(ds.get(keyword) or "").strip()
    except Exception:  # pydicom raises about every kind; one unusable value is not a damaged file
        return ""


def _numbers(ds: Dataset, keyword: str, count: int) -> list[float]:
    """``count`` finite numbers below 10 km, or none."""
    try:
        value = ds.get(keyword)
        found = [float(part) for part in ([value] if count == 1 else value)]
    except Exception:
        return []
    return found if len(found) == count and all(abs(number) < 1e7 for number in found) else []


def frames_of(specialties: Mapping[str, "Specialty"]) -> dict[str, Frames]:
    """Specialty → how many slices of a volume stand for it, where that was agreed."""
    return {name: Frames(entry.frames) for name, entry in specialties.items() if entry.frames is not None}


def chosen_slices(records: Sequence["Record"], frames: Mapping[str, Frames]) -> tuple["Record", ...]:
    """``records`` in their order, but of each stack of a specialty in ``frames`` the slices that stand for it.

    Which they are depends on the slices of that patient's stack alone. All others stay: files that are no slices, and
    specialties of which nothing was agreed, where every file is an image.
    """
    stacks: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in records:
        if record.series and record.specialty in frames:
            stacks[record.patient, record.specialty, record.series].append(record)
    left_out: set[str] = set()
    for (_, specialty, _), stack in stacks.items():
        stack.sort(key=lambda record: (float(record.position), record.image))
        kept = set(frames[specialty].of(len(stack)))
        left_out.update(record.image for number, record in enumerate(stack) if number not in kept)
    return tuple(record for record in records if record.image not in left_out)
