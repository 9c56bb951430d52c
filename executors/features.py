"""From a manifest to what the trainable part reads: images through the frozen tower once, sorted by patient."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache as once
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

import clinifed.data
from clinifed import __version__
from clinifed.config import Specialty
from clinifed.data.dataset import Batch, iter_pixels, patients
from clinifed.data.manifest import Manifest, Record, read_manifest, without_patients
from clinifed.data.series import frames_of
from clinifed.data.volumes import KEY_FRAME
from clinifed.errors import DataError
from clinifed.files import canonical_json, file_sha256, sha256_of
from clinifed.models.adapters import FrozenPart
from clinifed.models.backbone import Backbone
from clinifed.models.embedding import embed_images
from clinifed.models.shards import Shards
from clinifed.policy import SitePolicy
from clinifed.privacy.engine import PatientTensors
from clinifed.privacy.objectives import OBJECTIVES, Objective, encode_labels
from clinifed.privacy.withdrawn import Withdrawn

__all__ = ["SitePatients", "file_content", "patient_tensors", "site_manifest"]

log = logging.getLogger(__name__)

# Whose releases may change a pixel, or a feature's last digits; a codec that is not installed counts as none.
_READERS = (
    "monai", "numpy", "pillow", "pydicom", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle",
    "pyjpegls", "python-gdcm", "torch",
)  # fmt: skip
_MODELS = ("open_clip_torch", "timm", "torch")


@dataclass(frozen=True)
class SitePatients(PatientTensors):
    """Patients whose rows know their image: a volume has a row for each frame that stands for it, with its views."""

    image: Tensor  # (R,) int64, non-decreasing
    records: tuple[Record, ...]  # R, what the manifest says of that image

    @property
    def first(self) -> Tensor:
        """(R,) bool: the first row of each image, to count images by. As private as the images."""
        return torch.diff(self.image, prepend=torch.tensor([-1])) != 0


def site_manifest(policy: SitePolicy) -> Manifest:
    """A site's manifest without the patients who withdrew: nothing at a site reads images of another one.

    Raises:
        DataError: the manifest, or the list of who withdrew, cannot be read.
    """
    return without_patients(read_manifest(policy.manifest), Withdrawn.of(policy).patients())


def patient_tensors(
    model: FrozenPart,
    backbone: Backbone,
    manifest: Manifest,
    specialties: Mapping[str, Specialty],
    *,
    split: str | None,
    batch_size: int,
    cache: Path | None,
    objective: Objective = OBJECTIVES["cross-entropy"],
    views: int = 1,
) -> SitePatients:
    """The patients of ``manifest`` as features (R, F) of the frozen part of ``model``.

    Args:
        specialties: those to keep; ``PatientTensors.specialty`` counts their sorted names. Their ``frames`` say which
            slices of a volume stand for it; each is a row of its patient, like any other image.
        split: ``train``, ``holdout``, or None for all.
        batch_size: images per forward pass.
        cache: owner-only folder for the features, or None.
        objective: whose labels these are: one of the specialty's to an image, or several joined by ``|``.
        views: rows of each image: itself, and augmented ones.

    Each image is encoded once for its content.

    Images that cannot be read are left out and counted in the log; whether a patient counts depends on that
    patient's own files alone.

    Raises:
        DataError: a label is unknown, or a specialty has no readable image. Every problem at once.
    """
    names = sorted(specialties)
    labels = {name: list(specialties[name].labels) for name in names}
    frames = frames_of(specialties)
    units = patients(manifest, split, names, frames)
    records = [record for unit in units for record in unit.records]
    encoded: list[int] = []
    unknown = Counter[str]()
    for record in records:
        try:
            encoded.append(encode_labels(objective, labels[record.specialty], record.label))
        except KeyError:
            unknown[record.specialty] += 1
    if unknown:
        raise DataError(
            *(f"{manifest.path}: {n} images of {s} have a label outside {labels[s]}" for s, n in unknown.items())
        )

    skipped = Counter[str]()
    shards = None if cache is None else Shards(cache, _space(model, backbone))
    contents = [None if shards is None else _content(manifest, record) for record in records]

    device, shape = model.part.device, model.part.trunk.shape

    def encode(numbers: Sequence[int], seen: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        from clinifed.data.transforms import augment  # MONAI takes seconds to import: only where images are read

        position = {records[i].image: i for i in numbers}
        some = [records[i] for i in numbers]
        batches = iter_pixels(manifest, some, backbone.preprocess, batch_size, frames=frames)
        for batch in _unchanged(manifest, batches, {image: contents[i] for image, i in position.items()}):
            skipped.update(batch.skipped)
            if batch.records:
                with torch.no_grad():  # not inference mode: the trainable part differentiates through these
                    rows = [model.features(augment(batch.pixels, view).to(device)).cpu() for view in seen]
                yield [position[r.image] for r in batch.records], torch.stack(rows, dim=1).flatten(2)

    most = [frames.get(record.specialty, KEY_FRAME).count for record in records]
    embedded = embed_images(contents, views, encode, shards, most)
    log.info("features: %d rows kept from earlier, %d computed", embedded.found, embedded.computed)
    if skipped:
        log.warning("images left out: %s", dict(skipped))
    if not embedded.images:
        raise DataError(f"{manifest.path}: none of {len(records)} images could be read: {dict(skipped)}")
    rows = [records[i] for i in embedded.images]
    missing = set(names) - {r.specialty for r in rows}
    if missing:
        raise DataError(f"{manifest.path}: no readable image of {', '.join(sorted(missing))}")
    # Dense numbers: patients all of whose images were unreadable are gone. Rows are already sorted by patient.
    dense: dict[str, int] = {}
    return SitePatients(
        features=embedded.features.unflatten(1, shape) if shape else embedded.features,
        patient=torch.tensor([dense.setdefault(r.patient, len(dense)) for r in rows]),
        specialty=torch.tensor([names.index(r.specialty) for r in rows]),
        label=torch.tensor([encoded[i] for i in embedded.images]),
        image=torch.tensor(embedded.images),
        records=tuple(rows),
    )


def _content(manifest: Manifest, record: Record) -> str | None:
    """SHA-256 of the image's bytes: what the manifest says, or else what the file says; None where it cannot."""
    return record.sha256 or file_content(manifest.folder / record.image)


def file_content(path: Path) -> str | None:
    """SHA-256 of the file's bytes, hexadecimal; None where it is no file or cannot be read."""
    try:
        return file_sha256(path) if path.is_file() else None  # a pipe would never end
    except (OSError, ValueError):
        return None


def _unchanged(manifest: Manifest, batches: Iterable[Batch], contents: Mapping[str, str | None]) -> Iterator[Batch]:
    """Leave out images whose bytes are not those that their features would be kept under."""
    for batch in batches:
        kept = [
            i
            for i, record in enumerate(batch.records)
            if contents[record.image] in (None, file_content(manifest.folder / record.image))
        ]
        if changed := len(batch.records) - len(kept):
            skipped = batch.skipped + Counter({"changed since it was listed": changed})
            records = tuple(batch.records[i] for i in kept)
            yield replace(batch, pixels=batch.pixels[kept], records=records, skipped=skipped)
        else:
            yield batch


def _space(model: FrozenPart, backbone: Backbone) -> dict[str, object]:
    """All that a row of features depends on besides the image and its view."""
    return {
        "clinifed": __version__,
        "base": backbone.sha256,
        "cut": model.part.trunk.cut,
        "models": _versions(_MODELS),
        "transform": sha256_of(canonical_json([astuple(backbone.preprocess), _reading()])),
    }


@once
def _reading() -> list[object]:
    """How a file becomes pixels: our own code for it, and the libraries'."""
    code = sha256()
    for path in sorted(Path(str(clinifed.data.__file__)).parent.glob("*.py")):
        code.update(path.read_bytes())
    return [code.hexdigest(), _versions(_READERS)]


def _versions(names: Sequence[str]) -> list[str | None]:
    found: list[str | None] = []
    for name in names:
        try:
            found.append(version(name))
        except PackageNotFoundError:
            found.append(None)
    return found
