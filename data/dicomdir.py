"""The images that a DICOMDIR lists (PS3.3 F, PS3.10 8): a CD's or an export's table of contents.

The records are read as the flat sequence they are stored in. pydicom's FileSet follows the offsets between them, which
may go in circles, and gives up a whole directory for one path that leads out of it.
"""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from pydicom import dcmread
from pydicom.filereader import read_file_meta_info
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, MediaStorageDirectoryStorage

from clinifed.errors import DataError

__all__ = ["listed_images"]

_MAX_BYTES = 64 << 20  # some 100,000 records


def listed_images(directory: Path) -> Iterator[Path | None]:
    """The path of each IMAGE record in use, whether or not a file is there; None where it leads out of the folder.

    Raises:
        DataError: the directory cannot be read; a reason of a few words.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's quote values
        try:
            references = list(_references(directory))
        except DataError:
            raise
        except Exception:  # pydicom raises about every kind, and quotes the file
            raise DataError("DICOMDIR cannot be read") from None
    spelt: dict[Path, dict[str, str]] = {}
    for parts in references:
        if not parts or any(not part or part in (".", "..") or set(part) & set("/\\\0") for part in parts):
            yield None
            continue
        path = directory.parent
        for part in parts:
            path = path / _as_spelt(path, part, spelt)
        yield path


def _references(directory: Path) -> Iterator[list[str]]:
    """ReferencedFileID (0004,1500) of each IMAGE record that is in use, by its components."""
    if directory.stat().st_size > _MAX_BYTES:
        raise DataError(f"DICOMDIR is larger than {_MAX_BYTES >> 20} MiB")
    meta = read_file_meta_info(directory)
    if meta.get("MediaStorageSOPClassUID") != MediaStorageDirectoryStorage:
        raise DataError("DICOMDIR is no directory")
    # PS3.10 8.6 asks for explicit little endian. Implicit occurs; anything compressed could be a bomb.
    if meta.get("TransferSyntaxUID") not in (ExplicitVRLittleEndian, ImplicitVRLittleEndian):
        raise DataError("DICOMDIR has a transfer syntax that none may have")
    for record in dcmread(directory).DirectoryRecordSequence:
        # RecordInUseFlag (0004,1410): 0 is a record that was deleted (PS3.3 F.3.2.2).
        if record.get("RecordInUseFlag") == 0 or record.get("DirectoryRecordType") != "IMAGE":
            continue
        named = record.get("ReferencedFileID")
        yield [named] if isinstance(named, str) else [str(part) for part in named or ()]


def _as_spelt(folder: Path, name: str, known: dict[Path, dict[str, str]]) -> str:
    """``name`` as it stands in ``folder``: copies of a CD often have their names in lower case."""
    if folder not in known:
        try:
            names = sorted(os.listdir(folder), reverse=True)  # noqa: PTH208 - names, not paths
        except OSError:
            names = []
        known[folder] = {found.casefold(): found for found in names} | {found: found for found in names}
    return known[folder].get(name, known[folder].get(name.casefold(), name))
