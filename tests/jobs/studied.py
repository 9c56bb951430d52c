"""Two synthetic hospitals with held-out patients, and a run over them that is at its end."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from clinifed.config import Federation
from clinifed.contract import Contract
from clinifed.data.manifest import DataClass, Manifest, write_manifest
from clinifed.executors.flare import SIMULATOR
from clinifed.jobs.prepare import PreparedData, make_site_keys, prepare_data, site_policies
from clinifed.jobs.recipe import build_contract
from clinifed.messages import Parameters
from clinifed.models.backbone import Backbone, load_backbone
from clinifed.policy import SitePolicy

PLAN = {
    "name": "unit",
    "rounds": 2,
    "min_clients": 1,
    "max_clients": 2,
    "training": {"local_epochs": 2},
    "aggregation": {"quorum": 1, "round_timeout_s": 60},
    "data": {"synthesize": {"patients_per_specialty": 12, "public_patients_per_specialty": 12, "max_images": 2}},
    "sites": {
        "alder": {"specialties": ["radiology", "dermatology"]},
        "birch": {"specialties": ["radiology"]},
    },
}


@dataclass(frozen=True)
class Studied:
    """What the end of a run has at hand."""

    contract: Contract
    backbone: Backbone
    data: PreparedData
    policies: dict[str, SitePolicy]

    def delta(self, size: float = 0.0) -> Parameters:
        """A change of every shared parameter."""
        rng = np.random.default_rng(1)
        return {n: (size * rng.standard_normal(s)).astype(np.float32) for n, s in self.contract.shapes.items()}


def held_out(manifest: Manifest, data_class: DataClass, every: int = 2) -> Manifest:
    """The same images, of each ``every`` patients one held out."""
    order = {patient: i for i, patient in enumerate(sorted({r.patient for r in manifest.records}))}
    split = {patient: "holdout" if i % every == 0 else "train" for patient, i in order.items()}
    records = [replace(r, split=split[r.patient]) for r in manifest.records]
    return write_manifest(manifest.folder / f"split-{data_class}.csv", records, data_class)


def study(folder: Path, **other: object) -> Studied:
    """Make the data, and everything a run over it would have."""
    federation = Federation.model_validate({**PLAN, **other})
    backbone = load_backbone("tiny")
    contract = build_contract(federation, backbone, make_site_keys(federation, folder))
    data = prepare_data(federation, folder / "data", lambda _: None)
    data = replace(data, sites={name: held_out(manifest, "synthetic") for name, manifest in data.sites.items()})
    policies = site_policies(federation, data, folder, contract, (SIMULATOR,))
    return Studied(contract, backbone, data, policies)
