"""Ingress: an update is accepted whole or refused with a named reason."""

from dataclasses import replace

import numpy as np
import pytest

from clinifed.aggregators.ingress import check_update
from clinifed.errors import UpdateError

from .conftest import JOB

HEAD, TRUNK = "heads.radiology.weight", "trunk.projection.weight"


def test_an_honest_update_passes(contract, updates):
    for update in updates.values():
        check_update(update, contract, 1, False, JOB)


def spoil(update, **params):
    return replace(update, params={**update.params, **params})


def told(update, **meta):
    return replace(update, meta={**update.meta, **meta})


def claimed(update, **claim):
    return told(update, claim={**update.meta["claim"], **claim})


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
    "wrong_contract": [
        lambda u: replace(u, meta={}),
        lambda u: claimed(u, contract_sha256="0" * 64),
        lambda u: told(u, claim="none"),
    ],
    "wrong_meta": [
        lambda u: told(u, NUM_STEPS_CURRENT_ROUND=1e12),
        lambda u: told(u, nonce=7),
        lambda u: told(u, declared={"patient_names": ["x"]}),
        lambda u: told(u, declared=["patient_count"]),
    ],
    "wrong_job": [lambda u: told(u, job="another")],
    "wrong_claim": [
        lambda u: claimed(u, epsilon=-1.0),
        lambda u: claimed(u, delta=None),
        lambda u: claimed(u, noise_multiplier=1.0),
        lambda u: claimed(u, nominal_patients=11),
        lambda u: told(u, claim={k: v for k, v in u.meta["claim"].items() if k != "trust_model"}),
        lambda u: claimed(u, patients=501),
        lambda u: told(u, ledger_head="b" * 64),
    ],
}


@pytest.mark.parametrize(("reason", "change"), [(r, c) for r, changes in HOSTILE.items() for c in changes])
def test_a_hostile_update_is_refused_with_its_reason(contract, updates, reason, change):
    with pytest.raises(UpdateError) as caught:
        check_update(change(updates["alder"]), contract, 1, False, JOB)
    assert caught.value.reason == reason


CHANGED = {
    "parameters": lambda u: spoil(u, **{HEAD: u.params[HEAD] + np.float32(1)}),
    "claim": lambda u: claimed(u, epsilon=0.01),
    "declared": lambda u: told(u, declared={"patient_count": 5}),
    "no signature": lambda u: replace(u, meta={k: v for k, v in u.meta.items() if k != "signature"}),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_a_site_whose_key_the_contract_names_is_taken_at_its_signature_only(contract, updates, signed, change):
    changed = change(updates["alder"])
    with pytest.raises(UpdateError) as caught:
        check_update(changed, contract, 1, False, JOB)
    assert caught.value.reason == "wrong_signature"
    check_update(signed(changed), contract, 1, False, JOB)


def test_another_sites_signature_is_refused(contract, updates):
    stolen = told(updates["alder"], signature=updates["birch"].meta["signature"])
    with pytest.raises(UpdateError) as caught:
        check_update(stolen, contract, 1, False, JOB)
    assert caught.value.reason == "wrong_signature"


def test_a_replayed_update_is_refused(contract, updates):
    with pytest.raises(UpdateError) as caught:
        check_update(updates["alder"], contract, 1, False, JOB, {updates["alder"].meta["nonce"]})
    assert caught.value.reason == "replayed"


def test_a_second_update_in_a_round_is_refused(contract, updates):
    with pytest.raises(UpdateError) as caught:
        check_update(updates["alder"], contract, 1, True, JOB)
    assert caught.value.reason == "duplicate"
