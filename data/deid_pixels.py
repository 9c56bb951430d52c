"""Pixel data with nothing beside the pixels: no comments in compressed streams, no overlays in spare bits, no tail."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.utils import get_expected_length, iter_pixels
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian

from clinifed.errors import DataError

__all__ = ["bare_pixels", "frames"]

_MAX_DECODED_BYTES = 256 << 20
_MAX_FRAMES = 32  # that are looked at for text


def bare_pixels(ds: Dataset) -> None:
    """Replace the pixel data of ``ds`` by what a decoder makes of it: native, of the declared length, in place.

    Compressed data is decompressed, since a JPEG or JPEG 2000 stream has room for comments and metadata of its own;
    bits of a native value outside of Bits Stored, where overlays used to lie (PS3.5 8.1.1), are cleared.

    Raises:
        DataError: there is no pixel data, or too much; a reason of a few words.
    """
    if "PixelData" not in ds:
        raise DataError("no pixel data")
    values = (int(ds.get(name) or 1) for name in ("Rows", "Columns", "SamplesPerPixel", "NumberOfFrames"))
    rows, columns, samples, number = values
    if min(rows, columns, samples, number) < 1:
        raise DataError("no rows, columns or frames")
    if rows * columns * samples * number * max(1, int(ds.BitsAllocated) // 8) > _MAX_DECODED_BYTES:
        raise DataError(f"larger than {_MAX_DECODED_BYTES >> 20} MiB when decoded")
    syntax = ds.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated:
        ds.decompress(generate_instance_uid=False)
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    length = get_expected_length(ds)
    if len(ds.PixelData) < length:
        raise DataError("pixel data is shorter than declared")
    bare = ds.PixelData[:length]
    if int(ds.BitsAllocated) in (8, 16, 32) and int(ds.BitsStored) < int(ds.BitsAllocated):
        bare = _stored_only(ds, bare)
    ds.PixelData = bare + b"\0" * (length % 2)


def _stored_only(ds: Dataset, content: bytes) -> bytes:
    """Values with the bits outside of Bits Stored cleared, or filled with the sign."""
    allocated, stored, high = int(ds.BitsAllocated), int(ds.BitsStored), int(ds.get("HighBit", ds.BitsStored - 1))
    low = high + 1 - stored
    if stored < 1 or low < 0 or high >= allocated:
        raise DataError("bits stored out of range")
    order = ">" if ds.file_meta.TransferSyntaxUID == ExplicitVRBigEndian else "<"
    signed = int(ds.get("PixelRepresentation", 0)) == 1
    values = np.frombuffer(content, f"{order}{'i' if signed else 'u'}{allocated // 8}")
    top = allocated - 1 - high
    # Up and down again: the shift down fills with the sign, and the low bits that are not stored become zero.
    return bytes(((((values << top) >> (top + low)) << low).astype(values.dtype)).tobytes())


def frames(ds: Dataset) -> Iterator[NDArray[Any]]:
    """Frames as stored, (H, W) or (H, W, 3): all, or 32 of them evenly spaced with the first and the last."""
    number = int(ds.get("NumberOfFrames") or 1)
    chosen = sorted({round(i) for i in np.linspace(0, number - 1, min(number, _MAX_FRAMES))})
    if number == 1:
        yield from iter_pixels(ds)
    else:
        yield from iter_pixels(ds, indices=chosen)
