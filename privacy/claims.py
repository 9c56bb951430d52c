"""What is claimed of privacy: an epsilon never goes without its delta, unit, relation, N₀, trust model, accountant and
the head of the ledger that it adds up from. The form is that of NIST SP 800-226 (2025), and is checked everywhere.
"""

import json
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import jsonschema

from clinifed import __version__
from clinifed.contract import Contract
from clinifed.errors import PrivacyError
from clinifed.privacy.accountant import epsilon_of

__all__ = ["TRUST_MODEL", "check_claim", "claim_schema", "disagreements", "make_claim", "statement"]

_SCHEMA = "claim.schema.json"
TRUST_MODEL = "each site adds its own noise before anything leaves it"
NO_NOISE = "none: public or synthetic data only"


def claim_schema() -> dict[str, Any]:
    """The JSON Schema of a claim, as shipped with the package."""
    schema: dict[str, Any] = json.loads(files("clinifed.privacy").joinpath(_SCHEMA).read_text(encoding="utf-8"))
    return schema


@cache
def _validator() -> jsonschema.Draft202012Validator:
    """Made once: claims are checked in every round, at the site and for each update at the server."""
    return jsonschema.Draft202012Validator(claim_schema())


def statement() -> dict[str, Any]:
    """What is true of every epsilon that clinifed computes: unit, relation, trust model, accountant and its version."""
    return {
        "unit": "patient",
        "relation": "add_remove",
        "trust_model": TRUST_MODEL,
        "accountant": {"name": "gaussian-dp filter", "version": f"clinifed {__version__}"},
    }


def make_claim(
    contract: Contract,
    site: str,
    scope: Literal["job", "lifetime"],
    units: int = 0,
    delta: float | None = None,
    head: str | None = None,
    budget: float | None = None,
) -> dict[str, Any]:
    """The claim of ``site`` under ``contract``.

    Args:
        scope: what ``units`` cover: this job, which is all that others are told, or all jobs of the site's ledger.
        units: charged so far, units of 1e-12 of μ².
        delta: at which epsilon is stated.
        head: of the ledger, once the charges are in.
        budget: epsilon of the site's lifetime budget; stays at the site.

    Raises:
        PrivacyError: the claim is incomplete.
    """
    promise = contract.promise
    private = promise.mode == "dp"
    claim = {
        **statement(),
        "schema_version": 1,
        "scope": scope,
        "epsilon": epsilon_of(units, delta) if private and delta else None,
        "delta": delta if private else None,
        "mechanism": promise.mechanism if private else NO_NOISE,
        "noise_multiplier": promise.noise_multiplier if private else None,
        "max_grad_norm": promise.max_grad_norm if private else None,
        "nominal_patients": contract.sites[site].nominal_patients,
        "ledger_head": head if private else None,
        "budget_epsilon": budget if private else None,
        "contract_sha256": contract.sha256(),
        **({} if private else {"trust_model": NO_NOISE, "accountant": None}),
    }
    check_claim(claim)
    return claim


def check_claim(claim: Any) -> None:
    """Refuse a claim that is incomplete or malformed.

    Raises:
        PrivacyError: naming what is missing.
    """
    errors = sorted(_validator().iter_errors(claim), key=lambda e: list(e.path))
    if errors:
        raise PrivacyError(
            *(f"privacy claim: {'.'.join(map(str, e.path)) or 'whole'}: {e.message[:200]}" for e in errors)
        )


def disagreements(claim: Any, contract: Contract, site: str) -> list[str]:
    """In what a received claim is malformed, or not what ``contract`` says; empty for an honest one."""
    try:
        check_claim(claim)
    except PrivacyError as error:
        return list(error.problems)
    private = contract.promise.mode == "dp"
    agreed = {
        "contract_sha256": contract.sha256(),
        "nominal_patients": contract.sites[site].nominal_patients,
        "noise_multiplier": contract.promise.noise_multiplier if private else None,
        "max_grad_norm": contract.promise.max_grad_norm if private else None,
        "scope": "job",
    }
    return [
        f"{key} is {claim[key]!r}, the contract says {value!r}" for key, value in agreed.items() if claim[key] != value
    ]
