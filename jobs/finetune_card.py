"""The card of a fine-tuned checkpoint: a federation's, of one site, and what it began with."""

import os
from collections.abc import Mapping
from typing import Any

from clinifed.contract import Contract
from clinifed.data.manifest import Manifest
from clinifed.executors.trainer import SiteTrainer
from clinifed.models.adaptation import Start
from clinifed.models.state import Checkpoint
from clinifed.privacy.claims import make_claim

__all__ = ["agreed_card", "claim_of", "public_paths", "started_from"]


def claim_of(trainer: SiteTrainer) -> dict[str, Any]:
    """What this fine-tuning has cost so far, as the site's ledger has it."""
    contract, releases = trainer.contract, trainer.releases
    site = trainer.policy.site
    if not releases.private:
        return make_claim(contract, site, "job")
    charged = releases.ledger.account().jobs[releases.job].charged
    return make_claim(contract, site, "job", charged, contract.promise.delta, releases.ledger.state().head)


def started_from(source: Checkpoint | None, begun: Start) -> dict[str, Any] | None:
    """Which checkpoint this began with, what was taken of it, and what its sites claim: their patients are in it."""
    if source is None:
        return None
    card, earlier = source.card, source.card.get("started_from") or {}
    return {
        "weights_sha256": card.get("weights_sha256"),
        "contract_sha256": card.get("contract_sha256"),
        "federation": card.get("federation"),
        "jobs": [card.get("job"), *earlier.get("jobs", [])],
        "sites": card.get("sites", {}),
        "earlier": earlier or None,
        "taken": begun.to_dict(),
    }


def public_paths(
    sets: Mapping[str, Manifest | None], run: os.PathLike[str], checkpoint: os.PathLike[str]
) -> dict[str, str]:
    """Public manifests beneath ``run``, relative to ``checkpoint``; those elsewhere are another machine's business."""
    return {
        which: os.path.relpath(manifest.path, checkpoint)
        for which, manifest in sets.items()
        if manifest is not None and manifest.path.is_relative_to(run)
    }


def agreed_card(contract: Contract, job: str) -> dict[str, Any]:
    """The part of a card that follows from the contract."""
    return {
        "schema_version": 1,
        "clinifed_version": contract.clinifed_version,
        "federation": contract.federation,
        "contract_sha256": contract.sha256(),
        "job": job,
        "base_model": contract.base_model.model_dump(),
        "training": contract.training.model_dump(),
        "objective": contract.promise.objective,
        "specialties": {n: s.model_dump(mode="json") for n, s in contract.specialties.items()},
        "rounds": contract.rounds,
        "exportable": True,
    }
