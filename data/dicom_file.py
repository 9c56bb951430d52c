"""A DICOM file opened so that nothing in it is believed: whole elements, in order, each once, and bounded memory.

pydicom reads an element that runs over the end of the file as what is left of it, and of two equal elements the last;
both could make one patient another, or a picture another picture. Section numbers are those of DICOM PS3.5.
"""

import logging
import os
import stat
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, BytesIO, FileIO
from pathlib import Path
from typing import BinaryIO, cast

from PIL import Image
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_dataset, read_file_meta_info, read_partial
from pydicom.tag import BaseTag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from clinifed.data.reasons import Reason
from clinifed.errors import DataError

__all__ = ["UNDEFINED", "Opened", "PixelElement", "check_whole", "open_regular", "opened", "reasons"]

UNDEFINED = 0xFFFFFFFF  # a length that delimiters give (7.1.2)
_MAX_FILE_BYTES = 4 << 30  # only the frames that are wanted are read into memory
_MAX_INFLATED_BYTES = 64 << 20  # of a deflated file: it is held whole
_HEAD_BYTES = 4096  # where the transfer syntax of a deflated file must stand
# FloatPixelData, DoubleFloatPixelData and PixelData: of one file at most one, and the last of its image.
PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)

# pydicom puts values of the file, names among them, into its log messages; nothing of that may reach a log here.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)


@dataclass(frozen=True)
class PixelElement:
    """The element that holds the pixels, not read yet."""

    tag: int
    vr: str | None  # None in implicit VR
    length: int  # bytes, or UNDEFINED
    start: int  # offset of its value


@dataclass(frozen=True)
class Opened:
    """A data set without its pixels, and where they are."""

    dataset: Dataset  # with ``file_meta``
    file: BinaryIO  # the file, or its inflated data set
    pixels: PixelElement | None
    size: int  # bytes of ``file``


@contextmanager
def reasons(reason: Reason) -> Iterator[None]:
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
            found = Reason.NO_FILE
        except OSError as error:
            # Pillow and struct readers raise plain OSError for bad content; with an errno it is the file system.
            found = reason if error.errno is None else Reason.UNREADABLE
        except InvalidDicomError:
            found = Reason.NOT_DICOM
        except MemoryError:
            found = Reason.MEMORY
        except Exception:  # pydicom and its decoders raise about every kind
            found = reason
    raise DataError(found) from None  # the original quotes the file


class _File(BufferedReader):
    """A file that is never asked for more than it has: Python would first make room for all that is asked for."""

    def __init__(self, handle: int, size: int) -> None:
        super().__init__(FileIO(handle, "rb"))
        self._size = size

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size if size is None else min(size, self._size))


def open_regular(path: Path) -> BinaryIO:
    """``path`` for reading, refused where reading could wait for ever: pipes, sockets, devices, folders."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode):
            raise DataError(Reason.NOT_A_FILE)
        if state.st_size > _MAX_FILE_BYTES:
            raise DataError(Reason.FILE_TOO_LARGE)
        if state.st_size == 0:
            raise DataError(Reason.EMPTY)
        return _File(handle, state.st_size)
    except BaseException:
        os.close(handle)
        raise


@contextmanager
def opened(path: Path, tags: Sequence[int] = ()) -> Iterator[Opened]:
    """The data set in ``path`` up to its pixels, which are not read.

    Args:
        tags: only these are kept, if there are any; the others are skipped, but still checked.

    Raises:
        DataError: the file cannot be opened, is not DICOM, or its top level is not a data set as PS3.5 7.1 asks.
    """
    with reasons(Reason.DAMAGED_HEADER), open_regular(path) as file:
        head = file.read(_HEAD_BYTES)
        if head[128:132] != b"DICM":
            raise DataError(Reason.NOT_DICOM)
        found = _deflated(path, file, tags) if DeflatedExplicitVRLittleEndian.encode() in head else None
        if found is None:
            file.seek(0)
            size = os.fstat(file.fileno()).st_size
            order = _Order(file, size)
            wanted = cast(list[BaseTag | int], list(tags)) or None
            ds = read_partial(file, stop_when=order, specific_tags=wanted)
            if ds.file_meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
                raise DataError(Reason.DAMAGED_HEADER)  # hidden where its size was not checked
            found = Opened(ds, file, order.pixels(), size)
        check_whole(found.dataset)
        yield found


def check_whole(dataset: Dataset) -> None:
    """Every element of this level that was not looked at yet is as long as it says.

    Raises:
        DataError: one is not.
    """
    for tag in dataset.keys():  # noqa: SIM118 - a data set iterates over its values, and would convert them
        element = cast(object, dataset.get_item(tag))
        if isinstance(element, RawDataElement) and element.length != UNDEFINED and element.value is not None:
            value = element.value if isinstance(element.value, bytes) else b""
            if element.length and len(value) != element.length:
                raise DataError(Reason.CUT_OFF)


class _Order:
    """Looks at each element of the top level before it is read; pydicom stops at the first that holds pixels."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self._last, self._calls = -1, 0
        self._pixels: PixelElement | None = None

    def __call__(self, tag: BaseTag, vr: str | None, length: int) -> bool:
        number = int(tag)
        self._calls += 1
        # pydicom may ask for the first element twice: once to find out whether VRs are explicit.
        if number < self._last or (number == self._last and self._calls != 2):
            raise DataError(Reason.ORDER)
        self._last = number
        if length != UNDEFINED and self._file.tell() + length > self._size:
            raise DataError(Reason.CUT_OFF)
        if number not in PIXELS:
            return False
        # What data sets say of their own encoding is what the transfer syntax says, even where pydicom found another.
        self._pixels = PixelElement(number, vr, length, self._file.tell())
        return True

    def pixels(self) -> PixelElement | None:
        """Where the reading stopped; None where it went to the end of the file."""
        if self._pixels is None and (self._file.tell() < self._size or not self._calls):
            raise DataError(Reason.DAMAGED_HEADER)  # pydicom gave up silently
        return self._pixels


def _deflated(path: Path, file: BinaryIO, tags: Sequence[int]) -> Opened | None:
    """A deflated data set (A.5: a raw deflate stream after the file meta information); None: it is none after all."""
    meta = read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return None
    # Group 0002 follows the 132 bytes of the prefix; its first element, of 12 bytes, holds the length of the rest.
    file.seek(132 + 12 + int(meta.FileMetaInformationGroupLength))
    inflater, content = zlib.decompressobj(-zlib.MAX_WBITS), bytearray()
    while not inflater.eof:
        piece = inflater.unconsumed_tail or file.read(1 << 16)
        if not piece:
            raise DataError(Reason.CUT_OFF)
        content += inflater.decompress(piece, 1 << 20)
        if len(content) > _MAX_INFLATED_BYTES:
            raise DataError(Reason.INFLATED)
    inflated = BytesIO(content)
    order = _Order(inflated, len(content))
    wanted = cast(list[BaseTag | int], list(tags)) or None
    ds = read_dataset(inflated, is_implicit_VR=False, is_little_endian=True, stop_when=order, specific_tags=wanted)
    ds.file_meta = meta
    return Opened(ds, inflated, order.pixels(), len(content))
