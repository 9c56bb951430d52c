"""Synthetic hospitals as real DICOM files, for the demonstration and the tests.

::

    out/<site>/dicom/<PatientID>/<SOPInstanceUID>.dcm      out/<site>/labels.csv
    out/public/validation/...                              out/public/test/...      no hospital's patients

Sites differ in their devices, in how common a label is, and in how many patients they have; all of it follows
from ``style_seed``, the site's name and the specialty. ``seed`` draws the patients and their images. The public
sets hold other patients, labels in equal shares, imaged on all the sites' devices in turn.
"""

import csv
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import generate_uid

from clinifed.config import Synthesize
from clinifed.data.captions import draw_captions
from clinifed.data.devices import STRENGTH, Device, draw_device, photograph
from clinifed.data.modalities import MODALITIES, Identity, Modality, dicom_object
from clinifed.data.phantoms import LABELS, Patients, draw_patients, render
from clinifed.errors import DataError

__all__ = ["COLUMNS", "PUBLIC", "synthesize"]

COLUMNS = ("image", "specialty", "label", "caption")  # of labels.csv; image is relative to its folder
PUBLIC = "public"  # the folder of the public sets, so no site may have this name

_BATCH = 64  # images rendered at a time: about 60 MB
# How many images a patient has, 1 to 8: chosen so that nine in ten patients have at most three.
_IMAGES = np.array([0.40, 0.32, 0.18, 0.04, 0.02, 0.02, 0.01, 0.01])
_TWO_SPECIALTIES = 0.10  # share of a hospital's patients who are seen in two of its specialties
_PREVALENCE_SPREAD = 0.3  # standard deviation of a label's log share between sites
_COUNT_SPREAD = 0.15  # a site has up to this share more or fewer patients than nominal


@dataclass(frozen=True)
class _Room:
    """One site's equipment for one specialty; a function of style seed, site and specialty alone."""

    device: Device
    modality: Modality
    prevalence: NDArray[np.float64]  # (K,), share of each label
    size: float  # patients relative to the nominal number


@dataclass(frozen=True)
class _Cohort:
    """The patients of one folder and specialty, with what labels.csv says of them. All arrays (N,)."""

    patients: Patients
    person: NDArray[np.int64]  # number of the patient in the folder; repeats across cohorts
    images: NDArray[np.int64]  # how many images
    room: NDArray[np.int64]  # index into rooms
    rooms: tuple[_Room, ...]
    label: NDArray[np.int64]  # as recorded; differs from the patients' own where labels are shuffled
    captions: tuple[str, ...]


def synthesize(settings: Synthesize, sites: Mapping[str, Sequence[str]], out: Path) -> None:
    """Write one folder per site and the two public sets, whole or not at all.

    Args:
        settings: seeds and sizes.
        sites: site → its specialties, each a key of :data:`clinifed.data.phantoms.LABELS`.
        out: the folder to create; its parent is created if absent.

    Raises:
        DataError: ``out`` exists, a site cannot be drawn, or the files cannot be written.
    """
    _check(sites, out)
    # Written beside `out` and renamed at the end: a folder of that name is always whole.
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    rooms = {(s, n): _open_room(settings.style_seed, s, n) for s, names in sites.items() for n in names}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        for site, specialties in sites.items():
            mine = [rooms[site, name] for name in specialties]
            _write(partial / site, site, _hospital(settings, site, specialties, mine), settings)
        for which in ("validation", "test"):
            cohorts = _public(settings, which, rooms)
            _write(partial / PUBLIC / which, f"{PUBLIC}-{which}", cohorts, settings)
        partial.rename(out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error}); free space or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(sites: Mapping[str, Sequence[str]], out: Path) -> None:
    """Raise every problem of the arguments at once."""
    problems = []
    if out.exists():
        problems.append(f"{out} exists; remove it, or use it as it is")
    for site, specialties in sites.items():
        if site.split("-")[0] == PUBLIC or Path(site).name != site or site.startswith("."):
            problems.append(f"site {site!r} cannot be a folder of its own beside {PUBLIC!r}; give it another name")
        problems += [
            f"site {site}: specialty {name!r} has no phantom; choose from {sorted(LABELS)}"
            for name in specialties
            if name not in LABELS
        ]
        if not specialties or len(set(specialties)) != len(specialties):
            problems.append(f"site {site}: specialties {list(specialties)} must be distinct, at least one")
    if problems or not sites:
        raise DataError(*problems or ["no sites to draw; give at least one"])


def _stream(*keys: object) -> np.random.Generator:
    """A generator that depends on ``keys`` and on nothing else; one per purpose, so none shifts another."""
    digest = sha256("|".join(map(str, keys)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def _open_room(style_seed: int, site: str, specialty: str) -> _Room:
    kinds = MODALITIES[specialty]
    modality = kinds[_stream("modality", style_seed, site, specialty).integers(len(kinds))]
    rng = _stream("room", style_seed, site, specialty)
    size = 1 + _COUNT_SPREAD * rng.uniform(-1, 1)
    share = np.exp(_PREVALENCE_SPREAD * rng.standard_normal(len(LABELS[specialty])))
    return _Room(draw_device(rng, STRENGTH[specialty]), modality, share / share.sum(), size)


def _cohort(
    rng: np.random.Generator,
    specialty: str,
    share: NDArray[np.float64],
    rooms: Sequence[_Room],
    count: int,
    max_images: int,
) -> _Cohort:
    """Draw ``count`` patients, the labels in exact ``share`` up to rounding, the rooms in turn."""
    bounds = np.rint(np.cumsum(share) * count).astype(np.int64)
    label = rng.permutation(np.searchsorted(bounds[:-1], np.arange(count), side="right"))
    patients = draw_patients(rng, specialty, label)
    weights = _IMAGES[:max_images] / _IMAGES[:max_images].sum()
    return _Cohort(
        patients=patients,
        person=np.arange(count),
        images=1 + rng.choice(max_images, count, p=weights),
        room=np.arange(count) % len(rooms),
        rooms=tuple(rooms),
        label=label,
        captions=tuple(draw_captions(rng, patients)),
    )


def _hospital(settings: Synthesize, site: str, specialties: Sequence[str], rooms: Sequence[_Room]) -> list[_Cohort]:
    """The cohorts of a site, some patients shared between two of them, labels shuffled where asked for."""
    cohorts = []
    for name, room in zip(specialties, rooms, strict=True):
        rng = _stream("patients", settings.seed, site, name)
        count = max(2, round(settings.patients_per_specialty * room.size))
        cohort = _cohort(rng, name, room.prevalence, [room], count, settings.max_images)
        if settings.shuffle_labels:
            order = _stream("shuffle", settings.seed, site, name).permutation(count)
            captions = tuple(cohort.captions[i] for i in order)
            cohort = replace(cohort, label=cohort.label[order], captions=captions)
        cohorts.append(cohort)
    cohorts = _number(cohorts)
    if settings.max_images > 1:
        _join(_stream("join", settings.seed, site), cohorts, settings.max_images)
    return cohorts


def _number(cohorts: Sequence[_Cohort]) -> list[_Cohort]:
    """The same cohorts, their patients numbered through."""
    starts = np.cumsum([0, *(len(c.person) for c in cohorts)])
    return [replace(c, person=c.person + start) for c, start in zip(cohorts, starts, strict=False)]


def _join(rng: np.random.Generator, cohorts: Sequence[_Cohort], max_images: int) -> None:
    """Make one person of two patients, in place, until a tenth of all are seen in two specialties."""
    free = [list(rng.permutation(len(c.person))) for c in cohorts]
    total = sum(map(len, free))
    # Joining k pairs leaves total - k patients, of whom k are in two specialties.
    pairs = round(total * _TWO_SPECIALTIES / (1 + _TWO_SPECIALTIES)) if len(cohorts) > 1 else 0
    for pair in range(pairs):
        first, second = pair % len(cohorts), (pair + 1) % len(cohorts)
        if free[first] and free[second]:
            i, j, one, two = free[first].pop(), free[second].pop(), cohorts[first], cohorts[second]
            two.person[j] = one.person[i]
            one.images[i] = min(one.images[i], max_images - 1)
            two.images[j] = min(two.images[j], max_images - one.images[i])


def _public(settings: Synthesize, which: str, rooms: Mapping[tuple[str, str], _Room]) -> list[_Cohort]:
    """The cohorts of a public set: every specialty that a site has, on all its devices in turn."""
    cohorts = []
    for name in sorted({specialty for _, specialty in rooms}):
        rng = _stream("patients", settings.seed, PUBLIC, which, name)
        mine = [rooms[key] for key in sorted(rooms) if key[1] == name]
        labels = len(LABELS[name])
        count, share = settings.public_patients_per_specialty, np.full(labels, 1 / labels)
        cohorts.append(_cohort(rng, name, share, mine, count, settings.max_images))
    return _number(cohorts)


def _write(folder: Path, issuer: str, cohorts: Sequence[_Cohort], settings: Synthesize) -> None:
    """Write the DICOM files and labels.csv of one site or public set."""
    folder.mkdir(parents=True)
    # Other settings draw other images, which must not carry the same UIDs.
    origin = f"{settings.model_dump_json()}|{issuer}"
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as table:
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(COLUMNS)
        for cohort in cohorts:
            specialty = cohort.patients.specialty
            rng = _stream("images", settings.seed, issuer, specialty)
            for patient, number, image in _images(rng, cohort):
                identity = _identity(origin, issuer, cohort, patient, number)
                path = Path("dicom", identity.patient_id, f"{identity.sop_uid}.dcm")
                (folder / path.parent).mkdir(parents=True, exist_ok=True)
                modality = cohort.rooms[cohort.room[patient]].modality
                ds = dicom_object(image, modality, identity)
                ds.save_as(folder / path, enforce_file_format=True)
                label = LABELS[specialty][cohort.label[patient]]
                rows.writerow([path.as_posix(), specialty, label, identity.comment])


def _images(rng: np.random.Generator, cohort: _Cohort) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
    """(index of the patient, number from 1, image) for every image of a cohort, room by room."""
    for index, room in enumerate(cohort.rooms):
        here = np.flatnonzero(cohort.room == index)
        owner = np.repeat(here, cohort.images[here])
        number = [n for patient in here for n in range(1, cohort.images[patient] + 1)]
        for start in range(0, len(owner), _BATCH):
            some = owner[start : start + _BATCH]
            images = photograph(rng, render(rng, cohort.patients, some), room.device)
            for patient, n, image in zip(some, number[start:], images, strict=False):
                yield int(patient), n, image


def _identity(origin: str, issuer: str, cohort: _Cohort, patient: int, number: int) -> Identity:
    """One study and one series per patient and specialty; UIDs are hashes of what they stand for."""
    person = int(cohort.person[patient])

    def unique(*of: object) -> str:
        key = "|".join(map(str, (origin, person, cohort.patients.specialty, *of)))
        return generate_uid(entropy_srcs=[key])

    return Identity(
        patient_id=f"{issuer[:48]}-{person:05d}",  # 64 characters at most (PS3.5, LO)
        issuer=issuer,
        study_uid=unique("study"),
        series_uid=unique("series"),
        sop_uid=unique("image", number),
        instance_number=number,
        comment=cohort.captions[patient],
    )
