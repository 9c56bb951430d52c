"""One image file to the picture a reader would see, or to whose it is. Every failure is a reason of a few words.

Reasons hold no text of the file, neither does anything logged: the caller names the file by its opaque image id.
Section numbers are those of DICOM PS3.3 and PS3.5.
"""

import logging
import math
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.multival import MultiValue
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi, convert_color_space
from pydicom.pixels.utils import as_pixel_options
from pydicom.uid import DeflatedExplicitVRLittleEndian

from clinifed.errors import DataError

__all__ = ["identity", "is_dicom", "read_pixels"]

Floats = NDArray[np.float32]

_MAX_DECODED_BYTES = 256 << 20  # all frames, as the header declares them; also the largest file that is opened
_MAX_FRAME_VALUES = 64 << 20  # values of one frame: float32 work on it then stays below 1 GiB
_MAX_INFLATED_BYTES = 64 << 20  # of a deflated file: pydicom holds the inflated bytes several times

# pydicom puts values of the file, names among them, into its log messages; nothing of that may reach a log here.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)


def is_dicom(path: Path) -> bool:
    """Whether the file begins as PS3.10 asks: 128 bytes of preamble, then ``DICM``. Unreadable means no."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def identity(path: Path) -> tuple[str, str]:
    """IssuerOfPatientID (0010,0021) and PatientID (0010,0020) as they stand, either may be empty.

    Raises:
        DataError: the header cannot be read.
    """
    with _reasons("damaged header"):
        ds = _open(path, stop_before_pixels=True)
        return _text(ds.get("IssuerOfPatientID")), _text(ds.get("PatientID"))


def _text(value: object) -> str:
    """A header's value as it stands; several values are joined by DICOM's own backslash."""
    return "\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value or "")


def read_pixels(path: Path) -> Floats:
    """The picture in a DICOM, PNG or JPEG file; see :func:`_read_dicom`.

    Returns:
        float32 in [0, 1], (H, W) grey or (H, W, 3) RGB.

    Raises:
        DataError: no picture can be made of it; the text is a reason of a few words.
    """
    return _read_dicom(path) if path.suffix.lower() == ".dcm" or is_dicom(path) else _read_picture(path)


def _read_dicom(path: Path) -> Floats:
    """The picture in ``path``; of several frames the middle one.

    Modality LUT or rescale, then VOI LUT, window or else the range of the stored bits; MONOCHROME1 inverted;
    palette colour and YBR as RGB. Overlays, padding values and ICC profiles are ignored.

    Returns:
        float32 in [0, 1], (H, W) grey or (H, W, 3) RGB.

    Raises:
        DataError: no picture can be made of it; the text is a reason of a few words.
    """
    with _reasons("damaged header"):
        header = _open(path, stop_before_pixels=True)
        frames = _checked_frames(header)
    with _reasons("damaged file"):
        ds = _open(path, stop_before_pixels=False)
        if not any(name in ds for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise DataError("no pixel data")
    with _reasons("pixel data cannot be decoded"):
        stored, photometric = _decode(ds, frames // 2)
    with _reasons("values cannot be displayed"):
        _flatten(ds, frames // 2)
        grey = photometric in ("MONOCHROME1", "MONOCHROME2")
        picture = _grey(stored, ds, photometric) if grey else _colour(stored, ds, photometric)
        if not np.isfinite(picture).all():
            raise DataError("values are not finite")
        return np.ascontiguousarray(np.clip(picture, 0, 1, out=picture))


@contextmanager
def _reasons(reason: str) -> Iterator[None]:
    """Replace whatever goes wrong inside, and its text, by ``reason``; silence warnings, which quote values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
            return
        except DataError:
            raise
        except FileNotFoundError:
            found = "no such file"
        except OSError as error:
            # Pillow and struct readers raise plain OSError for bad content; with an errno it is the file system.
            found = reason if error.errno is None else "file cannot be read"
        except InvalidDicomError:
            found = "not DICOM"
        except (RecursionError, MemoryError):
            found = "nested too deeply or too large"
        except Exception:  # pydicom and its decoders raise about every kind
            found = reason
    raise DataError(found) from None  # the original quotes the file


def _open(path: Path, *, stop_before_pixels: bool) -> Dataset:
    """The data set in ``path``, refused where reading it would take too much memory."""
    if path.stat().st_size > _MAX_DECODED_BYTES:
        raise DataError(f"larger than {_MAX_DECODED_BYTES >> 20} MiB")
    meta = read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        # Group 0002 follows the 132 bytes of the prefix; its first element, of 12 bytes, holds the length of the rest.
        _check_deflated(path, 132 + 12 + int(meta.FileMetaInformationGroupLength))
    return dcmread(path, stop_before_pixels=stop_before_pixels)


def _check_deflated(path: Path, start: int) -> None:
    """Inflate piece by piece and throw away, up to the limit (PS3.5 A.5: a raw deflate stream)."""
    inflater, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with path.open("rb") as file:
        file.seek(start)
        rest = file.read()
    while rest and not inflater.eof:
        total += len(inflater.decompress(rest, 1 << 20))
        rest = inflater.unconsumed_tail
        if total > _MAX_INFLATED_BYTES:
            raise DataError(f"larger than {_MAX_INFLATED_BYTES >> 20} MiB when inflated")


def _checked_frames(ds: Dataset) -> int:
    """How many frames there are, after the declared size was found acceptable."""
    rows, columns, bits = (int(ds.get(name) or 0) for name in ("Rows", "Columns", "BitsAllocated"))
    if "Rows" not in ds and "Columns" not in ds:
        raise DataError("no image")  # reports, plans, directories
    if rows < 1 or columns < 1 or bits < 1:
        raise DataError("no rows, columns or bits")
    samples, frames = int(ds.get("SamplesPerPixel") or 1), int(ds.get("NumberOfFrames") or 1)
    if frames < 1 or samples not in (1, 3):
        raise DataError("frames or samples per pixel out of range")
    size = rows * columns * samples
    if size * frames * math.ceil(bits / 8) > _MAX_DECODED_BYTES or size > _MAX_FRAME_VALUES:
        raise DataError(f"larger than {_MAX_DECODED_BYTES >> 20} MiB when decoded")
    return frames


def _decode(ds: Dataset, index: int) -> tuple[NDArray[Any], str]:
    """Stored values of one frame, (H, W) or (H, W, 3), and their photometric interpretation."""
    syntax = ds.file_meta.get("TransferSyntaxUID")
    if not syntax:
        raise DataError("no transfer syntax")
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        decoder = None
    if decoder is None:
        raise DataError("unknown transfer syntax")
    if not decoder.is_available:
        raise DataError(f"missing codec for {syntax.name}")
    options = as_pixel_options(ds)
    array, meta = decoder.as_array(ds, index=index if options["number_of_frames"] > 1 else None, **options)
    photometric = str(meta["photometric_interpretation"])
    if photometric.startswith("YBR_FULL"):
        array, photometric = convert_color_space(array, photometric, "RGB"), "RGB"
    if np.issubdtype(array.dtype, np.integer):
        native = not syntax.is_compressed
        array = _stored_bits(array, ds, native=native)
    return array, photometric


def _stored_bits(array: NDArray[Any], ds: Dataset, *, native: bool) -> NDArray[Any]:
    """Only the bits that are stored: in native data old overlays may lie beside them (PS3.5 8.1.1)."""
    allocated, stored = 8 * array.dtype.itemsize, int(ds.BitsStored)
    if not 1 <= stored <= int(ds.BitsAllocated):
        raise DataError("bits stored out of range")
    low = int(ds.get("HighBit", stored - 1)) + 1 - stored if native else 0
    if stored == 1 or not 0 <= low <= allocated - stored or (low == 0 and stored == allocated):
        return array
    # Up to the top and down again: the shift down repeats the sign of signed values.
    return np.asarray((array << (allocated - stored - low)) >> (allocated - stored))


def _flatten(ds: Dataset, index: int) -> None:
    """Bring rescale and window of an enhanced object's frame to the top level (C.7.6.16)."""
    groups = [*ds.get("SharedFunctionalGroupsSequence", [])[:1]]
    groups += ds.get("PerFrameFunctionalGroupsSequence", [])[index : index + 1]
    for group in groups:
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for item in group.get(name, [])[:1]:
                ds.update(item)


def _grey(stored: NDArray[Any], ds: Dataset, photometric: str) -> Floats:
    if np.issubdtype(stored.dtype, np.floating):
        raise DataError("floating-point pixels")  # parametric maps: measurements, not pictures
    values, low, high = _modality(stored, ds)
    if ds.get("VOILUTSequence"):
        integers = values if np.issubdtype(values.dtype, np.integer) else np.rint(values).astype(np.int32)
        depth = int(ds.VOILUTSequence[0].LUTDescriptor[2])
        picture = apply_voi(integers, ds).astype(np.float32) / np.float32(2**depth - 1)
    elif ds.get("WindowCenter") is not None and ds.get("WindowWidth") is not None:
        picture = _window(values.astype(np.float32), ds)
    else:
        picture = (values.astype(np.float32) - np.float32(low)) / np.float32(high - low)
    return np.asarray(1 - picture if photometric == "MONOCHROME1" else picture, np.float32)


def _modality(stored: NDArray[Any], ds: Dataset) -> tuple[NDArray[Any], float, float]:
    """Values after the modality LUT or rescale (C.11.1), and the least and greatest the header permits."""
    if ds.get("ModalityLUTSequence"):
        return apply_modality_lut(stored, ds), 0.0, 2.0 ** int(ds.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
    bits, signed = int(ds.get("BitsStored", 1)), int(ds.get("PixelRepresentation", 0)) == 1
    low, high = (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if signed else (0.0, 2.0**bits - 1)
    if ds.get("RescaleSlope") is None or ds.get("RescaleIntercept") is None:
        return stored, low, high
    slope, intercept = float(ds.RescaleSlope), float(ds.RescaleIntercept)
    if not (math.isfinite(slope) and math.isfinite(intercept)) or slope == 0:
        raise DataError("rescale slope is zero or not finite")
    ends = sorted((low * slope + intercept, high * slope + intercept))
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept), ends[0], ends[1]


def _window(values: Floats, ds: Dataset) -> Floats:
    """The first window, mapped to [0, 1] (C.11.2.1.2 and C.11.2.1.3)."""
    center, width = (float(np.atleast_1d(ds[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
    function = str(ds.get("VOILUTFunction") or "LINEAR").upper()
    if not (math.isfinite(center) and math.isfinite(width)) or width < (1 if function == "LINEAR" else 1e-9):
        raise DataError("window width out of range")
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(np.clip(-4 * (values - center) / width, -80, 80))), np.float32)
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    elif function != "LINEAR_EXACT":
        raise DataError("unknown VOI LUT function")
    if width == 0:  # a threshold
        return np.asarray(values > center, np.float32)
    return np.asarray(np.clip((values - np.float32(center)) / np.float32(width) + 0.5, 0, 1), np.float32)


def _colour(stored: NDArray[Any], ds: Dataset, photometric: str) -> Floats:
    if photometric == "PALETTE COLOR":
        picture = apply_color_lut(stored, ds)[..., :3]
        # Entries are 8 or 16 bit (C.7.6.3.1.5); 8-bit entries are sometimes stored in 16 bits.
        depth = int(ds.RedPaletteColorLookupTableDescriptor[2])
        peak = 255 if depth == 8 and picture.max() <= 255 else np.iinfo(picture.dtype).max
    elif photometric in ("RGB", "YBR_ICT", "YBR_RCT") and stored.ndim == 3:
        # The JPEG 2000 transforms (C.7.6.3.1.2) are undone by the codec itself.
        picture, peak = stored, 2 ** int(ds.BitsStored) - 1
    else:
        raise DataError("unknown photometric interpretation")
    return picture.astype(np.float32) / np.float32(peak)


def _read_picture(path: Path) -> Floats:
    with (
        _reasons("neither DICOM nor a readable PNG or JPEG"),
        Image.open(path, formats=("PNG", "JPEG")) as picture,
    ):
        if picture.width * picture.height * 3 > _MAX_FRAME_VALUES:
            raise DataError(f"larger than {_MAX_DECODED_BYTES >> 20} MiB when decoded")
        if picture.mode.startswith("I"):  # 16-bit grey
            return np.asarray(picture, np.float32) / np.float32(65535)
        kept = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
        return np.asarray(kept, np.float32) / np.float32(255)
