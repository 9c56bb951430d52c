"""What the index must know of one file: what it is, whose, which instance, and hashes of its bytes and its picture."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.multival import MultiValue

from clinifed.data.decoding import default_decoder
from clinifed.data.dicom import identity
from clinifed.data.reasons import Reason
from clinifed.errors import DataError

__all__ = ["Fingerprint", "Header", "image_suffix", "picture_hashes", "picture_sha256", "read_header"]

_LEVELS = 65535  # the picture is compared in 16 bits, so that two ways of computing it round to one
_SOP_INSTANCE_UID = 0x00080018


@dataclass(frozen=True)
class Header:
    """What a DICOM header says; texts as they stand, any may be empty."""

    issuer: str = ""  # IssuerOfPatientID (0010,0021)
    patient: str = ""  # PatientID (0010,0020)
    sop_instance_uid: str = ""  # (0008,0018)
    label: str = ""  # of the tag that was asked for; several values are joined by DICOM's own backslash


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
    """Whose the DICOM file is, which instance, and the text of ``label_tag``: in process, for a reader.

    Raises:
        DataError: the header cannot be read, or no image belongs to it; a reason of a few words.
    """
    issuer, patient = identity(path)  # refuses what would inflate without end, before it is read once more
    tags = [_SOP_INSTANCE_UID, *([] if label_tag is None else [label_tag])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's quote values
        try:
            ds = dcmread(path, stop_before_pixels=True, specific_tags=list(tags))
            texts = {tag: _text(ds[tag].value) for tag in tags if tag in ds}
        except DataError:
            raise
        except (RecursionError, MemoryError):
            raise DataError(Reason.NESTED) from None
        except Exception:  # pydicom raises about every kind, and quotes the file
            raise DataError(Reason.DAMAGED_HEADER) from None
    uid, label = texts.get(_SOP_INSTANCE_UID, ""), texts.get(label_tag or 0, "")
    return Header(issuer, patient, uid.strip(), label)


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
