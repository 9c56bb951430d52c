"""Stored values of single frames (PS3.3 C.7.6.3, PS3.5 8 and A.4), through pydicom's decoders and their plugins.

Before a codec sees a byte: the size the header declares is acceptable, all of the pixel data is there, every fragment
is whole, and the compressed image has the size that the header declares.
"""

import math
import struct
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import as_pixel_options

from clinifed.data.codestreams import check_codestream, is_rgb_already
from clinifed.data.dicom_file import UNDEFINED, Opened
from clinifed.data.jpeg_extended import add_jpeg_extended
from clinifed.data.reasons import Reason, missing_codec
from clinifed.data.volumes import MAX_FRAME_VALUES
from clinifed.errors import DataError

__all__ = ["PREFERRED", "PixelData", "Stored"]

_MAX_DECODED_BYTES = 256 << 20  # one frame, as the header declares it
_MAX_FRAMES = 1 << 20
_MAX_FRAGMENTS = 1 << 18
_KEYWORDS = {0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData", 0x7FE00010: "PixelData"}
_VRS = ("OB", "OW", "OF", "OD", "OL", "OV", "UN")
_ITEM, _DELIMITER = 0xFFFEE000, 0xFFFEE0DD

# Which of pydicom's plugins is asked, where several are installed: one, so that equal files give equal pixels. GDCM
# ends its process where a JPEG is corrupt that Pillow refuses.
PREFERRED = {
    "1.2.840.10008.1.2.4.50": "pillow",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg",
    "1.2.840.10008.1.2.4.91": "pylibjpeg",
    "1.2.840.10008.1.2.5": "pylibjpeg",
}
_JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"

add_jpeg_extended()


@dataclass(frozen=True)
class Stored:
    """One frame as it is stored, and what its values mean."""

    values: NDArray[Any]  # (H, W), or (H, W, 3) with the colours last
    photometric: str  # PhotometricInterpretation (0028,0004) of ``values``, which codecs change
    bits: int  # BitsStored (0028,0101)
    signed: bool  # PixelRepresentation (0028,0103)


class PixelData:
    """The pixel data of an opened file, checked.

    Raises:
        DataError: there is none, the header contradicts itself or the data, or no codec is installed.
    """

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        ds = opened.dataset
        self._rows, self._columns, self._allocated = (int(ds.get(n) or 0) for n in ("Rows", "Columns", "BitsAllocated"))
        if "Rows" not in ds and "Columns" not in ds:
            raise DataError(Reason.NO_IMAGE)  # reports, plans, directories
        if self._rows < 1 or self._columns < 1 or self._allocated < 1:
            raise DataError(Reason.NO_ROWS)
        self._samples, self.frames = int(ds.get("SamplesPerPixel") or 1), int(ds.get("NumberOfFrames") or 1)
        if not 1 <= self.frames <= _MAX_FRAMES or self._samples not in (1, 3):
            raise DataError(Reason.OUT_OF_RANGE)
        self.frame_values = self._rows * self._columns * self._samples
        if (
            self.frame_values * math.ceil(self._allocated / 8) > _MAX_DECODED_BYTES
            or self.frame_values > MAX_FRAME_VALUES
        ):
            raise DataError(Reason.TOO_LARGE)
        if opened.pixels is None:
            raise DataError(Reason.NO_PIXEL_DATA)
        self._syntax = ds.file_meta.get("TransferSyntaxUID")
        if not self._syntax:
            raise DataError(Reason.NO_TRANSFER_SYNTAX)
        try:
            self._decoder = get_decoder(self._syntax)
        except NotImplementedError:
            raise DataError(missing_codec(str(self._syntax))) from None
        if not self._decoder.is_available:
            raise DataError(missing_codec(str(self._syntax)))
        element = opened.pixels
        self._keyword, self._vr, self._length, self._start = (
            _KEYWORDS[element.tag],
            element.vr or "OW",
            element.length,
            element.start,
        )
        if self._vr not in _VRS:
            raise DataError(Reason.DAMAGED_HEADER)
        self._endian = "<" if ds.original_encoding[1] else ">"
        self._photometric = str(ds.get("PhotometricInterpretation") or "")
        self._bits = int(ds.get("BitsStored") or 0) if self._keyword == "PixelData" else self._allocated
        if not 1 <= self._bits <= self._allocated or self._allocated > 64:
            raise DataError(Reason.BITS)
        if self._syntax.is_encapsulated:
            self._check_fragments()
        else:
            self._check_length()

    def _check_length(self) -> None:
        """Native pixel data is as long as the header says, or longer by padding (PS3.5 8.1.1, A.1)."""
        values = self.frame_values * self.frames
        if self._allocated == 1:
            expected = math.ceil(values / 8)
        elif self._allocated % 8 == 0:
            expected = values * (self._allocated // 8)
        else:
            raise DataError(Reason.BITS)
        if self._length == UNDEFINED or self._length == 0:
            raise DataError(Reason.PIXEL_LENGTH)
        if self._photometric in ("YBR_FULL_422", "YBR_PARTIAL_422"):
            if self._length >= expected:
                raise DataError(Reason.PIXEL_LENGTH)  # not subsampled as the header says
            expected = expected // 3 * 2
        if self._length < expected:
            raise DataError(Reason.PIXEL_LENGTH)

    def _check_fragments(self) -> None:
        """Encapsulated pixel data is items up to its delimiter, each whole, frames beginning where items do (A.4)."""
        file, end = self._opened.file, self._opened.size
        if self._length != UNDEFINED:
            end = self._start + self._length
        file.seek(self._start)
        starts: list[int] = []
        while True:
            head = file.read(8) if file.tell() + 8 <= end else b""
            if not head and self._length != UNDEFINED and file.tell() == end:
                break
            if len(head) < 8:
                raise DataError(Reason.CUT_OFF)
            group, element, length = struct.unpack(f"{self._endian}HHL", head)
            tag = group << 16 | element
            if tag == _DELIMITER:
                break
            if tag != _ITEM or file.tell() + length > end:
                raise DataError(Reason.FRAGMENTS if tag != _ITEM else Reason.CUT_OFF)
            starts.append(file.tell() - 8)
            if len(starts) > _MAX_FRAGMENTS:
                raise DataError(Reason.FRAGMENTS)
            file.seek(length, 1)
        if len(starts) < 2 or len(starts) - 1 < self.frames:
            raise DataError(Reason.FRAGMENTS)
        self._check_offsets(starts)

    def _check_offsets(self, starts: list[int]) -> None:
        """The Basic Offset Table, if it is not empty, points at fragments, one after the other."""
        file = self._opened.file
        file.seek(starts[0] + 4)
        (length,) = struct.unpack(f"{self._endian}L", file.read(4))
        if length % 4:
            raise DataError(Reason.FRAGMENTS)
        offsets = struct.unpack(f"{self._endian}{length // 4}L", file.read(length))
        first = starts[0] + 8 + length
        if offsets and (
            len(offsets) < self.frames
            or list(offsets) != sorted(set(offsets))
            or not {first + offset for offset in offsets} <= set(starts[1:])
        ):
            raise DataError(Reason.FRAGMENTS)

    def frame(self, index: int) -> Stored:
        """Decode one frame.

        Args:
            index: 0 is the first.

        Raises:
            DataError: the codec refuses it, or it is not what the header says.
        """
        file, syntax, ds = self._opened.file, self._syntax, self._opened.dataset
        options = as_pixel_options(ds, pixel_keyword=self._keyword, pixel_vr=self._vr)
        file.seek(self._start)
        rgb = False
        if syntax.is_encapsulated:
            codestream = get_frame(
                file,
                index,
                number_of_frames=self.frames,
                extended_offsets=options.pop("extended_offsets", None),
                endianness=self._endian,
            )
            check_codestream(syntax, codestream, self._rows, self._columns, self._samples, self._allocated)
            rgb = self._samples == 3 and is_rgb_already(syntax, codestream)
            # One frame on its own, encapsulated anew: an empty offset table, then one item.
            item = struct.pack("<HHLHHL", 0xFFFE, 0xE000, 0, 0xFFFE, 0xE000, len(codestream)) + codestream
            values, meta = self._decode(BytesIO(item), 0, {**options, "number_of_frames": 1})
        else:
            values, meta = self._decode(file, index, options)
        photometric = "RGB" if rgb else str(meta["photometric_interpretation"])
        values = values.astype(values.dtype.newbyteorder("="), copy=False)
        signed = int(ds.get("PixelRepresentation") or 0) == 1
        if np.issubdtype(values.dtype, np.integer):
            values = self._only_stored_bits(values)
        return Stored(values, photometric, self._bits, signed)

    def _decode(self, source: Any, index: int, options: dict[str, Any]) -> tuple[NDArray[Any], dict[str, Any]]:
        """Stored values through the preferred codec, or the one that is installed."""
        # Colours are converted by us: pydicom does it for 8 bits only, whatever is stored.
        fixed: dict[str, Any] = {"raw": True, "allow_excess_frames": False, **options}
        if not self._syntax.is_encapsulated:
            fixed["correct_unused_bits"] = False  # done by `_only_stored_bits`, which knows HighBit
        plugin = PREFERRED.get(str(self._syntax), "")
        if self._syntax == _JPEG_EXTENDED:
            plugin = "pillow" if self._bits <= 8 else "clinifed"
            if plugin not in self._decoder.available_plugins:
                raise DataError(missing_codec(_JPEG_EXTENDED))
        if plugin not in self._decoder.available_plugins:
            plugin = ""
        return self._decoder.as_array(source, index=index, decoding_plugin=plugin, **fixed)

    def _only_stored_bits(self, array: NDArray[Any]) -> NDArray[Any]:
        """Only the bits that are stored: old overlays may lie beside them (PS3.5 8.1.1)."""
        allocated, stored = 8 * array.dtype.itemsize, self._bits
        cells = not self._syntax.is_encapsulated or self._syntax == "1.2.840.10008.1.2.5"  # RLE keeps cells as they are
        low = int(self._opened.dataset.get("HighBit", stored - 1)) + 1 - stored if cells else 0
        if stored == 1 or not 0 <= low <= allocated - stored or (low == 0 and stored == allocated):
            return array
        # Up to the top and down again: the shift down repeats the sign of signed values.
        return np.asarray((array << (allocated - stored - low)) >> (allocated - stored))
