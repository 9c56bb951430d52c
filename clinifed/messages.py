"""What may leave a site: named arrays, and a short list of metadata keys. Executor and server meet only here."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final, Literal, get_args

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from clinifed.files import canonical_json

__all__ = [
    "DECLARABLE",
    "HEADS",
    "META_KEYS",
    "SIGNED",
    "TASK_FINISH",
    "TASK_HANDSHAKE",
    "TRUNK",
    "Declarable",
    "Parameters",
    "Update",
    "allowed_names",
    "array_problem",
    "head_name",
    "packed",
    "projected",
    "release_sha256",
    "rounded",
    "specialty_of",
    "unpacked",
    "update_norm",
]

Parameters = dict[str, NDArray[np.float32]]

TRUNK = "trunk."
HEADS = "heads."

# FLARE tasks of ours, beside FLARE's own "train".
TASK_HANDSHAKE: Final = "clinifed_handshake"  # before a job's first round: who holds what
TASK_FINISH: Final = "clinifed_finish"  # the run is over: what is left of its reservation returns to the budget

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


def array_problem(name: str, value: Any, shape: tuple[int, ...]) -> tuple[str, str] | None:
    """Why ``value`` cannot stand for the shared parameter ``name``: a reason of one word and a text; None if it can."""
    if not isinstance(value, np.ndarray) or value.dtype != np.float32:
        return "wrong_dtype", f"{name} is {getattr(value, 'dtype', type(value))}, not float32"
    if value.shape != shape:  # an array of shape (1,) would be spread over the parameter
        return "wrong_shape", f"{name} is {value.shape}, not {shape}"
    if not np.isfinite(value).all():
        return "not_finite", f"{name} holds NaN or infinity"
    return None


def update_norm(params: Parameters) -> float:
    """L2 norm over all arrays of an update together, in float64; NaN or infinity where an array holds it."""
    return math.sqrt(sum(float(np.square(params[name], dtype=np.float64).sum()) for name in sorted(params)))


def projected(params: Parameters, bound: float) -> Parameters:
    """``params`` on the ball of radius ``bound``: as they are within it, scaled onto it outside.

    Scaling what is noised already is post-processing: it costs no epsilon.

    Guarantees:
        - The norm of what is returned is at most ``bound``.
    """
    norm, scaled, margin = update_norm(params), params, 1 - 1e-6  # more than rounding to float32 may add
    while update_norm(scaled) > bound:  # again only beneath the smallest normal number, where rounding adds much
        factor, margin = bound / norm * margin, margin / 2
        scaled = {name: (value * np.float64(factor)).astype(np.float32) for name, value in params.items()}
    return scaled


def rounded(params: Parameters, bound: float) -> Parameters:
    """``params`` as float32 whose values bfloat16 holds as well, half to even, and no longer than ``bound``.

    Done after the noise, so that it costs no epsilon; the hash that is signed and recorded is of the rounded values.

    Guarantees:
        - The norm of what is returned is at most ``bound``: a value grows by no more than a 256th.
        - :func:`unpacked` of :func:`packed` of it is the same, to the last bit.
    """
    near = projected(params, bound / (1 + 2**-8))
    most = np.float32(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    rounds = {}
    for name, value in near.items():
        # Far below any noise bfloat16 has fewer digits, and a value could grow by more; far above, it has infinity.
        whole = np.where(np.abs(value) < 2.0**-110, np.float32(0), np.clip(value, -most, most))
        rounds[name] = whole.astype(ml_dtypes.bfloat16).astype(np.float32)
    return rounds


def packed(params: Parameters) -> dict[str, NDArray[np.uint16]]:
    """Rounded values as bfloat16's 16 bits, which is how half as many bytes travel; FLARE knows no bfloat16."""
    return {name: value.astype(ml_dtypes.bfloat16).view(np.uint16) for name, value in params.items()}


def unpacked(params: Mapping[str, Any]) -> Parameters:
    """What was packed, as float32; what is no array of 16 bits is left as it is, for whoever checks it."""
    return {
        name: value.view(ml_dtypes.bfloat16).astype(np.float32)
        if isinstance(value, np.ndarray) and value.dtype == np.uint16
        else value
        for name, value in params.items()
    }
