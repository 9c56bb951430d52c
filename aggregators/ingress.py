"""Strict checks of one update, whole, before it touches the aggregate: accepted, or refused with a reason."""

import math
import re
from collections.abc import Collection
from typing import Any

from clinifed.contract import Contract
from clinifed.errors import UpdateError
from clinifed.files import canonical_json
from clinifed.messages import (
    DECLARABLE,
    META_KEYS,
    SIGNED,
    Update,
    allowed_names,
    array_problem,
    release_sha256,
    update_norm,
)
from clinifed.privacy.claims import disagreements
from clinifed.signing import verify

__all__ = ["check_update"]

_NONCE = re.compile(r"[0-9a-f]{32}")
_MOST = 10**12  # of patients, images or labels, whatever a site says
_SHORT = 200  # characters of a site's own words in a log


def check_update(
    update: Update, contract: Contract, round_number: int, sent_already: bool, job: str, seen: Collection[str] = ()
) -> None:
    """Raise UpdateError unless ``update`` is exactly what its site may send in this round.

    Args:
        job: this job's key.
        seen: nonces that were accepted before.

    Guarantees:
        - Accepted updates hold the trunk and the heads of the site's own specialties, no more and no less.
        - Accepted arrays are float32, finite and of the contract's shape, together within the contract's norm bound.
        - One update per site and round, for the current round and this contract.
        - A site whose key the contract names is taken at its signature only.
        - A claim that is incomplete, or not of this contract, is refused.
        - What is accepted can be written down: the metadata is JSON, and each declared figure has its own form.

    Raises:
        UpdateError: ``reason`` is one of unknown_site, wrong_round, duplicate, wrong_job, replayed, wrong_contract,
            wrong_claim, wrong_meta, wrong_signature, wrong_names, wrong_dtype, wrong_shape, not_finite, too_long.
    """
    site, name = contract.sites.get(update.site), update.site
    if site is None:
        raise UpdateError("unknown_site", f"{name} is not in the contract")
    if update.round != round_number:
        raise UpdateError("wrong_round", f"{name} sent round {update.round!r} in round {round_number}")
    if sent_already:
        raise UpdateError("duplicate", f"{name} sent a second update in round {round_number}")
    _check_meta(update, contract, job, seen)
    expected = allowed_names(contract.shapes, site.specialties)
    if set(update.params) != expected:
        raise UpdateError(
            "wrong_names",
            f"{name}: unexpected {_names(set(update.params) - expected)}, "
            f"missing {_names(expected - set(update.params))}",
        )
    for key, value in update.params.items():
        if problem := array_problem(key, value, contract.shapes[key]):
            raise UpdateError(problem[0], f"{name}: {problem[1]}")
    if (norm := update_norm(update.params)) > site.norm_bound:
        raise UpdateError(
            "too_long", f"{name}: the update's L2 norm is {norm:.6g}, the contract's bound {site.norm_bound:.6g}"
        )
    public = site.public_key
    if public and not verify(public, SIGNED, release_sha256(update), str(update.meta.get("signature"))):
        raise UpdateError("wrong_signature", f"{name}: not signed by the key that the contract names")


def _check_meta(update: Update, contract: Contract, job: str, seen: Collection[str]) -> None:
    """The metadata: this job's, fresh, with an honest claim, and nothing that may not be there."""
    name, meta = update.site, update.meta
    claim = meta.get("claim")
    if not isinstance(claim, dict) or claim.get("contract_sha256") != contract.sha256():
        raise UpdateError("wrong_contract", f"{name} trained under another contract")
    declared = meta.get("declared", {})
    extra = set(meta) - set(META_KEYS)
    extra |= set(declared) - set(DECLARABLE) if isinstance(declared, dict) else {"declared"}
    if extra:
        raise UpdateError("wrong_meta", f"{name} sent metadata {_names(extra)}")
    try:
        canonical_json(dict(meta))  # it is hashed, and recorded with the round
    except (TypeError, ValueError, RecursionError) as error:
        raise UpdateError("wrong_meta", f"{name} sent metadata that is no JSON ({type(error).__name__})") from None
    labels = {n: len(contract.specialties[n].labels) for n in contract.sites[name].specialties}
    malformed = [key for key, value in declared.items() if not _well_formed(key, value, labels)]
    if malformed:
        raise UpdateError("wrong_meta", f"{name} declared {_names(malformed)} in another form than theirs")
    if meta.get("job") != job:
        raise UpdateError("wrong_job", f"{name} sent an update of job {meta.get('job')!r:.{_SHORT}} into {job!r}")
    nonce = meta.get("nonce")
    if not isinstance(nonce, str) or not _NONCE.fullmatch(nonce):
        raise UpdateError("wrong_meta", f"{name} sent nonce {nonce!r:.{_SHORT}}")
    if nonce in seen:
        raise UpdateError("replayed", f"{name} sent an update that was accepted before")
    wrong = disagreements(claim, contract, name)
    if claim.get("ledger_head") != meta.get("ledger_head"):
        wrong.append("ledger_head is another one than the claim's")
    if wrong:
        raise UpdateError("wrong_claim", *(f"{name}: {text}" for text in wrong))


def _names(names: Collection[Any]) -> str:
    """For a log: a site may have sent anything, and as much as it likes."""
    return str(sorted(map(str, names)))[:_SHORT]


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def _well_formed(key: str, value: Any, labels: dict[str, int]) -> bool:
    """Whether a declared figure has the form in which it is recorded, averaged and printed.

    Args:
        labels: the site's specialties, and how many labels each has.
    """
    if key == "train_loss":
        return isinstance(value, float) and math.isfinite(value)
    if key == "label_counts":
        return (
            isinstance(value, dict)
            and set(value) <= set(labels)
            and all(isinstance(c, list) and len(c) == labels[n] and all(map(_count, c)) for n, c in value.items())
        )
    return _count(value)  # of patients, of images
