"""``clinifed personalise``: a hospital's own heads on top of a global checkpoint. They never leave it.

No noise is added, because nothing is released: the heads lie in the hospital's owner-only folder, their card says
``exportable: false`` and ``in_house``, and no trainer reads them. What they gain is decided on the hospital's own
held-out patients, head by head; where it cannot be told from chance, the global head stays.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from clinifed.aggregators.checkpoint import write_checkpoint
from clinifed.config import Specialty, Training
from clinifed.data.manifest import Manifest
from clinifed.errors import DataError, ModelError
from clinifed.evaluation.choice import Choice, choose
from clinifed.evaluation.scoring import embedded
from clinifed.executors.features import patient_tensors, site_manifest
from clinifed.files import OWNER_ONLY, write_json
from clinifed.jobs.own_heads import GLOBAL, LOCAL_ONLY, VARIANTS, Head, Recipe, candidates, logits
from clinifed.load import validate
from clinifed.messages import head_name
from clinifed.models.adaptation import base_of, card_specialties
from clinifed.models.adapters import FrozenPart, TrainablePart, build_trainable
from clinifed.models.backbone import Backbone
from clinifed.models.heads import zero_shot_heads
from clinifed.models.state import Checkpoint, arrays, read_checkpoint
from clinifed.policy import SitePolicy
from clinifed.privacy.cohorts import Cohorts
from clinifed.privacy.engine import PatientTensors
from clinifed.privacy.objectives import Objective, resolve_objective
from clinifed.signing import read_signing_key

__all__ = ["personalise"]

_CHECKPOINT, _REPORT = "checkpoint", "choice.json"  # in the folder that is made


def personalise(
    checkpoint: Path,
    policy: SitePolicy,
    out: Path,
    *,
    specialties: Sequence[str] | None = None,
    model_ref: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train in-house heads on the site's split ``train``, and keep of each specialty what its ``holdout`` bears out.

    Candidates are zero-shot, the global head, the head that the site's own data makes alone, mixtures of the last two,
    and heads trained from the global one and drawn back towards it at several strengths
    (:mod:`clinifed.jobs.own_heads`). The global head stays unless another has a better balanced accuracy by patient
    beyond the interval of a paired bootstrap over the held-out patients (:mod:`clinifed.evaluation.choice`).

    Args:
        checkpoint: a global checkpoint.
        policy: the site's own; its manifest and cache are used, its ledger is not touched.
        out: folder to make, its owner's alone: ``checkpoint/``, and ``choice.json`` with the figures.
        specialties: default: all that both the checkpoint and the manifest have.
        model_ref: where the base model is, if not where policy or card say.
        progress: called with one line per step.

    Returns:
        What was chosen for each specialty, and every figure it was chosen by; all of it is the hospital's own.

    Raises:
        DataError: a specialty has no training or no held-out patients, or others may enter ``out``.
        ModelError: the checkpoint or the base model cannot be used, or ``out`` holds heads already.

    Guarantees:
        - The card says ``exportable: false``, and ``in_house`` names every head that is not the global one.
        - No patient who withdrew, and no held-out patient, is in a head; who withdrew is not in the choice either.
        - On the held-out patients no head is worse than the site's local-only head beyond its interval.
        - Files and folder are their owner's alone.
    """
    source = read_checkpoint(checkpoint)
    known = card_specialties(source)
    training = validate(Training, source.card["training"], f"{checkpoint}: training")
    objective = resolve_objective(source.card["objective"])
    manifest = site_manifest(policy)
    names = _specialties(manifest, known, specialties)
    backbone = base_of(source, model_ref or policy.model_ref)
    _make_folder(out)

    part = build_trainable(backbone, known, training, source.params).ready()
    steps = int(source.card.get("rounds", 1)) * training.local_epochs
    recipe = Recipe(objective, training.learning_rate, steps, training.pull)
    params = dict(source.params)
    choices: dict[str, Choice] = {}
    for name in names:
        progress(f"{name}: training the hospital's own heads")
        own, held_out = (
            _patients(part, backbone, manifest, name, known[name], split, training, policy, objective)
            for split in ("train", "holdout")
        )
        start = zero_shot_heads(backbone, {name: known[name]}, training.temperature)
        heads = candidates(_head(start, name), _head(source.params, name), own, recipe)
        choice = choices[name] = _choose(heads, held_out, objective)
        progress(f"{name}: {choice.chosen}; {choice.reason}")
        chosen = heads[choice.chosen]
        params |= {head_name(name, "weight"): chosen.weight, head_name(name, "bias"): chosen.bias}
    report = {
        "schema_version": 1,
        "site": policy.site,
        "stays_at_the_site": True,
        "checkpoint": _CHECKPOINT,
        "specialties": {name: choice.to_dict() for name, choice in choices.items()},
    }
    write_json(out / _REPORT, report, OWNER_ONLY)
    card = _card(source, policy, manifest, choices, out / _CHECKPOINT)
    write_checkpoint(out / _CHECKPOINT, arrays(params), card, owner_only=True)
    return report


def _specialties(manifest: Manifest, known: dict[str, Specialty], wanted: Sequence[str] | None) -> list[str]:
    """Those to train, sorted."""
    splits: dict[str, set[str]] = {}
    for record in manifest.records:
        splits.setdefault(record.specialty, set()).add(record.split)
    names = sorted(set(wanted) if wanted else splits.keys() & known.keys())
    problems = [f"{name}: the checkpoint has no such specialty" for name in names if name not in known]
    problems += [
        f"{manifest.path}: no patient of {name} is in the split {split!r}; index with --holdout, so that some patients "
        "train a head and others judge it"
        for name in names
        for split in ("train", "holdout")
        if split not in splits.get(name, set())
    ]
    if problems or not names:
        raise DataError(*problems or [f"{manifest.path}: no specialty of the checkpoint's, {', '.join(sorted(known))}"])
    return names


def _make_folder(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True, mode=0o700)
    if out.stat().st_mode & 0o077:
        raise DataError(
            f"--out {out}: others than its owner may enter it; in-house heads go into a folder of mode 0700"
        )
    if (out / _CHECKPOINT).exists():
        raise ModelError(f"--out {out}: holds in-house heads already; choose another folder, or remove it")


def _patients(
    part: TrainablePart,
    backbone: Backbone,
    manifest: Manifest,
    name: str,
    specialty: Specialty,
    split: str,
    training: Training,
    policy: SitePolicy,
    objective: Objective,
) -> PatientTensors:
    """The site's patients of one specialty, as embeddings of the global model."""
    found = patient_tensors(
        FrozenPart(backbone, part),
        backbone,
        manifest,
        {name: specialty},
        split=split,
        batch_size=training.batch_size,
        cache=policy.cache,
        objective=objective,
    )
    return embedded(part, found, training.batch_size)


def _head(state: dict[str, Tensor], name: str) -> Head:
    return Head(state[head_name(name, "weight")], state[head_name(name, "bias")])


def _choose(heads: dict[str, Head], held_out: PatientTensors, objective: Objective) -> Choice:
    return choose(
        {name: logits(head, held_out) for name, head in heads.items()},
        GLOBAL,
        held_out.patient.numpy(),
        held_out.label.numpy(),
        variants=VARIANTS,
        never_worse_than=LOCAL_ONLY,
        multi_label=objective.labels == "many",
    )


def _card(
    source: Checkpoint, policy: SitePolicy, manifest: Manifest, choices: dict[str, Choice], where: Path
) -> dict[str, Any]:
    """The global card, marked. Figures of the hospital's patients are not in it: a bundle would carry them."""
    train = sorted({record.patient for record in manifest.records if record.split == "train"})
    own = Cohorts(policy.cohorts_folder, read_signing_key(policy.signing_key)).keep(train)
    public = {
        which: os.path.relpath((source.path / named).resolve(), where.resolve())
        for which, named in (source.card.get("public") or {}).items()
    }
    return {
        **source.card,
        "exportable": False,
        "in_house": [name for name, choice in choices.items() if choice.chosen != GLOBAL],
        "personalised": {
            "site": policy.site,
            "heads": {name: choice.chosen for name, choice in choices.items()},
            "patients_hmac": own,
            "global": {"weights_sha256": source.card.get("weights_sha256")},
        },
        "evaluation": None,  # it was of the global heads
        "public": public,
    }
