"""What a compressed image says of itself, before a codec is trusted with it: its size, and whether it is RGB.

A codec allocates what the codestream declares, not what the DICOM header does; and one that was cut off is partly
grey, not an error. JPEG: ITU-T T.81 Annex B; JPEG-LS: ITU-T T.87 Annex C; JPEG 2000: ITU-T T.800 Annex A.
"""

import struct
from dataclasses import dataclass

from clinifed.data.reasons import Reason
from clinifed.errors import DataError

__all__ = ["Declared", "check_codestream", "declared", "is_rgb_already"]

_JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
_JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
_J2K = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
_HTJ2K = ("1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203")
# Start of frame: SOF0-3, 5-7, 9-11, 13-15 of JPEG, SOF55 of JPEG-LS.
_SOF = {*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0), 0xF7}
_PADDING = 64  # bytes; one is allowed (PS3.5 A.4), some write more
_APP14, _SOS, _EOI = 0xEE, 0xDA, 0xD9
_STANDALONE = {0x01, *range(0xD0, 0xD9)}


@dataclass(frozen=True)
class Declared:
    """What a codestream declares."""

    rows: int
    columns: int
    samples: int
    precision: int  # bits
    adobe_transform: int | None = None  # of the APP14 segment: 0 none, 1 YCbCr, 2 YCCK; None where there is none


def check_codestream(syntax: str, codestream: bytes, rows: int, columns: int, samples: int, allocated: int) -> None:
    """Compare one frame's codestream with the header; RLE has no size of its own.

    Raises:
        DataError: they contradict each other, or it is no codestream of the transfer syntax.
    """
    found = declared(syntax, codestream)
    if found is None:
        return
    # End of image (JPEG, JPEG-LS) and end of codestream (JPEG 2000) are the same two bytes. CharLS seeks for ever
    # where they are missing, GDCM and OpenJPEG fill the rest with anything.
    if b"\xff\xd9" not in codestream[-_PADDING:]:
        raise DataError(Reason.CODESTREAM_CUT)
    same = (found.rows, found.columns, found.samples) == (rows, columns, samples)
    # 1-bit images are compressed as 8-bit ones by some.
    if not same or found.precision > max(8, allocated):
        raise DataError(Reason.CODESTREAM)


def is_rgb_already(syntax: str, codestream: bytes) -> bool:
    """Whether Pillow returns RGB whatever the header says: it undoes the transform that an Adobe segment names."""
    if syntax != _JPEG[0]:
        return False
    found = declared(syntax, codestream)
    return found is not None and found.adobe_transform == 1


def declared(syntax: str, codestream: bytes) -> Declared | None:
    """What ``codestream`` says of itself; None for RLE.

    Raises:
        DataError: it is no codestream of the transfer syntax.
    """
    try:
        if syntax in _JPEG or syntax in _JPEG_LS:
            return _jpeg(codestream)
        if syntax in _J2K or syntax in _HTJ2K:
            return _jpeg_2000(codestream)
    except (IndexError, struct.error):
        raise DataError(Reason.CODESTREAM) from None
    return None


def _jpeg(codestream: bytes) -> Declared:
    """Segments up to the frame header; see B.1.1."""
    if codestream[:2] != b"\xff\xd8":
        raise DataError(Reason.CODESTREAM)
    at, adobe = 2, None
    while True:
        if codestream[at] != 0xFF:
            raise DataError(Reason.CODESTREAM)
        marker = codestream[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker in (_SOS, _EOI):
            raise DataError(Reason.CODESTREAM)
        if marker in _STANDALONE:
            at += 2
            continue
        (length,) = struct.unpack_from(">H", codestream, at + 2)
        if marker in _SOF:
            precision, rows, columns, samples = struct.unpack_from(">BHHB", codestream, at + 4)
            return Declared(rows, columns, samples, precision, adobe)
        if marker == _APP14 and codestream[at + 4 : at + 9] == b"Adobe":
            adobe = codestream[at + 15]
        at += 2 + length


def _jpeg_2000(codestream: bytes) -> Declared:
    """The SIZ segment (A.5.1), which follows SOC at once; a JP2 file may lie around the codestream."""
    at = codestream.find(b"\xff\x4f\xff\x51")
    if at < 0:
        raise DataError(Reason.CODESTREAM)
    width, height, left, top = struct.unpack_from(">LLLL", codestream, at + 8)
    (samples,) = struct.unpack_from(">H", codestream, at + 40)
    return Declared(height - top, width - left, samples, (codestream[at + 42] & 0x7F) + 1)
