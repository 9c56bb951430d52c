"""SOURCES: where a site's images come from. A source gives one row per image; what it fetches goes through a spool."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from clinifed.config import FolderIndex
from clinifed.data.decoding import Decoder
from clinifed.data.dicomdir import DIRECTORY_LIMITS, listed_images
from clinifed.data.fingerprint import image_suffix
from clinifed.data.tables import read_table
from clinifed.errors import ConfigError, DataError
from clinifed.files import OWNER_ONLY

__all__ = [
    "FIELDS",
    "SOURCES",
    "DicomdirSource",
    "FolderSource",
    "Row",
    "Source",
    "Spool",
    "TableSource",
    "open_source",
]

FIELDS = ("image", "patient", "specialty", "label", "caption", "split")  # what a table may say of an image
_NAMED = (".dcm", ".dicom", ".png", ".jpg", ".jpeg")  # names that promise an image
_MAX_BYTES = 256 << 20  # of one image; the decoder opens nothing larger


@dataclass(frozen=True)
class Row:
    """One image as its source has it."""

    path: Path  # a file on this machine: in the folder that is indexed, or in the spool
    values: Mapping[str, str] = field(
        default_factory=dict
    )  # FIELDS that are known besides the file; texts as they stand
    problem: str = ""  # why there is no file to give: a reason of a few words that holds no text of the source


class Spool:
    """Where a source puts what it fetched: an owner-only folder of files named by their own hash.

    Args:
        folder: made when the first file arrives.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, blocks: Iterable[bytes]) -> Path:
        """Keep one image that arrives in pieces; the same bytes arrive at the same path.

        Raises:
            DataError: larger than 256 MiB, or neither DICOM, PNG nor JPEG; nothing was kept.
        """
        self.folder.mkdir(exist_ok=True, mode=0o700)
        temporary = self.folder / f".{os.getpid()}.tmp"
        digest, size = sha256(), 0
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, OWNER_ONLY), "wb") as file:
                for block in blocks:
                    size += len(block)
                    if size > _MAX_BYTES:
                        raise DataError(f"larger than {_MAX_BYTES >> 20} MiB")
                    digest.update(block)
                    file.write(block)
            suffix = image_suffix(temporary)
            if not suffix:
                raise DataError("neither DICOM, PNG nor JPEG")
            return temporary.replace(self.folder / f"{digest.hexdigest()}{suffix}")
        finally:
            temporary.unlink(missing_ok=True)

    def keep_only(self, paths: Iterable[Path]) -> None:
        """Delete every file but ``paths``: an image that is in no manifest has no reason to lie here."""
        kept = {path.name for path in paths if path.parent.resolve() == self.folder.resolve()}
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name not in kept:
                    path.unlink()


class Source(Protocol):
    """What delivers images to the index. Made from the index's settings; see :data:`SOURCES`.

    Implementations guarantee:
        - one row for each image that the source lists, in an order that does not change, held one at a time;
        - a row that has no file says why in ``problem``, and does not end the others;
        - nothing is written but through the spool.

    Where a file lies, what it is and whose, is checked by the index, not here.
    """

    def rows(self, spool: Spool) -> Iterator[Row]:
        """The images. Raises DataError where the source as a whole cannot be read."""


class FolderSource:
    """Every file beneath a folder that begins like an image, whatever its name; links are not followed."""

    def __init__(self, index: FolderIndex) -> None:
        self.folder = index.folder

    def rows(self, spool: Spool) -> Iterator[Row]:
        """Files that only promise by their name to be images are told, all others are passed by."""
        for path, readable in _walk(self.folder):
            if not readable:
                yield Row(path, problem="folder cannot be opened")
                continue
            try:
                suffix = image_suffix(path)
            except OSError:
                yield Row(path, problem="file cannot be opened")
                continue
            if suffix:
                yield Row(path)
            elif path.suffix.lower() in _NAMED:
                yield Row(path, problem="neither DICOM, PNG nor JPEG, whatever its name says")


class TableSource:
    """The rows of the label tables that ``where`` keeps; image paths count from each table's own folder."""

    def __init__(self, index: FolderIndex) -> None:
        self.index = index
        if unknown := sorted(set(index.columns) - set(FIELDS)):
            raise DataError(f"columns: {', '.join(unknown)} is not one of {', '.join(FIELDS)}")

    def rows(self, spool: Spool) -> Iterator[Row]:
        """See :func:`clinifed.data.tables.read_table` for what a table may be."""
        index = self.index
        columns = {name: index.columns.get(name, name) for name in FIELDS}
        for path in index.labels:
            table = read_table(path)
            needed = {columns["image"], *(columns[name] for name in index.columns), *index.where}
            if missing := sorted(needed - set(table.columns)):
                raise DataError(
                    f"{path}: missing column {', '.join(missing)} among {len(table.columns)}; "
                    "map it under `columns`, and see that the first row holds names"  # without them it holds a patient
                )
            if not table.columns.is_unique:
                raise DataError(f"{path}: two columns have the same name")
            for column, kept in index.where.items():
                table = table[table[column].isin(kept)]
            present = [name for name in FIELDS if columns[name] in table.columns]
            for cells in table[[columns[name] for name in present]].itertuples(index=False, name=None):
                values = dict(zip(present, cells, strict=True))
                yield Row(path.parent / values["image"], values)


class DicomdirSource:
    """The images that the DICOMDIR files beneath a folder list, each counted from its own folder."""

    def __init__(self, index: FolderIndex) -> None:
        self.folder = index.folder

    def rows(self, spool: Spool) -> Iterator[Row]:
        """Files that are named but absent, or named outside of the folder, are rows with a problem."""
        found = False
        with Decoder(limits=DIRECTORY_LIMITS) as decoder:
            for path, readable in _walk(self.folder):
                if not readable or path.name.upper() != "DICOMDIR":
                    continue
                found = True
                try:
                    for image in listed_images(path, decoder):
                        yield Row(image or path, problem="" if image else "DICOMDIR names a file outside of its folder")
                except DataError as reason:
                    yield Row(path, problem=str(reason))
        if not found:
            raise DataError(f"{self.folder}: no file named DICOMDIR in it or beneath")


def _walk(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Regular files beneath ``folder`` with True, folders that cannot be opened with False; in order of their names."""
    refused: list[Path] = []
    for here, folders, names in os.walk(folder, onerror=lambda error: refused.append(Path(error.filename))):
        folders.sort()
        for name in sorted(names):
            path = Path(here, name)
            if path.is_file() and not path.is_symlink():
                yield path, True
    yield from ((path, False) for path in refused)


# From the settings of an index to its images. A network source (DICOMweb, DIMSE) is one more entry.
SOURCES: Mapping[str, Callable[[FolderIndex], Source]] = {
    "folder": FolderSource,
    "table": TableSource,
    "dicomdir": DicomdirSource,
}


def open_source(index: FolderIndex) -> Source:
    """The source that ``index`` asks for: by name, else ``table`` where it has tables of labels, else ``folder``.

    Raises:
        ConfigError: an unknown name, or tables of labels for a source that reads none.
    """
    name = index.source or ("table" if index.labels else "folder")
    if name not in SOURCES:
        raise ConfigError(f"source: {name!r} is not one of {', '.join(SOURCES)}")
    if (name == "table") != bool(index.labels):
        raise ConfigError(
            "source: `table` needs tables under `labels`"
            if name == "table"
            else f"labels: the source {name!r} reads no tables; leave `labels` out, or name the source `table`"
        )
    return SOURCES[name](index)
