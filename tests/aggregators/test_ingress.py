"""Ingress: an update is accepted whole or refused with a named reason."""

from dataclasses import replace

import numpy as np
import pytest

from clinifed.aggregators.ingress import check_update
from clinifed.errors import UpdateError

HEAD, TRUNK = "heads.radiology.weight", "trunk.projection.weight"


def test_an_honest_update_passes(contract, updates):
    for update in updates.values():
        check_update(update, contract, 1, sent_already=False)


def spoil(update, **params):
    return replace(update, params={**update.params, **params})


HOSTILE = {
    "not_finite": [
        lambda u: spoil(u, **{HEAD: u.params[HEAD] * np.float32("nan")}),
        lambda u: spoil(u, **{TRUNK: np.full_like(u.params[TRUNK], np.inf)}),
    ],
    "wrong_names": [
        lambda u: spoil(u, extra=np.zeros(1, np.float32)),
        lambda u: replace(u, params={HEAD: u.params[HEAD]}),
        lambda u: spoil(u, **{"heads.emergency.bias": np.zeros(3, np.float32)}),
        lambda u: replace(u, params={}),
    ],
    "wrong_shape": [
        lambda u: spoil(u, **{HEAD: u.params[HEAD].T.copy()}),
        lambda u: spoil(u, **{TRUNK: np.zeros((1, 1), np.float32)}),  # would broadcast
        lambda u: spoil(u, **{TRUNK: np.zeros((), np.float32)}),
    ],
    "wrong_dtype": [
        lambda u: spoil(u, **{HEAD: u.params[HEAD].astype(np.float64)}),
        lambda u: spoil(u, **{HEAD: u.params[HEAD].tolist()}),
    ],
    "wrong_round": [lambda u: replace(u, round=0), lambda u: replace(u, round=None)],
    "unknown_site": [lambda u: replace(u, site="mallory")],
    "wrong_contract": [lambda u: replace(u, meta={}), lambda u: replace(u, meta={"contract_sha256": "0" * 64})],
    "wrong_meta": [lambda u: replace(u, meta={**u.meta, "NUM_STEPS_CURRENT_ROUND": 1e12})],
}


@pytest.mark.parametrize(("reason", "change"), [(r, c) for r, changes in HOSTILE.items() for c in changes])
def test_a_hostile_update_is_refused_with_its_reason(contract, updates, reason, change):
    with pytest.raises(UpdateError) as caught:
        check_update(change(updates["alder"]), contract, 1, sent_already=False)
    assert caught.value.reason == reason


def test_a_second_update_in_a_round_is_refused(contract, updates):
    with pytest.raises(UpdateError) as caught:
        check_update(updates["alder"], contract, 1, sent_already=True)
    assert caught.value.reason == "duplicate"
