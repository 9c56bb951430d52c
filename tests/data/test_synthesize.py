"""Synthetic hospitals: valid DICOM, deterministic, disjoint, whole or absent."""

import csv
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest

from clinifed.config import Synthesize
from clinifed.data import synthesize as module
from clinifed.data.modalities import MODALITIES, Identity, dicom_object
from clinifed.data.phantoms import LABELS, SIZE_PX
from clinifed.data.synthesize import COLUMNS, PUBLIC, synthesize
from clinifed.errors import DataError

SITES = {"oak": ("radiology", "dermatology"), "pine": ("radiology", "cardiology"), "elm": ("emergency",)}
FOLDERS = (*SITES, "public/validation", "public/test")


def settings(**changes: object) -> Synthesize:
    small = {"seed": 1, "patients_per_specialty": 6, "public_patients_per_specialty": 6, "max_images": 3}
    return Synthesize(**{**small, **changes})


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Draws SITES under changed settings, once per change."""
    made: dict[str, Path] = {}

    def once(**changes: object) -> Path:
        key = repr(sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("synthetic") / "data"
            synthesize(settings(**changes), SITES, made[key])
        return made[key]

    return once


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def contents(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def headers(folder: Path) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(folder / row["image"], stop_before_pixels=True) for row in rows(folder)]


def test_same_seed_gives_identical_bytes(make, tmp_path):
    synthesize(settings(), SITES, tmp_path / "again")
    assert contents(make()) == contents(tmp_path / "again")


def test_another_seed_gives_other_patients(make):
    uids = [{ds.SOPInstanceUID for ds in headers(make(seed=s) / "oak")} for s in (1, 2)]
    assert not uids[0] & uids[1]


def test_every_file_is_listed_and_decodes(make):
    for name in FOLDERS:
        folder = make() / name
        listed = rows(folder)
        assert tuple(listed[0]) == COLUMNS
        assert {r["image"] for r in listed} == {
            p.relative_to(folder).as_posix() for p in (folder / "dicom").rglob("*.dcm")
        }
        for row in listed:
            ds = pydicom.dcmread(folder / row["image"])
            allowed = {m.sop_class: m for m in MODALITIES[row["specialty"]]}
            assert ds.SOPClassUID in allowed
            assert ds.Modality == allowed[ds.SOPClassUID].code
            assert ds.pixel_array.shape[:2] == (SIZE_PX, SIZE_PX)
            assert np.ptp(ds.pixel_array) > 0
            assert ds.pixel_array.max() < 2**ds.BitsStored
            assert ds.ImageComments == row["caption"]
            assert row["label"] in LABELS[row["specialty"]]
            assert Path(row["image"]).parts == ("dicom", ds.PatientID, f"{ds.SOPInstanceUID}.dcm")
            assert all(pydicom.uid.UID(u).is_valid for u in (ds.StudyInstanceUID, ds.SeriesInstanceUID))


def test_instance_uids_are_unique(make):
    everything = [ds.SOPInstanceUID for name in FOLDERS for ds in headers(make() / name)]
    assert len(everything) == len(set(everything)) > 50


@pytest.mark.parametrize("specialty", sorted(MODALITIES))
def test_every_modality_keeps_the_image(specialty, tmp_path):
    identity = Identity("p-1", "oak", "1.2.3", "1.2.4", "1.2.5", 1, "a line")
    for modality in MODALITIES[specialty]:
        shape = (SIZE_PX, SIZE_PX, 3) if modality.photometric == "RGB" else (SIZE_PX, SIZE_PX)
        image = np.random.default_rng(0).random(shape, np.float32)
        dicom_object(image, modality, identity).save_as(tmp_path / "x.dcm", enforce_file_format=True)
        ds = pydicom.dcmread(tmp_path / "x.dcm")
        seen = ds.pixel_array / (2**modality.bits - 1)
        if modality.photometric == "MONOCHROME1":
            seen = 1 - seen
        assert (ds.PhotometricInterpretation, ds.BitsStored) == (modality.photometric, modality.bits)
        assert np.abs(seen - image).max() <= 0.51 / (2**modality.bits - 1)
    assert {m.bits for kinds in MODALITIES.values() for m in kinds} == {8, 12, 16}


def test_public_sets_are_disjoint_from_the_hospitals_and_each_other(make):
    owners = defaultdict(set)
    for name in FOLDERS:
        for ds in headers(make() / name):
            owners[ds.IssuerOfPatientID, ds.PatientID].add(name)
    assert all(len(names) == 1 for names in owners.values())
    assert {name for names in owners.values() for name in names} == set(FOLDERS)


def test_public_sets_hold_every_label_alike(make):
    for which in ("validation", "test"):
        patients = {(r["specialty"], Path(r["image"]).parts[1]): r["label"] for r in rows(make() / PUBLIC / which)}
        counts = Counter((specialty, label) for (specialty, _), label in patients.items())
        assert set(counts) == {(s, label) for s in LABELS for label in LABELS[s]}
        assert all(count == 6 // len(LABELS[specialty]) for (specialty, _), count in counts.items())


@pytest.mark.parametrize("max_images", [1, 3, 8])
def test_patients_have_one_to_max_images(make, max_images):
    for name in FOLDERS:
        counts = Counter(Path(r["image"]).parts[1] for r in rows(make(max_images=max_images) / name))
        assert 1 <= min(counts.values()) <= max(counts.values()) <= max_images


def test_a_tenth_of_the_patients_are_in_two_specialties(tmp_path):
    cohorts = module._hospital(settings(patients_per_specialty=100), "oak", SITES["oak"], rooms("oak"))
    seen = Counter(int(p) for cohort in cohorts for p in cohort.person)
    assert sum(n == 2 for n in seen.values()) / len(seen) == pytest.approx(0.1, abs=0.01)
    assert max(seen.values()) == 2


def rooms(site: str, style_seed: int = 100) -> list[object]:
    return [module._open_room(style_seed, site, name) for name in SITES[site]]


def test_another_seed_keeps_the_devices(make):
    def equipment(seed: int) -> set[tuple[str, str, str, int]]:
        return {
            (name, ds.Modality, ds.PhotometricInterpretation, ds.BitsStored)
            for name in SITES
            for ds in headers(make(seed=seed) / name)
        }

    assert equipment(1) == equipment(2)
    assert [r.device for r in rooms("oak")] == [r.device for r in rooms("oak")]
    assert all(a.device != b.device for a, b in zip(rooms("oak"), rooms("oak", 101), strict=True))
    assert module._open_room(100, "pine", "radiology").device != rooms("oak")[0].device


def test_shuffle_labels_touches_hospitals_only(make):
    plain, shuffled = make(patients_per_specialty=12), make(patients_per_specialty=12, shuffle_labels=True)
    for name in FOLDERS:
        before, after = ([(r["specialty"], r["label"]) for r in rows(out / name)] for out in (plain, shuffled))
        assert (before == after) == name.startswith(PUBLIC)
        first, second = (
            pydicom.dcmread(out / name / rows(out / name)[0]["image"]).pixel_array for out in (plain, shuffled)
        )
        assert np.array_equal(first, second)
        patients = [
            {(r["specialty"], r["image"].split("/")[1]): r["label"] for r in rows(o / name)} for o in (plain, shuffled)
        ]
        for specialty in {r["specialty"] for r in rows(plain / name)}:
            shares = [Counter(v for (s, _), v in p.items() if s == specialty) for p in patients]
            assert shares[0] == shares[1]


def test_an_existing_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(DataError, match="exists; remove it, or use it as it is"):
        synthesize(settings(), SITES, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_crash_leaves_no_folder_that_looks_whole(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "dicom_object", fail)
    with pytest.raises(DataError, match=r"cannot be written .*No space left.*; free space"):
        synthesize(settings(), SITES, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_every_wrong_site_is_reported_at_once(tmp_path):
    with pytest.raises(DataError) as caught:
        synthesize(settings(), {"public": ("radiology",), "a/b": ("surgery",), "elm": ()}, tmp_path / "out")
    assert len(caught.value.problems) == 4
    with pytest.raises(DataError, match="no sites to draw"):
        synthesize(settings(), {}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
