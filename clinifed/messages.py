"""What may leave a site: named arrays, and a short list of metadata keys. Executor and server meet only here."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from clinifed.files import canonical_json

__all__ = [
    "DECLARABLE",
    "HEADS",
    "META_KEYS",
    "SIGNED",
    "TRUNK",
    "Declarable",
    "Parameters",
    "Update",
    "allowed_names",
    "head_name",
    "job_key",
    "release_sha256",
    "specialty_of",
]

Parameters = dict[str, NDArray[np.float32]]

TRUNK = "trunk."
HEADS = "heads."

# The only metadata an update carries; everything else that FLARE adds is FLARE's own.
META_KEYS: Final = ("job", "nonce", "claim", "ledger_head", "signature", "declared")
_SIGNATURE: Final = "signature"
SIGNED: Final = "update"  # the purpose of that signature

# What a site may tell beside its update, each only where its own policy declares it. None of it is noised.
# Paths, UIDs and names are not among them: nobody needs them.
Declarable = Literal["patient_count", "image_count", "label_counts", "train_loss"]
DECLARABLE: Final[tuple[str, ...]] = get_args(Declarable)


@dataclass(frozen=True)
class Update:
    """One site's change to the shared parameters in one round (a DIFF in FLARE's words)."""

    site: str
    round: int
    params: Parameters  # name → float32 array, same shape as the global parameter
    meta: Mapping[str, Any] = field(default_factory=dict)  # keys: META_KEYS


def job_key(flare_job: str, run: str) -> str:
    """The name of a job in ledgers and updates.

    FLARE's simulator calls every job ``simulate_job``, and one exported job may be submitted twice: the two together
    are unique.
    """
    return f"{flare_job}.{run}"


def release_sha256(update: Update) -> str:
    """What a ledger records, and a site signs, of an update: site, round, parameters and metadata but the signature.

    Returns:
        SHA-256, hexadecimal, over the canonical JSON of names, shapes and metadata, and the little-endian float32
        bytes of every array in the order of the names.
    """
    names = sorted(update.params)
    meta = {key: value for key, value in update.meta.items() if key != _SIGNATURE}
    shapes = {name: list(update.params[name].shape) for name in names}
    digest = sha256(canonical_json({"site": update.site, "round": update.round, "meta": meta, "shapes": shapes}))
    for name in names:
        digest.update(np.ascontiguousarray(update.params[name], dtype="<f4").tobytes())
    return digest.hexdigest()


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
