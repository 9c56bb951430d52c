"""Nothing that may be shared holds a planted identity: files, names, console and reports, searched byte by byte."""

import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:(Invalid value|The value length):UserWarning")]
REAL = Path(__file__).parents[2].parent / "shared/data/open"
NAMES = (("Müller", "Zoë", "ISO_IR 192"), ("Søndergård", "Inés", "ISO_IR 100"), ("O'Halloran", "Amara", "ISO_IR 6"))


def forms(term: str) -> Iterator[str]:
    """The ways in which one identifier may be written."""
    yield term
    yield term.replace(" ", "^")
    yield term.replace(" ", "")
    if len(term) == 8 and term.isdigit():
        year, month, day = term[:4], term[4:6], term[6:]
        for glue in "-./ ":
            yield glue.join((year, month, day))
            yield glue.join((day, month, year))
            yield glue.join((month, day, year))


def needles(terms: list[str]) -> set[bytes]:
    found = set()
    for term in terms:
        for form in forms(term):
            for case in (form, form.lower(), form.upper(), form.title()):
                for encoding in ("utf-8", "latin-1", "utf-16-le", "utf-16-be"):
                    found.add(case.encode(encoding, "ignore"))
    return {needle for needle in found if len(needle) > 3}


def leaks(terms: list[str], places: dict[str, bytes]) -> list[str]:
    wanted = needles(terms) | {needle.lower() for needle in needles(terms)}
    hits = []
    for place, content in places.items():
        lower = content.lower()
        hits += [f"{place}: {needle!r}" for needle in wanted if needle in content or needle in lower]
    return hits


def what_may_be_shared(clinifed: Callable, folder: Path, work: Path) -> dict[str, bytes]:
    """All that two verbs write or say about ``folder``, but for what stays at the site: quarantine, links, key."""
    site, out = work / "site", work / "shared"
    table = ["--specialties", "radiology", "--issuer", "HOME"]
    runs = {
        "index": clinifed("data", "index", folder, "--out", site / "manifest.csv", *table, "--verbose"),
        "deidentify": clinifed(
            *("data", "deidentify", folder, "--out", out, "--key", site / "site.key", "--issuer", "HOME"),
            *("--option", "clean-descriptors", "--option", "retain-modified-dates", "--verbose", "--json"),
        ),
        "basic": clinifed("data", "deidentify", folder, "--out", work / "basic", "--basic", "--verbose"),
    }
    for name, run in runs.items():
        assert run.code == 0, f"{name}: {run.err}"
    places = {f"console of {name}": (run.out + run.err).encode() for name, run in runs.items()}
    shared = [*out.iterdir(), *(work / "basic").iterdir(), *work.glob("*.report.jsonl"), *site.glob("manifest.*")]
    for path in shared:
        places[str(path.relative_to(work))] = path.read_bytes()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    places["names"] = "\n".join(str(p.relative_to(work)) for p in (*shared, *(site / "images").iterdir())).encode()
    for path in (*work.glob("*.quarantine.jsonl"), site / "quarantine.jsonl", site / "site.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600  # these stay
    return places


def plant(path: Path, number: int) -> list[str]:
    """A file with one identity in all the places where such things are found; what to search for."""
    family, given, charset = NAMES[number]
    patient, accession, born, phone = (
        f"73190{number}55",
        f"ACC5519{number}77",
        f"193{number}0817",
        f"+44 7700 900{number}11",
    )
    note = f"Pt {given} {family} (b. {born}) {phone} {accession}"
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = (ExplicitVRLittleEndian, ImplicitVRLittleEndian)[number % 2]
    ds.file_meta.SourceApplicationEntityTitle = patient
    ds.SpecificCharacterSet = charset
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, generate_uid(entropy_srcs=[f"sop {number}"])
    ds.StudyInstanceUID, ds.SeriesInstanceUID = f"{patient} / {born}", f"1.2.840.{patient}.{born}"
    ds.Modality, ds.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = f"{family}^{given}", patient, born
    ds.AccessionNumber, ds.StudyID, ds.StudyDate = accession, patient, "20170422"
    ds.ReferringPhysicianName = ds.OperatorsName = f"{family}^Dr"
    ds.InstitutionName, ds.PatientAddress, ds.PatientTelephoneNumbers = "St Brigid General", "167 Larkspur Lane", phone
    ds.StudyDescription, ds.SeriesDescription = f"CHEST {family} follow-up", f"Thorax_{given}"
    ds.ImageComments = ds.PatientComments = ds.AdditionalPatientHistory = note
    ds.ProtocolName, ds.StationName, ds.Manufacturer = f"{family} protocol", patient, f"built for {given}"
    ds.BodyPartExamined = "LARKSPUR"
    ds.ContentLabel, ds.SoftwareVersions = given[:3].upper(), ["v1", f"{family}"]
    inner, outer = Dataset(), Dataset()
    inner.PatientID, inner.PersonName, inner.TextValue, inner.DateTime = patient, ds.PatientName, note, f"{born}120000"
    inner.private_block(0x0011, family, create=True).add_new(1, "UT", note)
    outer.RequestedProcedureDescription, outer.ContentSequence = note, Sequence([inner])
    outer.AnatomicRegionSequence = Sequence([inner])
    ds.RequestAttributesSequence = ds.OtherPatientIDsSequence = ds.AnatomicRegionSequence = Sequence([outer])
    ds.private_block(0x0011, family, create=True).add_new(1, "LO", f"{family}^{given}")
    ds.add_new(0x60003000, "OW", note.encode("utf-8") + bytes(len(note.encode()) % 2))
    ds.add_new(0x60004000, "LT", note)
    ds.DataSetTrailingPadding = note.encode("utf-16-le")
    picture = (np.hypot(*np.mgrid[-32:32, -32:32]) * 40 + number).astype(np.uint16)
    ds.set_pixel_data(picture, "MONOCHROME2", 12)
    ds.preamble = f"{family}^{given}".encode().ljust(128, b"\0")
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return [family, given, patient, born, accession, phone, "St Brigid", "Larkspur"]


def test_a_planted_identity_is_in_nothing_that_may_be_shared(clinifed, tmp_path):
    folder, terms = tmp_path / "in", []
    for number, (family, given, _) in enumerate(NAMES):
        terms += plant(folder / f"{family} {given}" / f"{family}.dcm", number)
    whole = next(folder.rglob("*.dcm")).read_bytes()
    (folder / "Søndergård-torn.dcm").write_bytes(whole[: len(whole) // 2])
    (folder / "Müller.txt").write_text("Zoë Müller 73190055")
    before = {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert leaks(terms, before), "the search finds what was planted"
    places = what_may_be_shared(clinifed, folder, tmp_path)
    assert len(list((tmp_path / "shared").iterdir())) == len(list((tmp_path / "basic").iterdir())) == len(NAMES)
    assert leaks(terms, places) == []


@pytest.mark.realdata
def test_the_planted_identities_of_the_real_files_are_in_nothing_that_may_be_shared(clinifed, tmp_path):
    if not REAL.is_dir():
        pytest.skip("the folder of real images is not beside the project")
    truth = json.loads((REAL / "dicom_phi/truth.json").read_text())
    terms = sorted({term for entry in truth for term in entry["search_terms"]})
    physicians = {
        part for e in truth for part in e["planted"]["ReferringPhysicianName"].split("^")[:1] if len(part) > 3
    }
    before = {path.name: path.read_bytes() for path in (REAL / "dicom_phi").glob("*.dcm")}
    for entry in truth:
        assert leaks(entry["search_terms"], {entry["file"]: before[entry["file"]]})
    places = what_may_be_shared(clinifed, REAL / "dicom_phi", tmp_path)
    assert leaks([*terms, *physicians], places) == []
    # Those with letters in their pixels stay behind, whatever their headers say; the others are all there.
    without = [entry["file"] for entry in truth if not entry["pixel_text"]]
    assert len(list((tmp_path / "shared").iterdir())) == len(without)
    left = [json.loads(line)["path"] for line in (tmp_path / "shared.quarantine.jsonl").read_text().splitlines()]
    lettered = {entry["file"] for entry in truth if entry["pixel_text"]}
    assert lettered <= {Path(path).name for path in left}
