"""What one hospital permits, in a file of its own. A job can read nothing else at the site, and change nothing here.

In a simulation the file is written from the federation's configuration; at a real site the hospital writes it. What
it does not name it does not permit: without approved contracts and coordinators nothing runs.
"""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from clinifed.errors import ConfigError, PrivacyError
from clinifed.load import read_yaml, validate
from clinifed.messages import Declarable

__all__ = ["JOB_CLASSES", "POLICY_FOLDER", "Budget", "SitePolicy", "find_policy"]

# Beneath a site's FLARE folder `local`, which no job can write.
POLICY_FOLDER = "clinifed"

# All that a job may name, class by class: FLARE calls whatever a job names with the arguments that it brings, before
# anybody looks at the contract, so a whole package on the list would be a way to call any function of it. FLARE's stock
# list is left out: it would let a job bring executors and senders that the release filter never sees.
JOB_CLASSES: dict[str, tuple[str, ...]] = {
    "site": ("clinifed.executors.flare.SiteExecutor",),
    "server": (
        "clinifed.aggregators.flare.FederatedRounds",
        "clinifed.aggregators.specialty.SpecialtyAggregator",
        "clinifed.aggregators.tracking.FiguresReceiver",
    ),
}

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Policy(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Budget(_Policy):
    """The site's lifetime budget per patient."""

    epsilon: float = Field(gt=0, lt=1000)
    delta: float = Field(gt=0, lt=1)


class SitePolicy(_Policy):
    """One site's policy file."""

    site: str
    manifest: Path
    cohort: str = "all"  # a name for whose images these are; recorded in the ledger, never a budget of its own
    ledger: Path  # one for the site's lifetime, outside any run
    anchor: Path | None = None  # the ledger's head in a second file, best on another disk; default: beside the ledger
    outbox: Path | None = None  # what was released, to be sent again after a crash; default: beside the ledger
    signing_key: Path  # Ed25519, owner-only; signs what leaves
    cache: Path  # embeddings of the frozen tower; owner-only, never leaves
    diary: Path  # local figures per round (seconds, bytes, skipped images); never leaves; `trainer.log` lies beside it
    budget: Budget
    reservation_hours: float = Field(168.0, gt=0)  # a reservation without a record for so long is a dead job's
    min_nominal_patients: int = Field(10, ge=1)  # the least N₀ a contract may name for this site
    approved_contracts: tuple[Hash, ...] = ()  # by their hash; none, none runs
    coordinators: tuple[str, ...] = ()  # whose jobs may run: FLARE's submitter, or `simulator`
    # What may leave un-noised beside the update; the model's card then lists it.
    declare: tuple[Declarable, ...] = ()
    officers: dict[str, Hash] = Field(default_factory=dict)  # who may approve a budget increase: name → Ed25519 key
    permit_privacy_off: bool = False  # only ever for data marked public or synthetic
    model_ref: str | None = None  # where this site keeps the base model, if not where the contract says
    basis: Path | None = None  # the file of the public basis, where a contract's heads train in one
    threads: int | None = Field(None, ge=1)  # of the trainer's process; default: torch's, one for each core

    @property
    def outbox_folder(self) -> Path:
        """Where released updates wait to be sent again."""
        return self.outbox or self.ledger.with_name(f"{self.ledger.name}.outbox")

    @property
    def cohorts_folder(self) -> Path:
        """Which patients took part in which job, as keyed pseudonyms; for the day on which one of them asks."""
        return self.ledger.with_name(f"{self.ledger.name}.cohorts")

    @property
    def log(self) -> Path:
        """What the trainer says, owner-only; it stays at the site."""
        return self.diary.with_name("trainer.log")


def find_policy(local: Path, site: str) -> SitePolicy:
    """The policy of ``site`` in its FLARE folder ``local``: ``local/clinifed/<site>.yaml``.

    Raises:
        PrivacyError: it is missing, damaged, or another site's. Without a policy nothing is read and nothing leaves.
    """
    path = local / POLICY_FOLDER / f"{site}.yaml"
    if not path.is_file():
        raise PrivacyError(f"site {site}: no policy file {path}; without one, nothing may run here")
    try:
        policy = validate(SitePolicy, read_yaml(path), str(path))
    except ConfigError as error:
        raise PrivacyError(*error.problems) from error
    if policy.site != site:
        raise PrivacyError(f"{path}: the policy is for site {policy.site!r}, but this is {site!r}")
    return policy
