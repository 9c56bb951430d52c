"""Strict checks of one update, whole, before it touches the aggregate: accepted, or refused with a reason."""

import numpy as np

from clinifed.contract import Contract
from clinifed.errors import UpdateError
from clinifed.messages import META_KEYS, Update, allowed_names

__all__ = ["check_update"]


def check_update(update: Update, contract: Contract, round_number: int, sent_already: bool) -> None:
    """Raise UpdateError unless ``update`` is exactly what its site may send in this round.

    Guarantees:
        - Accepted updates hold the trunk and the heads of the site's own specialties, no more and no less.
        - Accepted arrays are float32, finite and of the contract's shape.
        - One update per site and round, for the current round and this contract.

    Raises:
        UpdateError: ``reason`` is one of unknown_site, wrong_round, duplicate, wrong_contract, wrong_meta,
            wrong_names, wrong_dtype, wrong_shape, not_finite.
    """
    site, name = contract.sites.get(update.site), update.site
    if site is None:
        raise UpdateError("unknown_site", f"{name} is not in the contract")
    if update.round != round_number:
        raise UpdateError("wrong_round", f"{name} sent round {update.round!r} in round {round_number}")
    if sent_already:
        raise UpdateError("duplicate", f"{name} sent a second update in round {round_number}")
    if update.meta.get("contract_sha256") != contract.sha256():
        raise UpdateError("wrong_contract", f"{name} trained under another contract")
    if extra := set(update.meta) - set(META_KEYS):
        raise UpdateError("wrong_meta", f"{name} sent metadata {sorted(extra)}")
    expected = allowed_names(contract.shapes, site.specialties)
    if set(update.params) != expected:
        raise UpdateError(
            "wrong_names",
            f"{name}: unexpected {sorted(set(update.params) - expected)}, "
            f"missing {sorted(expected - set(update.params))}",
        )
    for key, value in update.params.items():
        if not isinstance(value, np.ndarray) or value.dtype != np.float32:
            raise UpdateError("wrong_dtype", f"{name}: {key} is {getattr(value, 'dtype', type(value))}, not float32")
        if value.shape != contract.shapes[key]:
            raise UpdateError("wrong_shape", f"{name}: {key} is {value.shape}, not {contract.shapes[key]}")
        if not np.isfinite(value).all():
            raise UpdateError("not_finite", f"{name}: {key} holds NaN or infinity")
