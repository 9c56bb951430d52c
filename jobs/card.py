"""The card of a checkpoint: what it has of the contract, and where its public sets are."""

import os
from collections.abc import Mapping
from typing import Any

from clinifed.contract import Contract
from clinifed.data.manifest import Manifest

__all__ = ["agreed_card", "public_paths", "without_basis"]


def without_basis(contract: Contract) -> Contract:
    """``contract`` with heads that read the embedding itself, as every model is written; itself where they do."""
    if contract.training.basis == "none":
        return contract
    return contract.model_copy(update={"training": contract.training.model_copy(update={"basis": "none"})})


def agreed_card(contract: Contract, job: str) -> dict[str, Any]:
    """The part of a card that follows from the contract; a model is written without a basis."""
    return {
        "schema_version": 1,
        "clinifed_version": contract.clinifed_version,
        "federation": contract.federation,
        "contract_sha256": contract.sha256(),
        "job": job,
        "base_model": contract.base_model.model_dump(),
        "training": without_basis(contract).training.model_dump(),
        "objective": contract.promise.objective,
        "specialties": {n: s.model_dump(mode="json") for n, s in contract.specialties.items()},
        "rounds": contract.rounds,
        "exportable": True,
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
