"""One image file → pixels, float32 in [0, 1]: DICOM through pydicom, PNG and JPEG through Pillow.

Reasons for a refusal are a few fixed words: no path, no UID, nothing of a patient.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.pixels.utils import pixel_array

from clinifed.errors import DataError

__all__ = ["identity", "is_dicom", "read_pixels"]

# Bytes of decoded pixels; a 4k × 4k 16-bit mammogram of 8 frames has this. Checked before anything is decoded.
_MAX_DECODED_BYTES = 256 * 2**20
_PREAMBLE = 128  # PS3.10 7.1: 128 bytes, then "DICM"
_GREY = ("MONOCHROME1", "MONOCHROME2")

Pixels = NDArray[np.float32]


def is_dicom(path: Path) -> bool:
    """Whether the file says it is DICOM: by its preamble, or by the suffix ``.dcm``."""
    if path.suffix.lower() == ".dcm":
        return True
    with path.open("rb") as file:
        file.seek(_PREAMBLE)
        return file.read(4) == b"DICM"


def identity(path: Path) -> tuple[str, str]:
    """IssuerOfPatientID (0010,0021) and PatientID (0010,0020) as they stand, either may be empty.

    Raises:
        DataError: the header cannot be read.
    """
    dataset = _header(path)
    return str(dataset.get("IssuerOfPatientID") or ""), str(dataset.get("PatientID") or "")


def read_pixels(path: Path) -> Pixels:
    """(H, W) or (H, W, 3) float32 in [0, 1] of a DICOM, PNG or JPEG file.

    DICOM: modality LUT or rescale, then VOI LUT or window where the file has one (PS3.3 C.11.1, C.11.2), then the
    nominal range of the stored bits as 0 … 1; MONOCHROME1 is inverted; palettes and YBR become RGB; of several
    frames the middle one is taken.

    Raises:
        DataError: with a reason of a few words.
    """
    try:
        with warnings.catch_warnings():
            # pydicom and Pillow warn of every oddity; what matters ends in an exception or in the pixels.
            warnings.simplefilter("ignore")
            pixels = _read_dicom(path) if is_dicom(path) else _read_picture(path)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError("image missing") from None
    except (OSError, UnidentifiedImageError):
        raise DataError("file cannot be read") from None
    except MemoryError:
        raise DataError("needs too much memory") from None
    except Exception as error:  # decoders raise whatever their format's damage leads to
        raise DataError(f"cannot be decoded ({type(error).__name__})") from None
    if pixels.ndim not in (2, 3) or 0 in pixels.shape or not np.isfinite(pixels).all():
        raise DataError("pixels are not a finite image")
    clipped: Pixels = np.clip(pixels, 0.0, 1.0).astype(np.float32)
    return clipped


def _header(path: Path) -> pydicom.Dataset:
    """The header without pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pydicom.dcmread(path, stop_before_pixels=True, force=True)
    except FileNotFoundError:
        raise DataError("image missing") from None
    except Exception:
        raise DataError("DICOM header cannot be read") from None


def _check_size(*factors: int) -> None:
    if min(factors) < 1:
        raise DataError("image has no pixels")
    if np.prod(factors, dtype=np.float64) > _MAX_DECODED_BYTES:
        raise DataError(f"decoded size is over {_MAX_DECODED_BYTES // 2**20} MiB")


def _read_dicom(path: Path) -> NDArray[Any]:
    header = _header(path)
    if "Rows" not in header or "Columns" not in header:
        raise DataError("no pixel data")
    frames = int(header.get("NumberOfFrames") or 1)
    samples, allocated = int(header.get("SamplesPerPixel", 1)), int(header.get("BitsAllocated", 8))
    _check_size(int(header.Rows), int(header.Columns), frames, samples, max(1, allocated // 8))
    dataset = pydicom.dcmread(path, force=True)
    if "PixelData" not in dataset:
        raise DataError("no integer pixel data" if "FloatPixelData" in dataset else "no pixel data")
    try:
        stored = pixel_array(dataset, index=frames // 2)
    except (RuntimeError, NotImplementedError) as error:
        text = str(error).lower()
        if "missing dependencies" in text or "no available" in text or "plugin" in text:
            syntax = getattr(dataset.file_meta, "TransferSyntaxUID", None)
            raise DataError(f"missing codec for {syntax.name if syntax else 'its transfer syntax'}") from None
        raise
    photometric = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
    if photometric == "PALETTE COLOR":
        coloured = apply_color_lut(stored, dataset)
        return coloured.astype(np.float32) / np.iinfo(coloured.dtype).max
    if photometric not in _GREY:
        return stored.astype(np.float32) / (2.0 ** int(dataset.BitsStored) - 1)
    shown, low, high = _grey(stored, dataset)
    scaled = (shown.astype(np.float32) - low) / (high - low)
    return 1 - scaled if photometric == "MONOCHROME1" else scaled


def _grey(stored: NDArray[Any], dataset: pydicom.Dataset) -> tuple[NDArray[Any], float, float]:
    """Values after modality and VOI transformation, and the nominal range that stands for black and white."""
    bits, signed = int(dataset.BitsStored), bool(dataset.get("PixelRepresentation", 0))
    edges = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1], dtype=np.float64)
    values = apply_modality_lut(stored, dataset)
    if "ModalityLUTSequence" in dataset:
        edges = np.array([0, 2 ** int(dataset.ModalityLUTSequence[0].LUTDescriptor[2]) - 1])
    else:
        edges = edges * float(dataset.get("RescaleSlope", 1) or 1) + float(dataset.get("RescaleIntercept", 0) or 0)
    if "VOILUTSequence" in dataset or "WindowCenter" in dataset:
        values = apply_voi_lut(values, dataset, index=0)
        if "VOILUTSequence" in dataset:
            edges = np.array([0, 2 ** int(dataset.VOILUTSequence[0].LUTDescriptor[2]) - 1])
    return values, float(edges.min()), float(edges.max())


def _read_picture(path: Path) -> NDArray[Any]:
    with Image.open(path) as picture:
        if picture.format not in ("PNG", "JPEG"):
            raise DataError("neither DICOM nor PNG nor JPEG")
        _check_size(picture.width, picture.height, 4)
        if picture.mode.startswith("I"):  # 16-bit grey
            return np.asarray(picture, dtype=np.float32) / 65535
        grey = picture.mode in ("1", "L")
        return np.asarray(picture.convert("L" if grey else "RGB"), dtype=np.float32) / 255
