"""``clinifed evaluate``: a checkpoint beside zero-shot, on public patients, or at a hospital on its held-out ones."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from clinifed.config import Training
from clinifed.data.manifest import Manifest, read_manifest
from clinifed.errors import DataError
from clinifed.evaluation.assessment import MIN_PATIENTS
from clinifed.evaluation.relinkage import RANKS, linked, recall_at, reports_of
from clinifed.evaluation.scoring import scores_of
from clinifed.executors.features import SitePatients, patient_tensors, site_manifest
from clinifed.jobs.comparison import HOLDOUT, PUBLIC_TEST, compare, judge
from clinifed.load import read_yaml, validate
from clinifed.models.adaptation import base_of, card_specialties
from clinifed.models.adapters import FrozenPart, TrainablePart, build_trainable
from clinifed.models.backbone import Backbone
from clinifed.models.state import Checkpoint, read_checkpoint
from clinifed.policy import SitePolicy
from clinifed.privacy.objectives import resolve_objective

__all__ = ["STAYS", "evaluate_at_site", "evaluate_checkpoint"]

_BATCH = 64  # images per forward pass; changes memory only
STAYS = "stays at the site: these figures are of the hospital's own patients, exact and without noise"
UNCHANGED = "heads alone were trained: the embedding, and so re-linkage, is the base model's"


def evaluate_checkpoint(
    checkpoint: Path, test: Path | None, model_ref: str | None, minimum: int = MIN_PATIENTS
) -> dict[str, Any]:
    """Figures by specialty of the checkpoint and of zero-shot on public patients, and how well images are re-linked.

    Args:
        test: manifest of public patients; by default the one the card names.
        model_ref: where the base model is, if not where the card says.
        minimum: of patients, below which a figure of the comparison is suppressed.

    Raises:
        DataError: there is no test set, or it is a hospital's.
        ModelError: the base model is another one than the checkpoint was trained on.
    """
    read = read_checkpoint(checkpoint)
    if test is None:
        named = read.card.get("public", {}).get("test")
        if named is None:
            raise DataError(f"{checkpoint}: the card names no public test set; give one with --test MANIFEST")
        test = checkpoint / named
    manifest = read_manifest(test)
    if manifest.data_class == "hospital":
        raise DataError(
            f"{test}: marked as a hospital's data; figures are reported on public or synthetic data only. At the "
            "hospital, `clinifed evaluate CHECKPOINT --site POLICY` tells it of its own held-out patients"
        )
    return _evaluate(read, manifest, None, None, model_ref, None, minimum)


def evaluate_at_site(
    checkpoint: Path, policy_file: Path, model_ref: str | None, minimum: int = MIN_PATIENTS
) -> dict[str, Any]:
    """The same on a site's own held-out patients, for the site alone: the report says that it stays there.

    Args:
        policy_file: the site's policy, which says where manifest, base model and cache are.
        model_ref: where the base model is, if not where the policy or the card says.
        minimum: of patients, below which a figure of the comparison is suppressed.

    Raises:
        DataError: no patient is held out.
        ModelError: the base model is another one than the checkpoint was trained on.

    Guarantees:
        - Nothing is written but the site's own cache of embeddings, and nothing is sent.
        - No image of a patient who withdrew is read.
    """
    policy = validate(SitePolicy, read_yaml(policy_file), str(policy_file))
    manifest = site_manifest(policy)
    if not any(record.split == "holdout" for record in manifest.records):
        raise DataError(
            f"{policy.manifest}: no patient is held out; `clinifed data index --holdout SHARE` makes a manifest in "
            "which some are"
        )
    ref = model_ref or policy.model_ref
    return _evaluate(read_checkpoint(checkpoint), manifest, policy.site, policy.cache, ref, "holdout", minimum)


def _evaluate(
    read: Checkpoint,
    manifest: Manifest,
    site: str | None,
    cache: Path | None,
    model_ref: str | None,
    split: str | None,
    minimum: int,
) -> dict[str, Any]:
    backbone, every = base_of(read, model_ref), card_specialties(read)
    names = sorted({r.specialty for r in manifest.records if split in (None, r.split)} & set(every))
    if not names:
        raise DataError(f"{manifest.path}: no image of {', '.join(sorted(every))}, which the checkpoint knows")
    training = validate(Training, read.card["training"], f"{read.path}: training")
    objective = resolve_objective(read.card["objective"])
    start = build_trainable(backbone, every, training).ready()
    trained = build_trainable(backbone, every, training, read.params).ready()
    patients = patient_tensors(
        FrozenPart(backbone, start),
        backbone,
        manifest,
        {n: every[n] for n in names},
        split=split,
        batch_size=_BATCH,
        cache=cache,
        objective=objective,
    )
    judged = judge(patients, names, site, {"zero_shot": start, "trained": trained}, {})
    public, own = (judged, []) if site is None else (None, [judged])
    before, after = (scores_of(judged.shared[key], patients, names, objective) for key in ("zero_shot", "trained"))
    return {
        "checkpoint": str(read.path),
        "test": {
            "patients_of": PUBLIC_TEST if site is None else HOLDOUT,
            "site": site,
            "sha256": manifest.sha256,
            "data_class": manifest.data_class,
        },
        "note": None if site is None else STAYS,
        "metrics": {n: {"zero_shot": before[n].to_dict(), "federated": after[n].to_dict()} for n in names},
        "comparison": compare(every, objective, "trained", public, own, minimum),
        "relinkage": _relinkage(backbone, start, trained, patients),
    }


@torch.inference_mode()
def _relinkage(
    backbone: Backbone, start: TrainablePart, trained: TrainablePart, patients: SitePatients
) -> dict[str, Any] | None:
    """Image → own report among those of the set, by the base embedding and the trained one; None without captions."""
    records = patients.records
    rows = [i for i, record in enumerate(records) if record.caption.strip()]
    if not rows:
        return None
    whose = [records[i].patient for i in rows]
    reports, own = reports_of(whose, [records[i].caption.strip() for i in rows])
    texts = sorted(set(reports))  # each text once: equal texts must have equal embeddings
    encoded = torch.cat([backbone.encode_reports(texts[i : i + _BATCH]) for i in range(0, len(texts), _BATCH)]).numpy()
    place = {text: i for i, text in enumerate(texts)}
    gallery = encoded[[place[text] for text in reports]]

    def told(part: TrainablePart) -> dict[str, Any]:
        batches = (patients.features[rows[i : i + _BATCH]].to(part.device) for i in range(0, len(rows), _BATCH))
        images = np.concatenate([part.embed(batch).cpu().numpy() for batch in batches])
        return recall_at(linked(images, gallery, own), whose, len(reports))

    changed = any(parameter.requires_grad for parameter in trained.trunk.parameters())
    return {
        "images": len(rows),
        "patients": len(set(whose)),
        "reports": len(reports),
        "different_texts": len(texts),
        "ranks": list(RANKS),
        "base": told(start),
        "trained": told(trained) if changed else None,
        "note": None if changed else UNCHANGED,
    }
