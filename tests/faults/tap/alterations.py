"""What a hostile site makes of its update behind its own door: each is signed anew, with the key of its hospital.

An attacker inside the hospital has that key, so each of these meets the server's check of the thing itself, not the
signature. Loaded in the site's job process by its own ``sitecustomize``; the altered result goes out as it is.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from nvflare.apis.dxo import DataKind, from_shareable
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.app_constant import AppConstants

from clinifed.executors.filters import to_shareable
from clinifed.messages import SIGNED, Update, release_sha256
from clinifed.policy import SitePolicy, find_policy
from clinifed.privacy.outbox import Outbox
from clinifed.signing import read_signing_key, sign

SITE = os.environ["CLINIFED_KIT"]  # the hostile one
ANOTHER = "alder"  # an honest one, of other specialties
NONCE = "0123456789abcdef" * 2


def _policy() -> SitePolicy:
    return find_policy(Path(sys.argv[sys.argv.index("-m") + 1]) / "local", SITE)  # FLARE: -m <workspace>


def _signed(update: Update, key: Ed25519PrivateKey | None = None) -> Update:
    key = key or read_signing_key(_policy().signing_key)
    return _told(update, signature=sign(key, SIGNED, release_sha256(update)))


def _told(update: Update, **meta) -> Update:
    return replace(update, meta={**update.meta, **meta})


def _claimed(update: Update, **claim) -> Update:
    return _told(update, claim={**update.meta["claim"], **claim})


def _each(update: Update, change) -> Update:
    return replace(update, params={name: change(value) for name, value in update.params.items()})


def _first(update: Update, change) -> Update:
    """One array of it changed, the others as they are."""
    name = sorted(update.params)[0]
    return replace(update, params={**update.params, name: change(update.params[name])})


def _with(update: Update, **params) -> Update:
    return replace(update, params={**update.params, **{name.replace("__", "."): v for name, v in params.items()}})


def _without(update: Update, *parts: str) -> Update:
    return replace(update, params={n: v for n, v in update.params.items() if not any(part in n for part in parts)})


def _before(update: Update, site: str = SITE) -> Update:
    """What ``site`` sent in the round before; it lies in its outbox, and another's came over the network."""
    outbox = _policy().outbox_folder
    sent = Outbox(outbox.parents[1] / site / outbox.name).get(update.meta["job"], update.round - 1)
    assert sent is not None
    return sent


def _head_of_another(update: Update) -> Update:
    """Its own update, and the head of a specialty that it does not have."""
    return replace(update, params={**_before(update, ANOTHER).params, **update.params})


CHANGES = {
    "nan": lambda u: _first(u, lambda v: np.where(np.arange(v.size).reshape(v.shape) == 0, np.float32("nan"), v)),
    "inf": lambda u: _first(u, lambda v: np.full_like(v, np.inf)),
    "unknown name": lambda u: _with(u, trunk__backdoor=np.zeros(1, np.float32)),
    "unknown head": lambda u: _with(u, heads__emergency__bias=np.zeros(3, np.float32)),
    "missing name": lambda u: _without(u, "cardiology", "bias"),
    "another site's head": _head_of_another,
    "wrong shape": lambda u: _first(u, lambda v: np.concatenate([v, v])),
    "broadcastable": lambda u: _first(u, lambda v: np.ones((1,) * v.ndim, np.float32)),
    "scalar": lambda u: _first(u, lambda v: np.float32(1).reshape(())),
    "float64": lambda u: _first(u, lambda v: v.astype(np.float64)),
    "text": lambda u: _first(u, lambda v: np.full(v.shape, "1")),
    "x1e6": lambda u: _each(u, lambda v: v * np.float32(1e6)),
    "x-100": lambda u: _each(u, lambda v: v * np.float32(-100)),
    "weight": lambda u: _told(u, NUM_STEPS_CURRENT_ROUND=1e12),
    "metrics": lambda u: _told(u, initial_metrics={"auroc": 1.0}),
    "another's name": lambda u: _told(u, site_name="alder"),
    "undeclared": lambda u: _told(u, declared={"patient_names": ["x"]}),
    "loss is text": lambda u: _told(u, declared={"train_loss": "x"}),
    "count is a list": lambda u: _told(u, declared={"patient_count": [[1]]}),
    "other round": lambda u: replace(u, round=u.round + 1),
    "other run": lambda u: _told(u, job="another"),
    "other contract": lambda u: _claimed(u, contract_sha256="0" * 64),
    "other claim": lambda u: _claimed(u, nominal_patients=10**6),
    "no claim": lambda u: replace(u, meta={k: v for k, v in u.meta.items() if k != "claim"}),
    # With the round's number and a new signature; what names a charge once is the nonce.
    "replay": lambda u: replace(_before(u), round=u.round),
    "another site's update": lambda u: _told(replace(_before(u, ANOTHER), round=u.round), nonce=NONCE),
}
UNSIGNED = {
    "replay as it was": _before,
    "another site's update as it was": lambda u: replace(_before(u, ANOTHER), round=u.round),
    "changed after signing": lambda u: _each(u, lambda v: v * np.float32(2)),
    "unsigned": lambda u: replace(u, meta={k: v for k, v in u.meta.items() if k != "signature"}),
    "foreign key": lambda u: _signed(u, Ed25519PrivateKey.generate()),
}


def _update(shareable: Shareable) -> Update:
    dxo = from_shareable(shareable)
    return Update(SITE, shareable.get_header(AppConstants.CURRENT_ROUND), dict(dxo.data), dict(dxo.meta))


def _unsignable(update: Update, **meta) -> Shareable:
    """What our own hash refuses to read: nobody can sign it, but anybody can send it."""
    return to_shareable(_told(update, **meta))


def _whole(update: Update) -> Shareable:
    shareable = to_shareable(_signed(update))
    dxo = from_shareable(shareable)
    dxo.data_kind = DataKind.WEIGHTS  # FULL: it would take the global model's place
    changed = dxo.to_shareable()
    changed.set_header(AppConstants.CURRENT_ROUND, update.round)
    return changed


MESSAGES = {
    "full": _whole,
    "NaN as loss": lambda u: _unsignable(u, declared={"train_loss": float("nan")}),
    "NaN in the claim": lambda u: _unsignable(u, claim={**u.meta["claim"], "budget_epsilon": float("nan")}),
    "numbers as names": lambda u: to_shareable(replace(u, params={**u.params, 7: np.zeros(1, np.float32)})),
    "numbers as keys": lambda u: to_shareable(replace(u, meta={**u.meta, 7: 1, "x": 1})),
    "no parameters": lambda u: to_shareable(_signed(replace(u, params={}))),
    "not an update": lambda u: Shareable({"weights": "none"}),
    "success without anything": lambda u: make_reply("OK"),
}


def alter(how: str, shareable: Shareable) -> Shareable:
    """The result that leaves instead of ``shareable``."""
    update = _update(shareable)
    if how in MESSAGES:
        return MESSAGES[how](update)
    return to_shareable(_signed(CHANGES[how](update)) if how in CHANGES else UNSIGNED[how](update))
