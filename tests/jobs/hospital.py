"""A synthetic hospital with held-out patients and public sets on disk; what its own training needs."""

from pathlib import Path

import pytest

from clinifed.config import Federation
from clinifed.data.manifest import read_manifest, write_manifest
from clinifed.jobs.finetune_plan import LOCAL
from clinifed.jobs.prepare import prepare_data
from clinifed.models.backbone import load_backbone
from clinifed.policy import Budget, SitePolicy
from clinifed.privacy.ledger import Ledger
from clinifed.signing import make_signing_key

PATIENTS, HELD_OUT = 12, 5


def patch_backbone(patch: pytest.MonkeyPatch) -> None:
    """The tiny model takes a second to load: once is enough."""
    tiny = load_backbone("tiny")
    for module in ("jobs.finetune", "models.adaptation"):
        patch.setattr(f"clinifed.{module}.load_backbone", lambda ref: tiny)


def hospital(folder: Path) -> Path:
    """Images of one hospital, ``folder/alder/manifest.csv``, some patients of it held out; public sets beside it."""
    plan = {
        **PLAN,
        "data": {"synthesize": {"patients_per_specialty": PATIENTS, "public_patients_per_specialty": 8}},
        "sites": {"alder": {"specialties": ["radiology", "emergency"]}},
    }
    manifest = prepare_data(Federation.model_validate(plan), folder, lambda text: None).sites["alder"]
    held = {p for s in ("radiology", "emergency") for p in _patients(manifest.records, s)[:HELD_OUT]}
    changed = [type(r)(**{**vars(r), "split": "holdout" if r.patient in held else "train"}) for r in manifest.records]
    write_manifest(manifest.path, changed, "synthetic")
    return folder


def _patients(records, specialty: str) -> list[str]:
    return sorted({r.patient for r in records if r.specialty == specialty})


PLAN = {
    "name": "unit",
    "rounds": 3,
    "min_clients": 1,
    "max_clients": 2,
    "privacy": {"epsilon": 4.0},
    "aggregation": {"quorum": 1, "round_timeout_s": 60, "norm_bound": 1000.0},
}


def federation(folder: Path, **changes: object) -> Federation:
    """A federation that finds the hospital's data in ``folder``."""
    site = {
        "specialties": ["radiology", "emergency"],
        "nominal_patients": PATIENTS,
        "manifest": folder / "alder" / "manifest.csv",
        "data_class": "synthetic",
    }
    public = {which: folder / "public" / which / "manifest.csv" for which in ("validation", "test")}
    return Federation.model_validate({**PLAN, "data": {"public": public}, "sites": {"alder": site}, **changes})


def policy(folder: Path, home: Path, **changes: object) -> SitePolicy:
    """The hospital's own policy, with ledger and key in ``home``."""
    home.mkdir(mode=0o700)
    made = SitePolicy.model_validate(
        {
            "site": "alder",
            "manifest": folder / "alder" / "manifest.csv",
            "ledger": home / "ledger.jsonl",
            "signing_key": home / "signing.key",
            "cache": home / "cache",
            "diary": home / "diary.jsonl",
            "budget": Budget(epsilon=4, delta=1e-5),
            "coordinators": (LOCAL,),
            **changes,
        }
    )
    make_signing_key(made.signing_key)
    Ledger.of(made).create()
    assert read_manifest(made.manifest).records
    return made
