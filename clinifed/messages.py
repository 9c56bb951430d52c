"""What may leave a site: named arrays, and a short list of metadata keys. Executor and server meet only here."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "HEADS",
    "META_KEYS",
    "TRUNK",
    "Parameters",
    "Update",
    "allowed_names",
    "head_name",
    "specialty_of",
]

Parameters = dict[str, NDArray[np.float32]]

TRUNK = "trunk."
HEADS = "heads."

# The only metadata an update carries; everything else that FLARE adds is FLARE's own.
META_KEYS = ("contract_sha256", "release_sha256", "ledger_head", "epsilon_claim")


@dataclass(frozen=True)
class Update:
    """One site's change to the shared parameters in one round (a DIFF in FLARE's words)."""

    site: str
    round: int
    params: Parameters  # name → float32 array, same shape as the global parameter
    meta: Mapping[str, str | float] = field(default_factory=dict)  # keys: META_KEYS


def head_name(specialty: str, parameter: str) -> str:
    """``heads.<specialty>.<parameter>``, the shared name of a head's weight or bias."""
    return f"{HEADS}{specialty}.{parameter}"


def specialty_of(name: str) -> str | None:
    """The specialty a parameter belongs to, or None for the trunk that all sites share."""
    return name.split(".")[1] if name.startswith(HEADS) else None


def allowed_names(names: Iterable[str], specialties: Iterable[str]) -> set[str]:
    """The parameters a site of these specialties sends: the trunk, and the heads of its own specialties."""
    mine = set(specialties)
    return {n for n in names if n.startswith(TRUNK) or specialty_of(n) in mine}
