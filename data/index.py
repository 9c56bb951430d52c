"""A folder of DICOM, PNG or JPEG files, and a table of labels if there is one → the site's manifest."""

import os
import re
import shutil
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from clinifed.config import SEPARATOR, FolderIndex
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
from clinifed.files import OWNER_ONLY, canonical_json, write_atomic

__all__ = ["IndexReport", "index_folder", "patient_pseudonym"]

_PICTURES = (".png", ".jpg", ".jpeg")
_OPAQUE = re.compile(r"^[0-9a-f]{20}\.(dcm|png|jpe?g)$")
_FIELDS = ("image", "patient", "specialty", "label", "caption", "split")
# A key that several people share would make them one patient, and one person several; so it is refused.
_NOBODY = re.compile(r"^(ANON.*|UNKNOWN|NONE|NULL|N/?A|TEST|PATIENT|0+|X+|-+|\?+)$")
# DICOM's separator of values and its wildcards (PS3.5 6.2, PS3.4 C.2.2.2.4), and how a list of values looks as text.
_SEVERAL = re.compile(r"[\\*?]|^\[.*\]$")


@dataclass
class IndexReport:
    """What became of the files."""

    manifest: Manifest | None = None
    images: int = 0
    patients: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # reason → files; reasons name nobody
    left_out: list[tuple[Path, str]] = field(default_factory=list)  # which file, and why; stays at the site

    def leave_out(self, path: Path, reason: str) -> None:
        """Count ``path``, and note it."""
        self.skipped[reason] += 1
        self.left_out.append((path, reason))


@dataclass(frozen=True)
class _Row:
    """One image as the folder or the table has it, fields already under our names."""

    path: Path
    values: Mapping[str, str]


@dataclass(frozen=True)
class _Person:
    """Whose an image is, normalised."""

    issuer: str  # empty where nobody says which assigning authority the number is of
    number: str


def index_folder(
    index: FolderIndex, out: Path, specialties: Sequence[str], data_class: DataClass, *, overwrite: bool = False
) -> IndexReport:
    """Write the manifest ``out`` of ``index.folder``, with opaque links to the images in ``images/`` beside it.

    A patient is (IssuerOfPatientID, PatientID) of the DICOM header, normalised; for PNG and JPEG it is the table's
    patient column. ``index.issuer`` stands in for an issuer that is not given. Files without a clear patient, of
    another specialty, or unreadable are left out, counted, and listed in ``quarantine.jsonl`` beside the manifest:
    owner-only, for the data steward, written anew each time, never sent.

    Guarantees:
        - Whether an image counts, and for whom, depends on its own row and header alone; where it cannot, because
          rows contradict each other about who is who, nothing is indexed.

    Args:
        specialties: those of the site; with a single one, the table needs no column for it.

    Raises:
        DataError: ``out`` exists, the table cannot be used, patients cannot be told apart, or nothing usable is left
            (with the counts).
    """
    if out.exists() and not overwrite:
        raise DataError(f"{out} exists; choose another path, or say --overwrite")
    if not index.folder.is_dir():
        raise DataError(f"{index.folder}: no such folder")
    out.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = site_key(out.parent)
    report = IndexReport()
    rows = list(_table_rows(index) if index.labels else _folder_rows(index.folder))
    found: list[tuple[Record, _Person, Path]] = []
    for row in rows:
        try:
            found.append((*_record(row, index, specialties, key), row.path))
        except DataError as reason:
            report.leave_out(row.path, str(reason))
        except (OSError, ValueError):  # a name that no file can have, or a file that may not be opened
            report.leave_out(row.path, "file cannot be opened")
    contradictions = _contradictions(found)
    records: dict[str, tuple[Record, Path]] = {}
    for record, _, path in found:
        if why := contradictions.get(record.image):
            report.leave_out(path, why)
        elif record.image in records:
            report.leave_out(path, "listed twice")
        else:
            records[record.image] = (record, path)
    quarantine = out.with_name("quarantine.jsonl")
    lines = [canonical_json({"path": str(path), "reason": reason}) + b"\n" for path, reason in report.left_out]
    write_atomic(quarantine, b"".join(lines), OWNER_ONLY)
    if contradictions:
        raise DataError(
            *(
                f"{index.folder}: {count} image{'s' * (count > 1)}: {why}; {_REMEDY[why]}; see {quarantine}"
                for why, count in Counter(contradictions.values()).items()
            )
        )
    if not records:
        counts = ", ".join(f"{count} × {reason}" for reason, count in report.skipped.items()) or "it holds no images"
        raise DataError(f"{index.folder}: no usable image: {counts}")
    _link(out.parent / "images", {Path(name).name: path for name, (_, path) in records.items()})
    written = write_manifest(out, [record for record, _ in records.values()], data_class)
    report.manifest = written
    report.images, report.patients = len(written.records), len({r.patient for r in written.records})
    return report


_TWO_PATIENTS = "listed for two patients"
_TWO_SPELLINGS = "patient's number also occurs with an issuer, or without"
_REMEDY = {
    _TWO_PATIENTS: "correct the table of labels: any choice would let one patient change another",
    _TWO_SPELLINGS: (
        "say whose the numbers without IssuerOfPatientID are (--issuer, or `issuer` of the index): guessing would "
        "make one patient two, or two one"
    ),
}


def _contradictions(found: Sequence[tuple[Record, _Person, Path]]) -> dict[str, str]:
    """Image → why who it is of cannot be decided from its own row."""
    issuers: dict[str, set[bool]] = defaultdict(set)  # number → does it have an issuer?
    owners: dict[str, set[str]] = defaultdict(set)  # image → patients
    for record, person, _ in found:
        issuers[person.number].add(bool(person.issuer))
        owners[record.image].add(record.patient)
    unclear = {record.image: _TWO_SPELLINGS for record, person, _ in found if len(issuers[person.number]) > 1}
    return unclear | {image: _TWO_PATIENTS for image, patients in owners.items() if len(patients) > 1}


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


def _record(row: _Row, index: FolderIndex, specialties: Sequence[str], key: bytes) -> tuple[Record, _Person]:
    """The record of one image, and whose it is. Raises DataError with a reason that may be counted and shown."""
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
        label = _label(label, index.values[specialty])
    dicom = is_dicom(path)
    person = _person(*(identity(path) if dicom else ("", values.get("patient", ""))), index.issuer)
    listed = _normal(values.get("patient", ""))
    if dicom and listed and listed != person.number:
        raise DataError("table and header name different patients")
    patient = patient_pseudonym(key, person.issuer, person.number)
    split = index.split or values.get("split") or split_of(key, patient, index.holdout)
    if split not in SPLITS:
        raise DataError("unknown split")
    suffix = ".dcm" if dicom else path.suffix.lower()
    name = f"images/{pseudonym(key, 'image', str(path.resolve()))}{suffix}"
    return Record(name, patient, specialty, label, values.get("caption", ""), split), person


def _label(text: str, meaning: Mapping[str, str]) -> str:
    """What ``text`` of a table means; of several values joined by ``|``, each one's meaning, none twice."""
    parts = [text] if text in meaning else text.split(SEPARATOR)
    if not all(part in meaning for part in parts):
        raise DataError("label has no meaning in `values`")
    return SEPARATOR.join(dict.fromkeys(meaning[part] for part in parts if meaning[part]))


def _person(issuer: str, number: str, default_issuer: str) -> _Person:
    """Who (IssuerOfPatientID, PatientID) is. Raises DataError where that is nobody, or may be several."""
    person = _Person(_normal(issuer) or _normal(default_issuer), _normal(number))
    if not person.number:
        raise DataError("patient is blank")
    if _NOBODY.match(person.number):
        raise DataError("patient is anonymous or a placeholder")
    # Control characters are blanks to `_normal`, and invisible ones would make two patients of one.
    unseen = any(unicodedata.category(c) in ("Cc", "Cf") for c in issuer + number)
    if unseen or any(_SEVERAL.search(text) for text in (person.issuer, person.number)):
        raise DataError("patient is ambiguous")
    return person


def patient_pseudonym(key: bytes, issuer: str, number: str) -> str:
    """The manifest's name for the patient of (IssuerOfPatientID, PatientID), however they are spelt.

    Args:
        key: the site's.
        issuer: for records without one the ``issuer`` that they were indexed with.
    """
    return pseudonym(key, "patient", _normal(issuer), _normal(number))


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
