"""A source of DICOM, PNG or JPEG files, and whatever says their labels → the site's manifest."""

import os
import re
import shutil
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from clinifed.config import SEPARATOR, FolderIndex
from clinifed.data.decoding import default_decoder
from clinifed.data.duplicates import REMEDY, Person, Sighting, contradictions, duplicates
from clinifed.data.fingerprint import Fingerprint, Header, image_suffix, picture_hashes
from clinifed.data.labels import Meanings, tag_of
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
from clinifed.data.sources import Row, Spool, open_source
from clinifed.errors import DataError
from clinifed.files import OWNER_ONLY, canonical_json, file_sha256, write_atomic

__all__ = ["IndexReport", "index_folder", "patient_pseudonym"]

_OPAQUE = re.compile(r"^[0-9a-f]{20}\.(dcm|png|jpe?g)$")
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

    def lines(self) -> bytes:
        """What was left out as JSON lines, for the quarantine."""
        return b"".join(canonical_json({"path": str(p), "reason": reason}) + b"\n" for p, reason in self.left_out)


def index_folder(
    index: FolderIndex, out: Path, specialties: Sequence[str], data_class: DataClass, *, overwrite: bool = False
) -> IndexReport:
    """Write the manifest ``out`` of what ``index`` names, with opaque links to the images in ``images/`` beside it.

    A patient is (IssuerOfPatientID, PatientID) of the DICOM header, normalised; for PNG and JPEG it is the table's
    patient column. ``index.issuer`` stands in for an issuer that is not given. Files without a clear patient, of
    another specialty, or unreadable are left out, counted, and listed in ``quarantine.jsonl`` beside the manifest:
    owner-only, for the data steward, written anew each time, never sent. Of the copies of one image one stays; see
    :mod:`clinifed.data.duplicates`. Beside it lies ``spool/``, where a source fetched files from elsewhere.

    Guarantees:
        - Whether an image counts, and for whom, depends on the rows and files of its own patient alone; where it
          cannot, because rows contradict each other about who is who, nothing is indexed.
        - No image, by its bytes, SOPInstanceUID or (with ``index.pixel_duplicates``) picture, counts for two patients.
        - The same files make the same records, from whatever source, under whatever names, in whatever order.

    Args:
        specialties: those of the site; with a single one, the table needs no column for it.

    Raises:
        ConfigError: a setting of ``index`` is wrong or contradicts another.
        DataError: ``out`` exists, the source cannot be read, patients or copies contradict each other, or nothing
            usable is left (with the counts).
    """
    if out.exists() and not overwrite:
        raise DataError(f"{out} exists; choose another path, or say --overwrite")
    if not index.folder.is_dir():
        raise DataError(f"{index.folder}: no such folder")
    source, reader = open_source(index), _Reader(index, specialties, out.parent)
    out.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    reader.key = site_key(out.parent)
    report = IndexReport()
    found: list[Sighting] = []
    for row in source.rows(reader.spool):
        try:
            found.append(reader.sighting(row))
        except DataError as reason:
            report.leave_out(row.path, str(reason))
        except (OSError, ValueError):  # a name that no file can have, or a file that may not be opened
            report.leave_out(row.path, "file cannot be opened")
    if index.pixel_duplicates:
        found = _with_pictures(found, report)
    unclear = contradictions(found)
    copies = {} if unclear else duplicates(found)
    for i, why in sorted((unclear or copies).items()):
        report.leave_out(found[i].path, why)
    kept = [seen for i, seen in enumerate(found) if i not in copies]
    quarantine = out.with_name("quarantine.jsonl")
    write_atomic(quarantine, report.lines(), OWNER_ONLY)
    if unclear:
        raise DataError(*_told(unclear, found, index.folder, quarantine))
    if not kept:
        counts = ", ".join(f"{count} × {reason}" for reason, count in report.skipped.items()) or "it holds no images"
        raise DataError(f"{index.folder}: no usable image: {counts}")
    _link(out.parent / "images", {Path(seen.record.image).name: seen.path for seen in kept})
    written = write_manifest(out, sorted((seen.record for seen in kept), key=lambda r: r.image), data_class)
    reader.spool.keep_only(seen.path for seen in kept)
    report.manifest = written
    report.images, report.patients = len(written.records), len({r.patient for r in written.records})
    return report


def _told(unclear: Mapping[int, str], found: Sequence[Sighting], folder: Path, quarantine: Path) -> Iterator[str]:
    """One line for each kind of contradiction: how many files, why, what to do, and where they are listed."""
    files: dict[str, set[Path]] = defaultdict(set)
    for i, why in unclear.items():
        files[why].add(found[i].path)
    for why, these in files.items():
        yield f"{folder}: {len(these)} image{'s' * (len(these) > 1)}: {why}; {REMEDY[why]}; see {quarantine}"


class _Reader:
    """From a row of a source to a record, by the settings of one index."""

    key: bytes

    def __init__(self, index: FolderIndex, specialties: Sequence[str], beside: Path) -> None:
        self.index, self.specialties = index, specialties
        self.meanings = Meanings(index)
        self.label_tag = None if index.label_tag is None else tag_of(index.label_tag)
        self.spool = Spool(beside / "spool")
        self.roots = (index.folder.resolve(), self.spool.folder.resolve())

    def sighting(self, row: Row) -> Sighting:
        """The record of one image, and whose it is. Raises DataError with a reason that may be counted and shown."""
        if row.problem:
            raise DataError(row.problem)
        path, values, index = row.path.resolve(), row.values, self.index
        if not any(path.is_relative_to(root) for root in self.roots):
            raise DataError("path leaves the folder")
        if not path.is_file():
            raise DataError("image missing")
        specialty = values.get("specialty", self.specialties[0] if len(self.specialties) == 1 else "")
        if specialty not in self.specialties:
            raise DataError("specialty is none of the site's")
        suffix = image_suffix(path)
        if not suffix:
            raise DataError("neither DICOM, PNG nor JPEG")
        header = Header(*default_decoder().origin(path, self.label_tag)) if suffix == ".dcm" else None
        person = _person(header or Header(patient=values.get("patient", "")), index.issuer)
        listed = _normal(values.get("patient", ""))
        if header and listed and listed != person.number:
            raise DataError("table and header name different patients")
        label = self._label(specialty, values.get("label", ""), header)
        patient = patient_pseudonym(self.key, person.issuer, person.number)
        split = index.split or values.get("split") or split_of(self.key, patient, index.holdout)
        if split not in SPLITS:
            raise DataError("unknown split")
        digest = file_sha256(path)
        name = f"images/{pseudonym(self.key, 'image', digest)}{suffix}"
        caption = values.get("caption", "")
        series = pseudonym(self.key, "series", header.series) if header and header.series else ""
        position = header.position if header else ""
        record = Record(name, patient, specialty, label, caption, split, digest, series, position)
        return Sighting(path, record, person, Fingerprint(digest, "", header.sop_instance_uid if header else ""))

    def _label(self, specialty: str, listed: str, header: Header | None) -> str:
        """What the table says, and the header where its tag was asked for; they must not contradict each other."""
        if self.label_tag is None:
            return self.meanings.of(specialty, listed)
        told = self.meanings.of_tag(specialty, header.label) if header and header.label else None
        if told is None:
            return self.meanings.of_tag(specialty, listed)
        if listed and set(self.meanings.of(specialty, listed).split(SEPARATOR)) != set(told.split(SEPARATOR)):
            raise DataError("table and header give different labels")
        return told


def _with_pictures(found: Sequence[Sighting], report: IndexReport) -> list[Sighting]:
    """The same rows with the hash of their picture; those without a picture are left out. Equal files are read once."""
    paths: dict[str, Path] = {}
    for seen in found:
        paths.setdefault(seen.prints.sha256, seen.path)
    pictures = dict(zip(paths, picture_hashes(list(paths.values())), strict=True))
    kept = []
    for seen in found:
        picture = pictures[seen.prints.sha256]
        if isinstance(picture, DataError):
            report.leave_out(seen.path, str(picture))
        else:
            kept.append(replace(seen, prints=replace(seen.prints, pixels=picture)))
    return kept


def _person(header: Header, default_issuer: str) -> Person:
    """Who (IssuerOfPatientID, PatientID) is. Raises DataError where that is nobody, or may be several."""
    person = Person(_normal(header.issuer) or _normal(default_issuer), _normal(header.patient))
    if not person.number:
        raise DataError("patient is blank")
    if _NOBODY.match(person.number):
        raise DataError("patient is anonymous or a placeholder")
    # Control characters are blanks to `_normal`, and invisible ones would make two patients of one.
    unseen = any(unicodedata.category(c) in ("Cc", "Cf") for c in header.issuer + header.patient)
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
