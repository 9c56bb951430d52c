"""What all sites agree on before anything runs: public numbers only, one hash. It travels with the job.

A site computes its own cost from the contract and refuses what its policy does not permit; nothing in a contract
can widen a policy.
"""

import json
from hashlib import sha256
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from clinifed.config import Aggregation, Specialty, Training
from clinifed.errors import ConfigError
from clinifed.files import canonical_json
from clinifed.load import validate

__all__ = ["BaseModelRef", "Contract", "ContractSite", "Promise"]


class _Agreed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseModelRef(_Agreed):
    """Which frozen base model; every site must hold the same weights."""

    ref: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    basis_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")  # of the public basis that heads train in


class Promise(_Agreed):
    """The privacy mechanism of the whole run, and the claim that follows from it."""

    mode: Literal["dp", "off"]
    epsilon: float
    delta: float
    unit: Literal["patient"] = "patient"
    relation: Literal["add_remove"] = "add_remove"
    mechanism: str = "gaussian, full batch"
    noise_multiplier: float  # σ, calibrated once for all releases; 0 with privacy off
    max_grad_norm: float  # C
    reserve_rounds: int = Field(0, ge=0)  # more rounds that sigma pays for, for charges that a crash lost
    releases: int  # (rounds + reserve rounds) · local epochs: every local step is charged
    objective: str


class ContractSite(_Agreed):
    """One site's public part."""

    specialties: tuple[str, ...]
    nominal_patients: int = Field(ge=1)  # N₀
    weight: float = Field(gt=0)  # in the average; from the contract, never from an update
    norm_bound: float = Field(gt=0, allow_inf_nan=False)  # of an update, L2 over all it sends; honest sites project
    public_key: str | None = None  # Ed25519, hexadecimal: whose signature this site's updates carry


class Contract(_Agreed):
    """The agreement of one federation job."""

    schema_version: Literal[3] = 3
    federation: str
    clinifed_version: str
    base_model: BaseModelRef
    specialties: dict[str, Specialty]
    training: Training
    aggregation: Aggregation
    promise: Promise
    rounds: int = Field(ge=1)
    min_clients: int = Field(ge=1)  # without so many, no job starts
    max_clients: int
    sites: dict[str, ContractSite]
    shapes: dict[str, tuple[int, ...]]  # every shared parameter, float32

    @model_validator(mode="after")
    def _limits(self) -> Self:
        if not self.aggregation.quorum <= self.min_clients <= len(self.sites) <= self.max_clients:
            raise ValueError(
                f"quorum ({self.aggregation.quorum}) <= min_clients ({self.min_clients}) <= sites ({len(self.sites)}) "
                f"<= max_clients ({self.max_clients}) does not hold"
            )
        return self

    def text(self) -> str:
        """The contract as one line of canonical JSON, in which it travels.

        FLARE reads a job's configuration as HOCON, where a name with dots in it becomes several: a mapping would not
        arrive as it was sent.
        """
        return canonical_json(self.model_dump(mode="json")).decode()

    @classmethod
    def read(cls, text: str) -> Self:
        """The contract in ``text``.

        Raises:
            ConfigError: it is none, or of another version of clinifed.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"the job's contract: not valid JSON: {error}") from None
        return validate(cls, content, "the job's contract")

    def sha256(self) -> str:
        """The hash by which a site's policy approves this contract."""
        return sha256(self.text().encode()).hexdigest()
