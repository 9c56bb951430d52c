"""A contract of three sites and three specialties, and updates that fit it."""

import numpy as np
import pytest

from clinifed.config import Training
from clinifed.contract import BaseModelRef, Contract, ContractSite, Promise
from clinifed.messages import Update, allowed_names
from clinifed.models.specialties import SPECIALTIES

SITES = {"alder": ("radiology",), "birch": ("dermatology", "radiology"), "cedar": ("dermatology", "emergency")}
DIM = 4


@pytest.fixture(scope="session")
def contract() -> Contract:
    names = ("dermatology", "emergency", "radiology")
    shapes = {"trunk.projection.weight": (DIM, DIM)}
    for name in names:
        labels = len(SPECIALTIES[name].labels)
        shapes |= {f"heads.{name}.weight": (labels, DIM), f"heads.{name}.bias": (labels,)}
    return Contract(
        federation="three",
        clinifed_version="0",
        base_model=BaseModelRef(ref="tiny", sha256="0" * 64),
        specialties={name: SPECIALTIES[name] for name in names},
        training=Training(train="projection"),
        promise=Promise(
            mode="dp",
            epsilon=1,
            delta=1e-5,
            noise_multiplier=10,
            max_grad_norm=1,
            releases=3,
            objective="cross-entropy",
        ),
        rounds=3,
        min_clients=2,
        max_clients=3,
        min_updates=2,
        round_timeout_s=60,
        rule="fedavg",
        sites={
            name: ContractSite(specialties=specialties, nominal_patients=10, weight=number + 1)
            for number, (name, specialties) in enumerate(SITES.items())
        },
        shapes=shapes,
    )


@pytest.fixture
def updates(contract: Contract) -> dict[str, Update]:
    generator = np.random.default_rng(0)
    return {
        site: Update(
            site,
            1,
            {
                name: generator.normal(size=contract.shapes[name]).astype(np.float32)
                for name in allowed_names(contract.shapes, agreed.specialties)
            },
            {"contract_sha256": contract.sha256()},
        )
        for site, agreed in contract.sites.items()
    }
