"""Every reason why a file is not used: a fixed text of a few words, so that none can hold anything of the file."""

from collections.abc import Mapping
from enum import StrEnum

__all__ = ["COMPRESSED", "REASONS", "Reason", "missing_codec"]


class Reason(StrEnum):
    """Why a file is not used."""

    # the file
    NO_FILE = "no such file"
    NOT_A_FILE = "not a regular file"
    UNREADABLE = "file cannot be read"
    EMPTY = "empty file"
    FILE_TOO_LARGE = "larger than 4096 MiB"
    NOT_DICOM = "not DICOM"
    NOT_AN_IMAGE_FILE = "neither DICOM nor a readable PNG or JPEG"
    # the data set
    DAMAGED = "damaged file"
    DAMAGED_HEADER = "damaged header"
    CUT_OFF = "cut off"
    ORDER = "elements twice or out of order"
    INFLATED = "larger than 64 MiB when inflated"
    NO_TRANSFER_SYNTAX = "no transfer syntax"
    UNKNOWN_TRANSFER_SYNTAX = "unknown transfer syntax"
    NESTED = "nested too deeply or too large"
    NOT_TEXT = "label tag holds no text"
    LONG_IDENTIFIER = "patient's number is too long"
    # the directory
    NO_DIRECTORY = "DICOMDIR is no directory"
    DAMAGED_DIRECTORY = "DICOMDIR cannot be read"
    DIRECTORY_SYNTAX = "DICOMDIR has a transfer syntax that none may have"
    DIRECTORY_TOO_LARGE = "DICOMDIR is larger than 64 MiB"
    # the image
    NO_IMAGE = "no image"
    NO_PIXEL_DATA = "no pixel data"
    NO_ROWS = "no rows, columns or bits"
    OUT_OF_RANGE = "frames or samples per pixel out of range"
    TOO_LARGE = "larger than 256 MiB when decoded"
    BITS = "bits stored out of range"
    PHOTOMETRIC = "unknown photometric interpretation"
    PIXEL_LENGTH = "pixel data contradicts the header"
    FRAGMENTS = "fragments of the pixel data are damaged"
    CODESTREAM = "compressed image contradicts the header"
    CODESTREAM_CUT = "compressed image is cut off"
    UNDECODABLE = "pixel data cannot be decoded"
    # its display
    NOT_FINITE = "values are not finite"
    RESCALE = "rescale slope is zero or not finite"
    WINDOW_WIDTH = "window width out of range"
    VOI_FUNCTION = "unknown VOI LUT function"
    LOOKUP_TABLE = "damaged lookup table"
    ASPECT = "pixel aspect ratio out of range"
    DISPLAY = "values cannot be displayed"
    ELONGATED = "image is too elongated"
    # what reading it did
    MEMORY = "reading it took too much memory"
    TIME = "reading it took too long"
    CRASHED = "reader crashed"


# The registered compressed transfer syntaxes (PS3.6 Table A-1), by short names.
COMPRESSED: Mapping[str, str] = {
    "1.2.840.10008.1.2.4.50": "JPEG Baseline",
    "1.2.840.10008.1.2.4.51": "JPEG Extended, 12 bit",
    "1.2.840.10008.1.2.4.57": "JPEG Lossless",
    "1.2.840.10008.1.2.4.70": "JPEG Lossless",
    "1.2.840.10008.1.2.4.80": "JPEG-LS",
    "1.2.840.10008.1.2.4.81": "JPEG-LS",
    "1.2.840.10008.1.2.4.90": "JPEG 2000",
    "1.2.840.10008.1.2.4.91": "JPEG 2000",
    "1.2.840.10008.1.2.4.92": "JPEG 2000 multi-component",
    "1.2.840.10008.1.2.4.93": "JPEG 2000 multi-component",
    "1.2.840.10008.1.2.4.94": "JPIP",
    "1.2.840.10008.1.2.4.95": "JPIP",
    "1.2.840.10008.1.2.4.100": "MPEG2 video",
    "1.2.840.10008.1.2.4.101": "MPEG2 video",
    "1.2.840.10008.1.2.4.102": "MPEG-4 video",
    "1.2.840.10008.1.2.4.103": "MPEG-4 video",
    "1.2.840.10008.1.2.4.104": "MPEG-4 video",
    "1.2.840.10008.1.2.4.105": "MPEG-4 video",
    "1.2.840.10008.1.2.4.106": "MPEG-4 video",
    "1.2.840.10008.1.2.4.107": "HEVC video",
    "1.2.840.10008.1.2.4.108": "HEVC video",
    "1.2.840.10008.1.2.4.110": "JPEG XL",
    "1.2.840.10008.1.2.4.111": "JPEG XL",
    "1.2.840.10008.1.2.4.112": "JPEG XL",
    "1.2.840.10008.1.2.4.201": "HTJ2K",
    "1.2.840.10008.1.2.4.202": "HTJ2K",
    "1.2.840.10008.1.2.4.203": "HTJ2K",
    "1.2.840.10008.1.2.4.204": "JPIP",
    "1.2.840.10008.1.2.4.205": "JPIP",
    "1.2.840.10008.1.2.5": "RLE",
    "1.2.840.10008.1.2.8.1": "deflated frames",
}


def missing_codec(transfer_syntax: str) -> str:
    """The reason for a registered compressed transfer syntax without a codec; another one is unknown."""
    name = COMPRESSED.get(transfer_syntax)
    return f"missing codec for {name}" if name else str(Reason.UNKNOWN_TRANSFER_SYNTAX)


REASONS = frozenset(map(str, Reason)) | {missing_codec(syntax) for syntax in COMPRESSED}
