"""Startup kits of a small federation, made once; and what a hospital adds to its own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from clinifed.config import Deployment, Federation, Site, Synthesize
from clinifed.data.manifest import Record, write_manifest
from clinifed.files import write_atomic
from clinifed.jobs.provision import provision
from clinifed.policy import Budget, SitePolicy
from clinifed.privacy.ledger import Ledger
from clinifed.signing import make_signing_key

from .studied import Studied, study

SITES = ("alder", "birch", "cedar-2")


def federation_of(*sites: str, **deployment: object) -> Federation:
    """A federation of these sites."""
    return Federation.model_validate(
        {
            "name": "unit",
            "rounds": 2,
            "min_clients": 1,
            "max_clients": 9,
            "aggregation": {"quorum": 1, "round_timeout_s": 60},
            "data": {"synthesize": Synthesize()},
            "sites": {name: Site(specialties=("radiology",)) for name in sites},
            "deployment": Deployment.model_validate(deployment),
        }
    )


@pytest.fixture(scope="session")
def make_federation() -> Callable[..., Federation]:
    return federation_of


@pytest.fixture(scope="session")
def kits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kits that no test changes; copy before changing."""
    return provision(federation_of(*SITES), tmp_path_factory.mktemp("kits") / "out", lambda _: None)


@pytest.fixture(scope="session")
def fill_in() -> Callable[..., SitePolicy]:
    """What a hospital does with its kit: key, ledger, manifest, policy."""

    def fill(kit: Path, home: Path, **other: object) -> SitePolicy:
        home.mkdir(parents=True)
        write_manifest(
            home / "manifest.csv", [Record("a.dcm", "0" * 20, "radiology", "effusion", "", "train")], "synthetic"
        )
        policy = SitePolicy.model_validate(
            {
                "site": kit.name,
                "manifest": home / "manifest.csv",
                "ledger": home / "ledger.jsonl",
                "signing_key": home / "signing.key",
                "cache": home / "cache",
                "diary": home / "diary.jsonl",
                "budget": Budget(epsilon=1, delta=1e-5),
                "approved_contracts": ("ab" * 32,),
                "coordinators": ("coordinator@consortium.org",),
                **other,
            }
        )
        Ledger.of(policy).create()
        make_signing_key(policy.signing_key)
        text = yaml.safe_dump(policy.model_dump(mode="json"))
        write_atomic(kit / "local" / "clinifed" / f"{kit.name}.yaml", text.encode(), 0o600)
        return policy

    return fill


@pytest.fixture(scope="session")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Studied:
    """What the end of a run has at hand; made once."""
    return study(tmp_path_factory.mktemp("study"))
