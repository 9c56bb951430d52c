"""A folder of DICOM, PNG or JPEG files, and a table of labels if there is one → the site's manifest."""

import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from clinifed.config import FolderIndex
from clinifed.data.dicom import identity, is_dicom
from clinifed.data.manifest import (
    SPLITS,
    DataClass,
    Manifest,
    Record,
    pseudonym,
    site_key,
    split_of,
    write_manifest,
)
from clinifed.errors import DataError

__all__ = ["IndexReport", "index_folder"]

_PICTURES = (".png", ".jpg", ".jpeg")
_OPAQUE = re.compile(r"^[0-9a-f]{20}\.(dcm|png|jpe?g)$")
_FIELDS = ("image", "patient", "specialty", "label", "caption", "split")
# A key that several people share would make them one patient, and one person several; so it is refused.
_NOBODY = re.compile(r"^(ANON.*|UNKNOWN|NONE|NULL|N/?A|TEST|PATIENT|0+|X+|-+|\?+)$")


@dataclass
class IndexReport:
    """What became of the files."""

    manifest: Manifest | None = None
    images: int = 0
    patients: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # reason → files; reasons name nobody


@dataclass(frozen=True)
class _Row:
    """One image as the folder or the table has it, fields already under our names."""

    path: Path
    values: Mapping[str, str]


def index_folder(
    index: FolderIndex, out: Path, specialties: Sequence[str], data_class: DataClass, *, overwrite: bool = False
) -> IndexReport:
    """Write the manifest ``out`` of ``index.folder``, with opaque links to the images in ``images/`` beside it.

    A patient is (IssuerOfPatientID, PatientID) of the DICOM header, normalised; for PNG and JPEG it is the table's
    patient column. Files without a clear patient, of another specialty, or unreadable are left out and counted.

    Args:
        specialties: those of the site; with a single one, the table needs no column for it.

    Raises:
        DataError: ``out`` exists, the table cannot be used, or nothing usable is left (with the counts).
    """
    if out.exists() and not overwrite:
        raise DataError(f"{out} exists; choose another path, or say --overwrite")
    if not index.folder.is_dir():
        raise DataError(f"{index.folder}: no such folder")
    out.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = site_key(out.parent)
    report = IndexReport()
    rows = list(_table_rows(index) if index.labels else _folder_rows(index.folder))
    records: dict[str, tuple[Record, Path]] = {}
    for row in rows:
        try:
            record = _record(row, index, specialties, key)
        except DataError as reason:
            report.skipped[str(reason)] += 1
            continue
        except (OSError, ValueError):  # a name that no file can have, or a file that may not be opened
            report.skipped["file cannot be opened"] += 1
            continue
        if record.image in records:
            report.skipped["listed twice"] += 1
            continue
        records[record.image] = (record, row.path)
    if not records:
        counts = ", ".join(f"{count} × {reason}" for reason, count in report.skipped.items()) or "it holds no images"
        raise DataError(f"{index.folder}: no usable image: {counts}")
    _link(out.parent / "images", {Path(name).name: path for name, (_, path) in records.items()})
    written = write_manifest(out, [record for record, _ in records.values()], data_class)
    report.manifest = written
    report.images, report.patients = len(written.records), len({r.patient for r in written.records})
    return report


def _folder_rows(folder: Path) -> Iterator[_Row]:
    """Every file beneath ``folder`` that says it is an image; links are not followed."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and (path.suffix.lower() in _PICTURES or is_dicom(path)):
            yield _Row(path, {})


def _table_rows(index: FolderIndex) -> Iterator[_Row]:
    """The rows of the label tables that ``where`` keeps; image paths count from each table's own folder."""
    columns = {name: index.columns.get(name, name) for name in _FIELDS}
    if unknown := sorted(set(index.columns) - set(_FIELDS)):
        raise DataError(f"columns: {', '.join(unknown)} is not one of {', '.join(_FIELDS)}")
    for table_path in index.labels:
        try:
            table = pd.read_csv(table_path, dtype=str, keep_default_na=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{table_path}: the table of labels cannot be read ({type(error).__name__})") from None
        needed = {columns["image"], *(columns[n] for n in index.columns), *index.where}
        if missing := sorted(needed - set(table.columns)):
            raise DataError(
                f"{table_path}: missing column {', '.join(missing)} among {len(table.columns)}; "
                "map it under `columns`, and see that the first row holds names"  # without them it holds a patient
            )
        for column, kept in index.where.items():
            table = table[table[column].isin(kept)]
        present = {name: column for name, column in columns.items() if column in table.columns}
        for row in table.to_dict("records"):
            values = {name: str(row[column]) for name, column in present.items()}
            yield _Row(table_path.parent / values["image"], values)


def _record(row: _Row, index: FolderIndex, specialties: Sequence[str], key: bytes) -> Record:
    """The record of one image. Raises DataError with a reason that may be counted and shown."""
    path, values = row.path, row.values
    if not path.resolve().is_relative_to(index.folder.resolve()):
        raise DataError("path leaves the folder")
    if not path.is_file():
        raise DataError("image missing")
    specialty = values.get("specialty", specialties[0] if len(specialties) == 1 else "")
    if specialty not in specialties:
        raise DataError("specialty is none of the site's")
    label = values.get("label", "")
    if specialty in index.values:
        if label not in index.values[specialty]:
            raise DataError("label has no meaning in `values`")
        label = index.values[specialty][label]
    dicom = is_dicom(path)
    issuer, number = identity(path) if dicom else ("", values.get("patient", ""))
    issuer, number = _normal(issuer), _normal(number)
    listed = _normal(values.get("patient", ""))
    if dicom and listed and listed != number:
        raise DataError("table and header name different patients")
    if not number:
        raise DataError("patient is blank")
    if _NOBODY.match(number):
        raise DataError("patient is anonymous or a placeholder")
    patient = pseudonym(key, "patient", issuer, number)
    split = index.split or values.get("split") or split_of(key, patient, index.holdout)
    if split not in SPLITS:
        raise DataError("unknown split")
    suffix = ".dcm" if dicom else path.suffix.lower()
    name = f"images/{pseudonym(key, 'image', str(path.resolve()))}{suffix}"
    return Record(name, patient, specialty, label, values.get("caption", ""), split)


def _normal(text: str) -> str:
    """One spelling of an identifier: compatibility characters, blanks and case do not make another patient."""
    return " ".join(unicodedata.normalize("NFKC", text).split()).upper()


def _link(folder: Path, targets: Mapping[str, Path]) -> None:
    """Make ``folder`` (owner-only) with one opaque link per image, whole or not at all."""
    # Folders named images are common: one that we did not make may hold the only copy of somebody's pictures.
    if folder.exists() and not all(p.is_symlink() and _OPAQUE.match(p.name) for p in folder.iterdir()):
        raise DataError(f"{folder} holds other files; write the manifest into another folder")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(mode=0o700)
    try:
        for name, path in targets.items():
            (temporary / name).symlink_to(path.resolve())
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
