"""From a manifest to what the trainable part reads: images through the frozen tower once, sorted by patient."""

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from clinifed import __version__
from clinifed.config import Specialty
from clinifed.data.dataset import iter_pixels, patients
from clinifed.data.manifest import Manifest
from clinifed.errors import DataError
from clinifed.models.adapters import GlobalModel
from clinifed.models.backbone import Backbone
from clinifed.models.embedding import cached_features
from clinifed.privacy.engine import PatientTensors
from clinifed.privacy.objectives import OBJECTIVES, Objective, encode_labels

__all__ = ["patient_tensors"]

log = logging.getLogger(__name__)


def patient_tensors(
    model: GlobalModel,
    backbone: Backbone,
    manifest: Manifest,
    specialties: Mapping[str, Specialty],
    *,
    split: str | None,
    batch_size: int,
    cache: Path | None,
    objective: Objective = OBJECTIVES["cross-entropy"],
    views: int = 1,
) -> PatientTensors:
    """The patients of ``manifest`` as features (R, F) of the frozen part of ``model``.

    Args:
        specialties: those to keep; ``PatientTensors.specialty`` counts their sorted names.
        split: ``train``, ``holdout``, or None for all.
        batch_size: images per forward pass.
        cache: owner-only folder for the features, or None.
        objective: whose labels these are: one of the specialty's to an image, or several joined by ``|``.
        views: rows of each image: itself, and augmented ones.

    Images that cannot be read are left out and counted in the log; whether a patient counts depends on that
    patient's own files alone.

    Raises:
        DataError: a label is unknown, or a specialty has no readable image. Every problem at once.
    """
    names = sorted(specialties)
    labels = {name: list(specialties[name].labels) for name in names}
    units = patients(manifest, split, names)
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

    def compute() -> dict[str, Tensor]:
        from clinifed.data.transforms import augment  # MONAI takes seconds to import: only where images are read

        index = {record.image: i for i, record in enumerate(records)}
        features, kept, skipped = [], [], Counter[str]()
        for batch in iter_pixels(manifest, records, backbone.preprocess, batch_size):
            skipped.update(batch.skipped)
            if batch.records:
                seen = [model.features(augment(batch.pixels, view)) for view in range(views)]
                features.append(torch.stack(seen, dim=1).flatten(0, 1))  # the views of an image stand together
                kept += [index[r.image] for r in batch.records for _ in range(views)]
        if skipped:
            log.warning("images left out: %s", dict(skipped))
        if not kept:
            raise DataError(f"{manifest.path}: none of {len(records)} images could be read: {dict(skipped)}")
        return {"features": torch.cat(features), "row": torch.tensor(kept)}

    key: dict[str, object] = {
        "code": __version__,  # reading and transforming images may change with a release
        "base": backbone.sha256,
        "cut": "projection" in model.part.trunk,
        "manifest": manifest.sha256,
        "split": split,
        "specialties": names,
        "views": views,
    }
    cached = cached_features(cache, key, compute)
    kept_rows = cached["row"].tolist()
    rows = [records[i] for i in kept_rows]
    missing = set(names) - {r.specialty for r in rows}
    if missing:
        raise DataError(f"{manifest.path}: no readable image of {', '.join(sorted(missing))}")
    # Dense numbers: patients all of whose images were unreadable are gone. Rows are already sorted by patient.
    dense: dict[str, int] = {}
    return PatientTensors(
        features=cached["features"],
        patient=torch.tensor([dense.setdefault(r.patient, len(dense)) for r in rows]),
        specialty=torch.tensor([names.index(r.specialty) for r in rows]),
        label=torch.tensor([encoded[i] for i in kept_rows]),
    )
