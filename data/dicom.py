"""One image file to the picture a reader would see, or to whose it is. Every failure is a reason of a few words.

Reasons hold no text of the file, neither does anything logged: the caller names the file by its opaque image id.
This runs in the process that calls it; files that strangers made go through :mod:`clinifed.data.decoding`.
"""

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from clinifed.data.dicom_file import open_regular, opened, reasons
from clinifed.data.display import displayed
from clinifed.data.pixel_data import PixelData
from clinifed.data.reasons import Reason
from clinifed.data.volumes import KEY_FRAME, MAX_FRAME_VALUES, Frames
from clinifed.errors import DataError

__all__ = ["CODES", "NUMBERS", "UIDS", "header", "identity", "is_dicom", "read_pixels", "read_volume"]

Floats = NDArray[np.float32]

_ISSUER, _PATIENT = 0x00100021, 0x00100020
_MAX_IDENTIFIER = 256  # characters; LO may have 64 (PS3.5 6.2), and some sites exceed that

# What `header` tells: values whose form can be checked, none of which is free text.
UIDS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
CODES = (
    "Modality",
    "BodyPartExamined",
    "ViewPosition",
    "ImageLaterality",
    "PhotometricInterpretation",
    "BurnedInAnnotation",
    "PatientIdentityRemoved",
    "LossyImageCompression",
    "ConversionType",
    "PresentationIntentType",
    "ImageType",
)
NUMBERS = (
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "BitsAllocated",
    "BitsStored",
    "SeriesNumber",
    "InstanceNumber",
)
# PS3.5 9.1: components without leading zeros, 64 characters at most. PS3.5 6.2: a code string, 16 at most.
_UID = re.compile(r"(?=.{1,64}\Z)(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*))*\Z")
_CODE = re.compile(r"[A-Z0-9_ ]{1,16}\Z")
_NUMBER = re.compile(r"[+-]?[0-9]{1,12}\Z")


def is_dicom(path: Path) -> bool:
    """Whether the file begins as PS3.10 asks: 128 bytes of preamble, then ``DICM``. Unreadable means no."""
    try:
        with open_regular(path) as file:
            return file.read(132)[128:] == b"DICM"
    except (OSError, ValueError, DataError):
        return False


def identity(path: Path) -> tuple[str, str]:
    """IssuerOfPatientID (0010,0021) and PatientID (0010,0020) as they stand, either may be empty.

    Raises:
        DataError: the header cannot be read, something in it is cut off, doubled or out of order, or no pixel data
            follows it.
    """
    with reasons(Reason.DAMAGED_HEADER), opened(path, (_ISSUER, _PATIENT)) as found:
        if found.pixels is None:
            raise DataError(Reason.NO_PIXEL_DATA)  # or the rest was cut off, and the issuer with it
        texts = _text(found.dataset, "IssuerOfPatientID"), _text(found.dataset, "PatientID")
        if any(len(text) > _MAX_IDENTIFIER for text in texts):
            raise DataError(Reason.LONG_IDENTIFIER)
        return texts


def _text(dataset: Dataset, keyword: str) -> str:
    """A header's value as it stands; several values are joined by DICOM's own backslash."""
    value = dataset.get(keyword)
    return "\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value or "")


def header(path: Path) -> dict[str, str | int | None]:
    """Values of the header that are safe to use: keyword → value, None where it is absent or not what it must be.

    UIDs are UIDs and nothing else (so that one may be part of a name), codes are code strings, several joined by a
    backslash, numbers are int. ``TransferSyntaxUID`` is there as well, and ``HasPixelData`` (1 or 0).

    Raises:
        DataError: the header cannot be read, or something in it is cut off, doubled or out of order.
    """
    with reasons(Reason.DAMAGED_HEADER), opened(path) as found:
        ds = found.dataset
        values: dict[str, str | int | None] = {"HasPixelData": int(found.pixels is not None)}
        syntax = str(ds.file_meta.get("TransferSyntaxUID") or "")
        values["TransferSyntaxUID"] = syntax if _UID.match(syntax) else None
        for keyword in UIDS:
            text = _safe_text(ds, keyword)
            values[keyword] = text if _UID.match(text) else None
        for keyword in CODES:
            text = _safe_text(ds, keyword)
            values[keyword] = text if text and all(_CODE.match(part) for part in text.split("\\")) else None
        for keyword in NUMBERS:
            text = _safe_text(ds, keyword)
            values[keyword] = int(text) if _NUMBER.match(text) else None
        return values


def _safe_text(dataset: Dataset, keyword: str) -> str:
    """As :func:`_text`; empty where the value cannot be converted, which makes one value unusable, not the file."""
    try:
        text = _text(dataset, keyword)
        return str(dataset.get(keyword)) if text == "" and dataset.get(keyword) == 0 else text
    except Exception:  # pydicom raises about every kind
        return ""


def read_pixels(path: Path) -> Floats:
    """The picture in a DICOM, PNG or JPEG file; of several frames the middle one; see :func:`read_volume`.

    Returns:
        float32 in [0, 1], (H, W) grey or (H, W, 3) RGB.

    Raises:
        DataError: no picture can be made of it; the text is a reason of a few words.
    """
    picture: Floats = read_volume(path, KEY_FRAME)[0]
    return picture


def read_volume(path: Path, frames: Frames) -> Floats:
    """The frames of a file that stand for it, as a reader would see them: see :mod:`clinifed.data.display`.

    Returns:
        float32 in [0, 1], (N, H, W) grey or (N, H, W, 3) RGB, N ≤ ``frames.count``, in the file's order.

    Raises:
        DataError: no picture can be made of it; the text is a reason of a few words.
    """
    return _read_dicom(path, frames) if path.suffix.lower() == ".dcm" or is_dicom(path) else _read_picture(path)


def _read_dicom(path: Path, frames: Frames) -> Floats:
    with opened(path) as found:
        with reasons(Reason.DAMAGED_HEADER):
            pixel_data = PixelData(found)
            chosen = frames.of(pixel_data.frames)
            if len(chosen) * pixel_data.frame_values > MAX_FRAME_VALUES:
                raise DataError(Reason.TOO_LARGE)
        pictures = []
        for index in chosen:
            with reasons(Reason.UNDECODABLE):
                stored = pixel_data.frame(index)
            with reasons(Reason.DISPLAY):
                pictures.append(displayed(stored, found.dataset, index))
        if any(picture.shape != pictures[0].shape for picture in pictures):
            raise DataError(Reason.DISPLAY)  # pixels of a different shape in each frame
        return pictures[0][None] if len(pictures) == 1 else np.stack(pictures)


def _read_picture(path: Path) -> Floats:
    with (
        reasons(Reason.NOT_AN_IMAGE_FILE),
        open_regular(path) as file,
        Image.open(file, formats=("PNG", "JPEG")) as picture,
    ):
        if picture.width * picture.height * 3 > MAX_FRAME_VALUES:
            raise DataError(Reason.TOO_LARGE)
        if picture.mode.startswith("I"):  # 16-bit grey
            values, peak = np.array(picture, np.float32), 65535
        else:
            values, peak = np.array(picture.convert("L" if picture.mode in ("1", "L") else "RGB"), np.float32), 255
        values /= np.float32(peak)
        return values[None]
