"""A folder of DICOM images → a folder that may be shared, by DICOM PS3.15 Annex E; what is in doubt stays behind."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from pydicom import dcmread, dcmwrite
from pydicom.charset import python_encoding
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filereader import read_file_meta_info
from pydicom.multival import MultiValue
from pydicom.uid import (
    PYDICOM_IMPLEMENTATION_UID,
    UID,
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from clinifed.data.burned_in import SEEN, SUSPICIONS, has_text, suspicion
from clinifed.data.deid_dataset import Patient, protect
from clinifed.data.deid_pixels import bare_pixels, frames
from clinifed.data.deid_process import Deidentifier
from clinifed.data.deid_review import content_of, read_reviewed
from clinifed.data.deid_table import EDITION, Profile, image_classes
from clinifed.data.deid_values import shift_days
from clinifed.data.dicom import is_dicom
from clinifed.data.fingerprint import Header
from clinifed.data.index import _person, patient_pseudonym
from clinifed.data.manifest import pseudonym, site_key
from clinifed.errors import DataError
from clinifed.files import OWNER_ONLY, canonical_json, write_atomic

__all__ = ["DEFAULT_OPTIONS", "Deidentified", "DeidentifyReport", "deidentify_file", "deidentify_folder", "read_key"]

DEFAULT_OPTIONS = ("retain-modified-dates",)
_MAX_FILE_BYTES = 256 << 20
_KEY_BYTES = 32


@dataclass(frozen=True)
class Deidentified:
    """One de-identified image."""

    name: str  # opaque, by the site's key
    content: bytes  # a DICOM file
    sop_class: str  # UID, one of those that are listed
    done: Counter[str]  # what was done → attributes


@dataclass
class DeidentifyReport:
    """What became of the files. ``left_out`` has paths, which may name patients: it stays at the site."""

    options: tuple[str, ...]
    written: int = 0
    unchanged: int = 0  # were there already, byte by byte
    skipped: Counter[str] = field(default_factory=Counter)  # reason → files; reasons name nobody
    left_out: list[tuple[Path, str]] = field(default_factory=list)
    reviewed: Counter[str] = field(default_factory=Counter)  # suspicion → files released since somebody looked at them

    def to_dict(self) -> dict[str, object]:
        """Counts and settings; names nobody."""
        return {
            "standard": f"DICOM PS3.15 {EDITION} Annex E",
            "options": list(self.options),
            "written": self.written,
            "unchanged": self.unchanged,
            "left_out": dict(sorted(self.skipped.items())),
            "reviewed": dict(sorted(self.reviewed.items())),
        }


def read_key(path: Path) -> bytes:
    """The site's key, 32 bytes, as ``clinifed data index`` made it.

    Raises:
        DataError: there is none, or it is not one.
    """
    try:
        key = path.read_bytes()
    except OSError:
        raise DataError(f"{path}: no such key; `clinifed data index` makes one, site.key beside the manifest") from None
    if len(key) != _KEY_BYTES:
        raise DataError(f"{path}: not a site's key, which is {_KEY_BYTES} bytes")
    return key


def deidentify_folder(
    folder: Path,
    out: Path,
    options: Sequence[str] = DEFAULT_OPTIONS,
    *,
    key: Path | None = None,
    issuer: str = "",
    reviewed: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> DeidentifyReport:
    """De-identify every DICOM image beneath ``folder`` into ``out``, and say what became of the rest.

    Beside ``out``, which may be shared, two files stay at the site, owner-only and written anew each time:
    ``<out>.quarantine.jsonl``, which file was left out and why, with its path; and ``<out>.report.jsonl``, one line for
    each file written and a last one with the counts, which names nobody.

    Guarantees:
        - Files in ``out`` have opaque names, are owner-only, whole or absent, and none that exists is overwritten.
        - With the same key, options and version of clinifed, the same file gives the same bytes, in any order.
        - Patients carry the pseudonyms that a manifest made with the same key and issuer gives them.
        - A file that cannot be read, checked or protected is left out; reasons hold no text of any file.
        - Files are read in a process of its own; one that crashes it, hangs or fills its memory is left out.
        - Where text is suspected in a picture, it leaves only by its hash in ``reviewed``, and the report says so.

    Args:
        options: of ``clinifed.data.deid_table.OPTIONS``; none is the Basic Profile alone.
        key: the site's; by default ``site.key`` beside ``out``, made where there is none.
        issuer: whose PatientIDs those without an IssuerOfPatientID are, as for ``clinifed data index``.
        reviewed: list of files in the quarantine whose pictures a person looked at and releases; see
            :func:`clinifed.data.deid_review.read_reviewed`. It has to be given each time.

    Raises:
        DataError: a folder or the key cannot be used, or an option is refused, or a
            file is released that is not in quarantine; nothing was written.
    """
    profile = Profile(options)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    inner, outer = out.resolve(), folder.resolve()
    if inner == outer or inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise DataError(f"{out}: the de-identified files need a folder apart from {folder}")
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is not a folder")
    secret = None if key is None else read_key(key)
    quarantine = out.with_name(f"{out.name}.quarantine.jsonl")
    released = {} if reviewed is None else read_reviewed(reviewed, quarantine)
    out.mkdir(parents=True, exist_ok=True, mode=0o700)
    secret = site_key(out.parent) if secret is None else secret
    report = DeidentifyReport(profile.options)
    lines: list[bytes] = []
    kept_back: list[dict[str, object]] = []
    with Deidentifier(profile.options, secret, issuer) as process:
        for path in _files(folder):
            digest = content_of(path) if released else None
            waived = released.get(digest or "")
            try:
                name, content, sop_class, done = process.file(path, reviewed=waived is not None)
                if waived is not None and content_of(path) != digest:
                    raise DataError("changed while it was read")  # it may not be what was looked at
                new = _write(out / name, content)
            except DataError as reason:
                report.skipped[str(reason)] += 1
                report.left_out.append((path, str(reason)))
                suspect = {"sha256": content_of(path)} if str(reason) in SUSPICIONS else {}
                kept_back.append({"path": str(path), "reason": str(reason), **suspect})
                continue
            report.written += new
            report.unchanged += not new
            line = {"file": name, "sop_class": UID(sop_class).name, "attributes": done}
            if waived is not None:
                report.reviewed[waived] += 1
                line["reviewed"] = waived
                # It stays on the list, so that the same review holds for the next run.
                kept_back.append({"path": str(path), "reason": waived, "sha256": digest, "reviewed": True})
            lines.append(canonical_json(line) + b"\n")
            if len(lines) % 100 == 0:
                progress(f"{len(lines)} images de-identified")
    write_atomic(quarantine, b"".join(canonical_json(entry) + b"\n" for entry in kept_back), OWNER_ONLY)
    lines.append(canonical_json(report.to_dict()) + b"\n")
    write_atomic(out.with_name(f"{out.name}.report.jsonl"), b"".join(lines), OWNER_ONLY)
    return report


def _files(folder: Path) -> Iterator[Path]:
    """Every regular file beneath ``folder``, sorted; links are not followed."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(root, name)
            if path.is_file() and not path.is_symlink():
                yield path


def _write(path: Path, content: bytes) -> bool:
    """Write a file that is not there yet; whether it was written. One of the same content is left as it is."""
    if path.is_symlink() or path.exists():
        if path.is_file() and path.read_bytes() == content:
            return False
        raise DataError("another file of this SOP Instance UID is there")
    write_atomic(path, content, OWNER_ONLY)
    return True


def deidentify_file(
    path: Path, profile: Profile, key: bytes, *, issuer: str = "", reviewed: bool = False
) -> Deidentified:
    """One file, de-identified in this process.

    Args:
        key: the site's.
        issuer: as for :func:`deidentify_folder`.
        reviewed: a person has looked at the picture: no text is suspected in it any more.

    Raises:
        DataError: it must stay behind; the text is a reason of a few words that holds nothing of the file.
    """
    if not is_dicom(path):
        raise DataError("not DICOM")
    with _reasons("damaged header"):
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise DataError(f"larger than {_MAX_FILE_BYTES >> 20} MiB")
        if read_file_meta_info(path).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            raise DataError("deflated data sets are not de-identified")  # a small file may inflate to any size
        ds = dcmread(path)
        sop_class, sop_instance, patient = _checked(ds, key, issuer)
    with _reasons("header cannot be judged"):
        if not reviewed and (why := suspicion(ds)):
            raise DataError(why)
    with _reasons("pixel data cannot be decoded"):
        bare_pixels(ds)
        if not reviewed and any(has_text(frame) for frame in frames(ds)):
            raise DataError(SEEN)
    with _reasons("header cannot be protected"):
        done = protect(ds, profile, key, patient)
    with _reasons("de-identified file cannot be written"):
        content = _encoded(ds, sop_class)
    name = f"{pseudonym(key, 'deidentified', sop_instance)}.dcm"
    return Deidentified(name, content, sop_class, done)


@contextmanager
def _reasons(reason: str) -> Iterator[None]:
    """Replace whatever goes wrong inside, and its text, by ``reason``; silence warnings, which quote values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
            return
        except DataError:
            raise
        except (RecursionError, MemoryError):
            found = "nested too deeply or too large"
        except Exception:  # pydicom and its decoders raise about every kind
            found = reason
    raise DataError(found) from None  # the original quotes the file


def _checked(ds: Dataset, key: bytes, issuer: str) -> tuple[str, str, Patient]:
    """SOP class, SOP instance and patient of a file that this profile may be applied to."""
    syntax = ds.file_meta.get("TransferSyntaxUID")
    if not syntax or UID(syntax).is_private or UID(syntax).name == str(syntax):
        raise DataError("no transfer syntax that the standard knows")
    sop_class, sop_instance = str(ds.get("SOPClassUID") or ""), str(ds.get("SOPInstanceUID") or "")
    if sop_class not in image_classes():
        raise DataError("not an image of a known SOP class")  # reports, documents, plans, presentation states
    if not sop_instance:
        raise DataError("no SOP Instance UID")
    for name in _character_sets(ds):
        if name not in python_encoding:
            raise DataError("unknown character set")
    number = ds.get("PatientID")
    owner = ds.get("IssuerOfPatientID")
    if isinstance(number, MultiValue) or isinstance(owner, MultiValue):
        raise DataError("patient is ambiguous")
    person = _person(Header(issuer=str(owner or ""), patient=str(number or "")), issuer)
    name = patient_pseudonym(key, person.issuer, person.number)
    return sop_class, sop_instance, Patient(name, shift_days(key, name))


def _character_sets(ds: Dataset) -> list[str]:
    """Specific Character Set (0008,0005), its values; one that is empty is the default repertoire."""
    value = ds.get("SpecificCharacterSet")
    return [str(name) for name in (value if isinstance(value, MultiValue) else [value]) if name]


def _encoded(ds: Dataset, sop_class: str) -> bytes:
    """A DICOM file of ``ds``: an empty preamble, file meta information of our own, nothing behind the data set."""
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\x00\x01"
    meta.MediaStorageSOPClassUID = UID(sop_class)
    meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    syntax = ds.file_meta.TransferSyntaxUID
    meta.TransferSyntaxUID = syntax
    meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
    meta.ImplementationVersionName = "CLINIFED"
    ds.file_meta = meta
    ds.preamble = bytes(128)
    buffer = BytesIO()
    dcmwrite(
        buffer,
        ds,
        implicit_vr=syntax == ImplicitVRLittleEndian,
        little_endian=syntax.is_little_endian,
        enforce_file_format=True,
    )
    return buffer.getvalue()
