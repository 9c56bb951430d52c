"""The lookup tables of PS3.3: modality and VOI (C.11.1, C.11.2), palettes (C.7.6.3.1.5, C.7.6.3.1.6, C.7.9.2).

pydicom maps 16-bit values through an 8-bit palette by their low byte, so these are read here.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from clinifed.data.dicom_file import check_whole
from clinifed.data.reasons import Reason
from clinifed.errors import DataError

__all__ = ["Lookup", "palette", "table_of"]

_MAX_ENTRIES = 1 << 16


@dataclass(frozen=True)
class Lookup:
    """A table from stored or modality values to entries."""

    entries: NDArray[np.float32]  # (K,), or (K, 3) for colours
    first: int  # the value that the first entry is of
    peak: float  # the greatest that an entry can be: 2^bits - 1

    def apply(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Entries of ``values``; below and above the table its first and last (C.11.2.1.1).

        Args:
            values: any shape, integers, or floats that are rounded.

        Returns:
            float32, the shape of ``values``, with the colours last.
        """
        if np.issubdtype(values.dtype, np.floating):
            values = np.rint(values)
        last = len(self.entries) - 1
        # Clipped while it is wide enough for any first value.
        index = np.clip(values.astype(np.float64 if values.dtype.itemsize > 4 else np.int64) - self.first, 0, last)
        return self.entries[index.astype(np.int32)]


def table_of(sequence: Sequence, dataset: Dataset, *, signed: bool) -> Lookup:
    """The first table of a Modality LUT Sequence (0028,3000) or VOI LUT Sequence (0028,3010).

    Args:
        signed: whether its input may be negative; then a first value that was written unsigned means a negative one.

    Raises:
        DataError: it is cut off, or its descriptor contradicts it.
    """
    item = sequence[0]
    check_whole(item)
    count, first, bits = _descriptor(item.LUTDescriptor)
    if not 1 <= bits <= 16:
        raise DataError(Reason.LOOKUP_TABLE)
    data = item.LUTData
    entries = _words(data, count, bits, dataset) if isinstance(data, bytes) else np.atleast_1d(np.asarray(data))
    entries = entries[:count]  # an odd number of bytes is padded
    peak = 2**bits - 1
    if len(entries) != count or entries.min() < 0 or entries.max() > peak:
        raise DataError(Reason.LOOKUP_TABLE)
    if signed and first >= 1 << 15:
        first -= 1 << 16
    return Lookup(entries.astype(np.float32), first, float(peak))


def _descriptor(value: Any) -> tuple[int, int, int]:
    """Entries (0 means 65536), first value mapped, bits of each entry."""
    if not isinstance(value, (list, Sequence)) and not hasattr(value, "__len__"):
        raise DataError(Reason.LOOKUP_TABLE)
    if len(value) != 3:
        raise DataError(Reason.LOOKUP_TABLE)
    count, first, bits = (int(part) for part in value)
    # Where the first value is signed, pydicom reads all three so.
    return (count & 0xFFFF) or _MAX_ENTRIES, first, bits


def _words(data: bytes, count: int, bits: int, dataset: Dataset) -> NDArray[Any]:
    """Entries from bytes: one byte each where they are that few, else 16 bits in the order of the file."""
    if bits <= 8 and len(data) in (count, count + count % 2):
        return np.frombuffer(data, np.uint8)
    order = "<" if dataset.original_encoding[1] else ">"
    return np.frombuffer(data[: len(data) // 2 * 2], f"{order}u2")


def palette(dataset: Dataset, *, signed: bool) -> Lookup:
    """The palette of PALETTE COLOR, its entries scaled to [0, 1].

    Raises:
        DataError: it is missing, cut off, or its tables contradict each other.
    """
    descriptors, columns = [], []
    for colour in ("Red", "Green", "Blue"):
        descriptor = dataset.get(f"{colour}PaletteColorLookupTableDescriptor")
        plain = dataset.get(f"{colour}PaletteColorLookupTableData")
        segmented = dataset.get(f"Segmented{colour}PaletteColorLookupTableData")
        if descriptor is None or not (plain or segmented):
            raise DataError(Reason.LOOKUP_TABLE)
        count, first, bits = _descriptor(descriptor)
        if bits not in (8, 16):
            raise DataError(Reason.LOOKUP_TABLE)
        entries = _words(plain, count, bits, dataset) if plain else _expanded(segmented, bits, count, dataset)
        if len(entries) < count:
            raise DataError(Reason.LOOKUP_TABLE)
        descriptors.append((count, first, bits))
        columns.append(entries[:count].astype(np.float32))
    if len(set(descriptors)) != 1:
        raise DataError(Reason.LOOKUP_TABLE)
    count, first, bits = descriptors[0]
    entries = np.stack(columns, axis=1)
    # Entries of 8 bits in words: some write them in the low byte, some in the high byte or in both.
    peak = 255 if bits == 8 and entries.max() <= 255 else 65535
    if signed and first >= 1 << 15:
        first -= 1 << 16
    entries /= np.float32(peak)
    return Lookup(entries, first, 1.0)


def _expanded(data: bytes, bits: int, count: int, dataset: Dataset) -> NDArray[Any]:
    """A segmented palette (C.7.9.2): discrete (0), linear (1) and indirect (2) segments."""
    order = "<" if dataset.original_encoding[1] else ">"
    width = bits // 8
    words = np.frombuffer(data[: len(data) // width * width], np.dtype(f"{order}u{width}")).astype(np.int64).tolist()
    out: list[int] = []

    def expand(at: int, end: int | None, segments: int | None) -> None:
        """Append the segments from ``at`` on, to the end or so many."""
        while (segments is None or segments > 0) and at < (len(words) if end is None else end) - 1:
            code, length = words[at], words[at + 1]
            if code == 0:
                out.extend(words[at + 2 : at + 2 + length])
                at += 2 + length
            elif code == 1 and out:
                out.extend(np.rint(np.linspace(out[-1], words[at + 2], length + 1)[1:]).astype(int).tolist())
                at += 3
            elif code == 2 and end is None and segments is None:
                # Four more words, or four bytes in 8-bit tables: the offset in bytes, least significant part first.
                parts = words[at + 2 : at + (6 if width == 1 else 4)]
                offset = sum(part << (8 * width * number) for number, part in enumerate(parts))
                expand(offset // width, at, length)
                at += 2 + len(parts)
            else:
                raise DataError(Reason.LOOKUP_TABLE)
            if len(out) > count:
                raise DataError(Reason.LOOKUP_TABLE)
            segments = None if segments is None else segments - 1

    expand(0, None, None)
    return np.asarray(out)
