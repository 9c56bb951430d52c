"""The images that a DICOMDIR lists (PS3.3 F, PS3.10 8): a CD's or an export's table of contents.

The records are read as the flat sequence they are stored in. pydicom's FileSet follows the offsets between them, which
may go in circles, and gives up a whole directory for one path that leads out of it.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from pydicom import dcmread
from pydicom.filereader import read_file_meta_info
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, MediaStorageDirectoryStorage

from clinifed.data.decoding import Decoder
from clinifed.data.decoding_worker import Limits
from clinifed.data.dicom_file import open_regular, reasons
from clinifed.data.reasons import Reason
from clinifed.errors import DataError

__all__ = ["DIRECTORY_LIMITS", "listed_images", "read_directory"]

_MAX_BYTES = 64 << 20  # some 100,000 records
_OF_A_DIRECTORY = {str(reason): str(Reason.DAMAGED_DIRECTORY) for reason in (Reason.NOT_DICOM, Reason.EMPTY)}
# A directory lists a whole archive: it may take longer than one image may.
DIRECTORY_LIMITS = Limits(memory_mib=2048, cpu_s=120, wall_s=120.0)


def listed_images(directory: Path, decoder: Decoder | None = None) -> Iterator[Path | None]:
    """The path of each IMAGE record in use, whether or not a file is there; None where it leads out of the folder.

    The directory is parsed in a reader; here only its names are looked at.

    Args:
        decoder: whose readers to use; one of its own, within :data:`DIRECTORY_LIMITS`, where there is none.

    Raises:
        DataError: the directory cannot be read; a reason of a few words.
    """
    if decoder is None:
        with Decoder(limits=DIRECTORY_LIMITS) as its_own:
            references = its_own.directory(directory)
    else:
        references = decoder.directory(directory)
    spelt: dict[Path, dict[str, str]] = {}
    for parts in references:
        if not parts or any(not part or part in (".", "..") or set(part) & set("/\\\0") for part in parts):
            yield None
            continue
        path = directory.parent
        for part in parts:
            path = path / _as_spelt(path, part, spelt)
        yield path


def read_directory(directory: Path) -> list[list[str]]:
    """ReferencedFileID (0004,1500) of each IMAGE record that is in use, by its components: in process, for a reader.

    Raises:
        DataError: it is larger than 64 MiB, no directory, or damaged; a reason of a few words.
    """
    try:
        with reasons(Reason.DAMAGED_DIRECTORY):
            with open_regular(directory) as file:
                if os.fstat(file.fileno()).st_size > _MAX_BYTES:
                    raise DataError(Reason.DIRECTORY_TOO_LARGE)
            meta = read_file_meta_info(directory)
            if meta.get("MediaStorageSOPClassUID") != MediaStorageDirectoryStorage:
                raise DataError(Reason.NO_DIRECTORY)
            # PS3.10 8.6 asks for explicit little endian. Implicit occurs; anything compressed could be a bomb.
            if meta.get("TransferSyntaxUID") not in (ExplicitVRLittleEndian, ImplicitVRLittleEndian):
                raise DataError(Reason.DIRECTORY_SYNTAX)
            listed = []
            for record in dcmread(directory).DirectoryRecordSequence:
                # RecordInUseFlag (0004,1410): 0 is a record that was deleted (PS3.3 F.3.2.2).
                if record.get("RecordInUseFlag") == 0 or record.get("DirectoryRecordType") != "IMAGE":
                    continue
                named = record.get("ReferencedFileID")
                listed.append([named] if isinstance(named, str) else [str(part) for part in named or ()])
            return listed
    except DataError as error:
        raise DataError(_OF_A_DIRECTORY.get(str(error), str(error))) from None


def _as_spelt(folder: Path, name: str, known: dict[Path, dict[str, str]]) -> str:
    """``name`` as it stands in ``folder``: copies of a CD often have their names in lower case."""
    if folder not in known:
        try:
            names = sorted(os.listdir(folder), reverse=True)  # noqa: PTH208 - names, not paths
        except OSError:
            names = []
        known[folder] = {found.casefold(): found for found in names} | {found: found for found in names}
    return known[folder].get(name, known[folder].get(name.casefold(), name))
