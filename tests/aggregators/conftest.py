"""A contract of three sites and three specialties, and updates that fit it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from clinifed.contract import Contract
from clinifed.messages import SIGNED, Update, allowed_names, release_sha256
from clinifed.privacy.claims import make_claim
from clinifed.signing import make_signing_key, public_key, sign

SITES = {"alder": ("radiology",), "birch": ("dermatology", "radiology"), "cedar": ("dermatology", "emergency")}
JOB = "run"
HEAD = "a" * 64


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ed25519PrivateKey]:
    folder = tmp_path_factory.mktemp("keys")
    return {site: make_signing_key(folder / site) for site in SITES}


@pytest.fixture(scope="session")
def contract(make_contract: Callable[..., Contract], keys: dict[str, Ed25519PrivateKey]) -> Contract:
    made: Contract = make_contract(SITES, {site: public_key(key) for site, key in keys.items()}, projection=True)
    return made


@pytest.fixture
def signed(keys: dict[str, Ed25519PrivateKey]) -> Callable[[Update], Update]:
    """The update with the signature of its own site, whatever was done to it."""

    def resign(update: Update) -> Update:
        digest = release_sha256(update)
        return replace(update, meta={**update.meta, "signature": sign(keys[update.site], SIGNED, digest)})

    return resign


@pytest.fixture
def updates(contract: Contract, signed: Callable[[Update], Update]) -> dict[str, Update]:
    generator = np.random.default_rng(0)
    made = {}
    for number, (site, agreed) in enumerate(contract.sites.items()):
        params = {
            name: generator.normal(size=contract.shapes[name]).astype(np.float32)
            for name in sorted(allowed_names(contract.shapes, agreed.specialties))
        }
        claim = make_claim(contract, site, "job", 10**9, contract.promise.delta, HEAD)
        meta = {"job": JOB, "nonce": f"{number:032x}", "claim": claim, "ledger_head": HEAD}
        made[site] = signed(Update(site, 1, params, meta))
    return made
