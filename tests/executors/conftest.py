"""One synthetic hospital on disk, its policy, and a contract over the tiny model."""

from collections.abc import Callable
from pathlib import Path

import pytest

from clinifed.config import Federation
from clinifed.contract import Contract
from clinifed.executors.flare import SIMULATOR
from clinifed.executors.trainer import SiteTrainer
from clinifed.jobs.prepare import PreparedData, make_site_keys, prepare_data, site_policies
from clinifed.jobs.recipe import build_contract
from clinifed.models.backbone import Backbone, load_backbone
from clinifed.policy import SitePolicy

JOB = "run"
PLAN = {
    "name": "unit",
    "rounds": 3,
    "min_clients": 1,
    "max_clients": 2,
    "training": {"local_epochs": 2},
    "privacy": {"epsilon": 1.0},
    "aggregation": {"quorum": 1, "round_timeout_s": 60},
    "data": {"synthesize": {"patients_per_specialty": 6, "public_patients_per_specialty": 8, "max_images": 3}},
    "sites": {"alder": {"specialties": ["radiology", "emergency"]}},
}


@pytest.fixture(scope="session")
def federation() -> Federation:
    return Federation.model_validate(PLAN)


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return load_backbone("tiny")


@pytest.fixture(scope="session")
def contract(federation: Federation, backbone: Backbone) -> Contract:
    return build_contract(federation, backbone)


@pytest.fixture(scope="session")
def prepared(federation: Federation, tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return prepare_data(federation, tmp_path_factory.mktemp("data") / "data", lambda text: None)


@pytest.fixture
def policy(federation: Federation, prepared: PreparedData, contract: Contract, tmp_path: Path) -> SitePolicy:
    make_site_keys(federation, tmp_path)
    return site_policies(federation, prepared, tmp_path, contract, (SIMULATOR,))["alder"]


@pytest.fixture
def train(contract: Contract, policy: SitePolicy) -> Callable[..., SiteTrainer]:
    """A trainer of this site, for a contract that its policy approves."""

    def build(agreed: Contract = contract, site: SitePolicy = policy, job: str = JOB, **changes: object) -> SiteTrainer:
        approved = {"approved_contracts": (agreed.sha256(),), **changes}
        return SiteTrainer(agreed, site.model_copy(update=approved), job, SIMULATOR)

    return build
