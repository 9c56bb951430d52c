"""The manifest of one site: which image belongs to which patient. It is local, owner-only, and names nobody."""

import hmac
import io
import json
import math
import os
import re
import secrets
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Literal, cast

import pandas as pd

from clinifed.errors import DataError
from clinifed.files import OWNER_ONLY, canonical_json, file_sha256, sha256_of, write_atomic, write_json

__all__ = [
    "SPLITS",
    "Manifest",
    "Record",
    "changed_images",
    "content_sha256",
    "pseudonym",
    "read_manifest",
    "site_key",
    "split_of",
    "without_patients",
    "write_manifest",
]

SPLITS = ("train", "holdout")
DataClass = Literal["hospital", "public", "synthetic"]
_CLASSES = ("hospital", "public", "synthetic")
_SCHEMA_VERSION = 3  # of the meta file; 2 knew no series, 1 no hashes of images either, and both are read
_LATER = ("sha256", "series", "position")  # columns that manifests of earlier schemas lack
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIGITS = 20  # hexadecimal, 80 bits: no two of a billion patients meet by chance
_SHOWN = 5  # examples in one message


@dataclass(frozen=True)
class Record:
    """One image."""

    image: str  # path relative to the manifest, opaque
    patient: str  # keyed pseudonym
    specialty: str
    label: str  # one of the specialty's labels, several joined by "|" where any number may hold, or empty
    caption: str
    split: str  # one of SPLITS
    sha256: str = ""  # of the image file; empty where nobody hashed it, as in manifests of schema 1
    series: str = ""  # of a slice: keyed pseudonym of its series and plane; see clinifed.data.series
    position: str = ""  # of a slice: where in its series, a number


COLUMNS = tuple(field.name for field in fields(Record))


@dataclass(frozen=True)
class Manifest:
    """All images of one site, or of one public set."""

    path: Path
    records: tuple[Record, ...]
    data_class: DataClass
    sha256: str  # of the CSV file
    content_sha256: str | None = None  # see content_sha256(); None where an image has no hash

    @property
    def folder(self) -> Path:
        """What image paths are relative to."""
        return self.path.parent


def site_key(folder: Path) -> bytes:
    """The site's secret (32 bytes) for pseudonyms, in ``folder/site.key``; made where there is none."""
    path = folder / "site.key"
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, OWNER_ONLY)
    except FileExistsError:
        return path.read_bytes()
    with os.fdopen(handle, "wb") as file:
        key = secrets.token_bytes(32)
        file.write(key)
    return key


def pseudonym(key: bytes, *parts: str) -> str:
    """HMAC-SHA256 of ``parts`` under the site's key, 20 hexadecimal digits: stable there, meaningless elsewhere."""
    text = "\x1f".join(f"{len(part)}:{part}" for part in parts)
    return hmac.new(key, text.encode(), sha256).hexdigest()[:_DIGITS]


def split_of(key: bytes, patient: str, holdout: float) -> str:
    """``holdout`` for that share of patients, by the patient alone, so that new patients move nobody."""
    return "holdout" if int(pseudonym(key, "split", patient), 16) < holdout * 16.0**_DIGITS else "train"


def content_sha256(records: Sequence[Record]) -> str | None:
    """Which data this is: SHA-256 over (image's SHA-256, patient, specialty, label, split) of all records.

    Neither the order of rows, nor captions, nor where files lie change it. It proves nothing to those who lack the
    site's key: patients are keyed pseudonyms.

    Returns:
        Hexadecimal; None where an image has no hash.
    """
    if not all(record.sha256 for record in records):
        return None
    return sha256_of(canonical_json(sorted([r.sha256, r.patient, r.specialty, r.label, r.split] for r in records)))


def changed_images(manifest: Manifest, contents: Mapping[str, str | None] | None = None) -> tuple[Record, ...]:
    """The images whose file is gone, or is not the one that was indexed; those without a hash only if they are gone.

    Args:
        contents: image → SHA-256 of its file, None where it cannot be read, for a caller who has read them all.
    """

    def holds(record: Record) -> bool:
        path = manifest.folder / record.image
        if contents is not None:
            found = contents[record.image]
            return found is not None and record.sha256 in ("", found)
        try:
            return file_sha256(path) == record.sha256 if record.sha256 else path.is_file()
        except OSError:
            return False

    return tuple(record for record in manifest.records if not holds(record))


def without_patients(manifest: Manifest, patients: Collection[str]) -> Manifest:
    """The same manifest without the images of ``patients``, for instance of those who withdrew consent.

    Raises:
        DataError: no image is left.
    """
    kept = tuple(record for record in manifest.records if record.patient not in patients)
    if len(kept) == len(manifest.records):
        return manifest
    if not kept:
        raise DataError(f"{manifest.path}: every patient withdrew; a site without images cannot take part")
    return replace(manifest, records=kept, content_sha256=content_sha256(kept))


def write_manifest(path: Path, records: Sequence[Record], data_class: DataClass) -> Manifest:
    """Write ``path`` and ``<stem>.meta.json`` beside it, owner-only; returns the manifest as read back.

    Raises:
        DataError: the records could not be read back; nothing was written.
    """
    if problems := _problems(records):
        raise DataError(*(f"{path}: not written: {problem}" for problem in problems))
    table = pd.DataFrame([astuple(record) for record in records], columns=list(COLUMNS))
    content = io.StringIO()
    table.to_csv(content, index=False)
    write_atomic(path, content.getvalue().encode(), OWNER_ONLY)
    meta = {
        "schema_version": _SCHEMA_VERSION,
        "data_class": data_class,
        "sha256": file_sha256(path),
        "content_sha256": content_sha256(records),
    }
    write_json(_meta(path), meta, OWNER_ONLY)
    return read_manifest(path)


def _meta(path: Path) -> Path:
    return path.with_suffix(".meta.json")


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest, of this schema or an earlier one.

    Raises:
        DataError: with every problem: a missing file or column, an empty table, a bad or repeated image path, a
            patient in two splits, a file that was changed since it was written.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such manifest; make one with `clinifed data index`")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a CSV table ({type(error).__name__})") from None
    if missing := [name for name in COLUMNS if name not in table.columns and name not in _LATER]:
        raise DataError(
            f"{path}: missing column{'s' * (len(missing) > 1)} {', '.join(missing)}; it has {', '.join(table.columns)}"
        )
    present = [name for name in COLUMNS if name in table.columns]
    rows = table[present].itertuples(index=False, name=None)
    records = tuple(Record(**dict(zip(present, row, strict=True))) for row in rows)
    content = content_sha256(records)
    data_class, problems = _read_meta(path, content)
    problems += _problems(records)
    if problems:
        raise DataError(*(f"{path}: {problem}" for problem in problems))
    return Manifest(path, records, data_class, file_sha256(path), content)


def _read_meta(path: Path, content: str | None) -> tuple[DataClass, list[str]]:
    """The data class, and what is wrong with the file beside the manifest. Without it, data is a hospital's."""
    meta_path = _meta(path)
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
        version, data_class, digest = meta["schema_version"], meta["data_class"], meta["sha256"]
        said = meta["content_sha256"] if version != 1 else None
    except (OSError, ValueError, KeyError, TypeError):
        return "hospital", [f"{meta_path.name} beside it is missing or damaged; run `clinifed data index` again"]
    problems = []
    if type(version) is not int or not 1 <= version <= _SCHEMA_VERSION:  # true is 1 to Python
        problems.append(
            f"{meta_path.name}: schema_version {version!r} is unknown here; run `clinifed data index` again"
        )
    if data_class not in _CLASSES:
        problems.append(f"{meta_path.name}: data_class {data_class!r} is not one of {', '.join(_CLASSES)}")
    if digest != file_sha256(path):
        problems.append("changed since it was written; run `clinifed data index` again")
    elif version != 1 and said != content:
        problems.append(f"{meta_path.name}: content_sha256 is of other records; run `clinifed data index` again")
    return cast(DataClass, data_class), problems


def _problems(records: Sequence[Record]) -> list[str]:
    """What is wrong with the rows."""
    if not records:
        return ["no images; a site without any cannot take part"]
    problems: dict[str, list[int]] = defaultdict(list)
    seen: set[str] = set()
    split: dict[str, str] = {}
    for row, record in enumerate(records, start=2):  # row 1 is the header
        inside = PurePosixPath(record.image)
        if not record.image or inside.is_absolute() or ".." in inside.parts:
            problems["image path is empty, absolute or leaves the folder"].append(row)
        if record.image in seen:
            problems["image is listed twice"].append(row)
        if not record.patient:
            problems["patient is blank"].append(row)
        if record.split not in SPLITS:
            problems[f"split is not one of {', '.join(SPLITS)}"].append(row)
        if record.sha256 and not _SHA256.fullmatch(record.sha256):
            problems["sha256 is none"].append(row)
        if bool(record.series) != bool(record.position) or not _finite(record.position or "0"):
            problems["position in its series is none"].append(row)
        if split.setdefault(record.patient, record.split) != record.split:
            problems["patient is in two splits"].append(row)
        seen.add(record.image)
    return [
        f"{what}: row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:_SHOWN]))}"
        + (f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")
        for what, rows in problems.items()
    ]


def _finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
