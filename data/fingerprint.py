"""What the index must know of one file: what it is, whose, which instance, and hashes of its bytes and its picture."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataelem import DataElement
from pydicom.multival import MultiValue

from clinifed.data.decoding import default_decoder
from clinifed.data.dicom_file import opened, reasons
from clinifed.data.reasons import Reason
from clinifed.data.series import SLICE_TAGS, slice_of
from clinifed.errors import DataError

__all__ = ["Fingerprint", "Header", "image_suffix", "picture_hashes", "picture_sha256", "read_header"]

_LEVELS = 65535  # the picture is compared in 16 bits, so that two ways of computing it round to one
_TAGS = (0x00100021, 0x00100020, 0x00080018)  # issuer, patient, SOPInstanceUID
_MAX_IDENTIFIER = 256  # characters; LO may have 64 (PS3.5 6.2), and some sites exceed that


@dataclass(frozen=True)
class Header:
    """What a DICOM header says; texts as they stand, any may be empty."""

    issuer: str = ""  # IssuerOfPatientID (0010,0021)
    patient: str = ""  # PatientID (0010,0020)
    sop_instance_uid: str = ""  # (0008,0018)
    label: str = ""  # of the tag that was asked for; several values are joined by DICOM's own backslash
    series: str = ""  # of a slice: SeriesInstanceUID (0020,000E) and its plane; see clinifed.data.series
    position: str = ""  # of a slice: where in the series, a number


@dataclass(frozen=True)
class Fingerprint:
    """By what two files are found to be one image."""

    sha256: str  # of the bytes
    pixels: str = ""  # SHA-256 of the picture, or empty where it was not asked for
    sop_instance_uid: str = ""  # empty for PNG and JPEG


def image_suffix(path: Path) -> str:
    """``.dcm``, ``.png`` or ``.jpg`` by how the file begins, whatever its name; empty for anything else.

    DICOM begins with 128 bytes that mean nothing, then ``DICM`` (PS3.10 7.1); those bytes may be another format's.

    Raises:
        OSError: the file cannot be opened.
    """
    with path.open("rb") as file:
        start = file.read(132)
    if start[128:] == b"DICM":
        return ".dcm"
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return ".png"
    return ".jpg" if start.startswith(b"\xff\xd8\xff") else ""


def read_header(path: Path, label_tag: int | None = None) -> Header:
    """Whose the DICOM file is, which instance, where in which series, and ``label_tag``: in process, for a reader.

    Raises:
        DataError: the header cannot be read, something in it is cut off, doubled or out of order, or no image belongs
            to it; a reason of a few words.
    """
    wanted = [*_TAGS, *SLICE_TAGS, *([] if label_tag is None else [label_tag])]
    with reasons(Reason.DAMAGED_HEADER), opened(path, wanted) as found:
        if found.pixels is None:
            raise DataError(Reason.NO_PIXEL_DATA)  # or the rest was cut off, and the issuer with it
        ds = found.dataset
        issuer, patient, uid = (_joined(ds.get(tag)) for tag in _TAGS)
        if max(len(issuer), len(patient)) > _MAX_IDENTIFIER:
            raise DataError(Reason.LONG_IDENTIFIER)
        label = "" if label_tag is None or label_tag not in ds else _text(ds[label_tag].value)
        return Header(issuer, patient, uid.strip(), label, *slice_of(ds))


def _joined(element: DataElement | None) -> str:
    """A value as it stands; several are joined by DICOM's own backslash."""
    value = None if element is None else element.value
    return "\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value or "")


def _text(value: object) -> str:
    if isinstance(value, MultiValue):
        return "\\".join(_text(part) for part in value)
    if isinstance(value, bytes) or (value is not None and hasattr(value, "append")):  # binary, or a sequence
        raise DataError(Reason.NOT_TEXT)
    return "" if value is None else str(value)


def picture_hashes(paths: Sequence[Path]) -> Iterator[str | DataError]:
    """:func:`picture_sha256` of each path, in order, or the reason why there is none. A few are held at a time."""
    for found in default_decoder().map(paths):
        try:
            yield found if isinstance(found, DataError) else picture_sha256(found)
        except DataError as reason:
            yield reason


def picture_sha256(pixels: NDArray[np.float32]) -> str:
    """SHA-256 of a picture, hexadecimal, the same in whatever format or coding it was stored without loss.

    Args:
        pixels: in [0, 1], (H, W) grey or (H, W, 3) RGB; RGB without colour is the grey picture.

    Raises:
        DataError: the picture is of one value throughout: it shows nothing, and would be everybody's.
    """
    if pixels.ndim == 3 and bool((pixels == pixels[..., :1]).all()):
        pixels = pixels[..., 0]
    levels = np.rint(pixels * np.float32(_LEVELS)).astype("<u2")
    if bool((levels == levels[:1, :1]).all()):
        raise DataError("picture is blank")
    digest = sha256(repr(levels.shape).encode())
    digest.update(np.ascontiguousarray(levels).data)
    return digest.hexdigest()
