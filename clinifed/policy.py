"""What one hospital permits, in a file of its own. A job can read nothing else at the site, and change nothing here.

In a simulation the file is written from the federation's configuration; at a real site the hospital writes it.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from clinifed.errors import PrivacyError
from clinifed.load import read_yaml, validate

__all__ = ["POLICY_FOLDER", "Budget", "SitePolicy", "find_policy"]

# Beneath a site's FLARE folder `local`, which no job can write.
POLICY_FOLDER = "clinifed"


class _Policy(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Budget(_Policy):
    """The site's lifetime budget per patient."""

    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)


class SitePolicy(_Policy):
    """One site's policy file."""

    site: str
    manifest: Path
    ledger: Path  # one for the site's lifetime, outside any run
    cache: Path  # embeddings of the frozen tower; owner-only, never leaves
    diary: Path  # local figures per round (seconds, bytes, skipped images); never leaves
    budget: Budget
    permit_privacy_off: bool = False  # only ever for data marked public or synthetic
    model_ref: str | None = None  # where this site keeps the base model, if not where the contract says


def find_policy(local: Path, site: str) -> SitePolicy:
    """The policy of ``site`` in its FLARE folder ``local``: ``local/clinifed/<site>.yaml``.

    Raises:
        PrivacyError: it is missing or damaged. Without a policy nothing is read and nothing leaves.
    """
    path = local / POLICY_FOLDER / f"{site}.yaml"
    if not path.is_file():
        raise PrivacyError(f"site {site}: no policy file {path}; without one, nothing may run here")
    policy = validate(SitePolicy, read_yaml(path), str(path))
    if policy.site != site:
        raise PrivacyError(f"{path}: the policy is for site {policy.site!r}, but this is {site!r}")
    return policy
