"""Ingress: an update is accepted whole or refused with a named reason."""

import inspect
import re
from dataclasses import replace

import numpy as np
import pytest

from clinifed.aggregators import ingress
from clinifed.aggregators.ingress import check_update
from clinifed.errors import UpdateError
from clinifed.messages import array_problem, update_norm

from .conftest import JOB, SITES

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
        lambda u: told(u, declared={"train_loss": float("nan")}),
        lambda u: told(u, declared={"train_loss": "low"}),
        lambda u: told(u, declared={"patient_count": -1}),
        lambda u: told(u, declared={"patient_count": True}),
        lambda u: told(u, declared={"image_count": 10**30}),
        lambda u: told(u, declared={"label_counts": {"radiology": [1, "MILLER^ANNA"]}}),
        lambda u: told(u, declared={"label_counts": {"dermatology": [1, 2]}}),
        lambda u: claimed(u, epsilon=float("nan")),
        lambda u: told(u, signature=b"x"),
        lambda u: told(u, nonce="A" * 32),
        lambda u: told(u, nonce="a" * 31),
    ],
    "wrong_job": [lambda u: told(u, job="another"), lambda u: told(u, job=None)],
    "too_long": [
        lambda u: spoil(u, **{HEAD: u.params[HEAD] + np.float32(100)}),
        lambda u: spoil(u, **{n: np.full_like(v, 25) for n, v in u.params.items()}),  # each array alone is short
        lambda u: spoil(u, **{TRUNK: np.full_like(u.params[TRUNK], np.finfo(np.float32).max)}),
    ],
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


def test_every_reason_that_ingress_gives_has_a_test():
    given = set(re.findall(r'UpdateError\(\s*"(\w+)"', inspect.getsource(ingress)))
    given |= set(re.findall(r'return "(\w+)", f', inspect.getsource(array_problem)))  # which ingress passes on
    assert given == {*HOSTILE, "wrong_signature", "replayed", "duplicate"}
    assert given == set(re.findall(r"\b\w+_\w+\b|duplicate|replayed", (check_update.__doc__ or "").split("one of")[1]))


def test_an_update_on_the_bound_passes_and_one_beyond_it_does_not(contract, updates, signed):
    update = updates["alder"]
    norm = update_norm(update.params)

    def bounded(bound):
        sites = {**contract.sites, "alder": contract.sites["alder"].model_copy(update={"norm_bound": bound})}
        agreed = contract.model_copy(update={"sites": sites})
        claim = {**update.meta["claim"], "contract_sha256": agreed.sha256()}
        check_update(signed(told(update, claim=claim)), agreed, 1, False, JOB)

    bounded(norm)
    with pytest.raises(UpdateError, match=f"L2 norm is {norm:.6g}, the contract's bound") as caught:
        bounded(np.nextafter(norm, 0))
    assert caught.value.reason == "too_long"


@pytest.mark.parametrize("site", SITES)
def test_a_site_sends_its_own_specialties_no_more_and_no_less(contract, updates, signed, site):
    mine = {n for n in contract.shapes if not n.startswith("heads.") or n.split(".")[1] in SITES[site]}
    assert set(updates[site].params) == mine
    for name in contract.shapes:
        params = dict(updates[site].params)
        if name in mine:
            del params[name]
        else:
            params[name] = np.zeros(contract.shapes[name], np.float32)
        with pytest.raises(UpdateError, match=name) as caught:
            check_update(signed(replace(updates[site], params=params)), contract, 1, False, JOB)
        assert caught.value.reason == "wrong_names"


def test_what_a_site_says_is_cut_in_the_reason(contract, updates):
    for change in (
        lambda u: spoil(u, **{"x" * 10**6: np.zeros(1, np.float32)}),
        lambda u: told(u, job="x" * 10**6),
        lambda u: told(u, nonce="x" * 10**6),
        lambda u: told(u, **{"x" * 10**6: 1}),
        lambda u: told(u, declared={"x" * 10**6: 1}),
    ):
        with pytest.raises(UpdateError) as caught:
            check_update(change(updates["alder"]), contract, 1, False, JOB)
        assert len(str(caught.value)) < 1000


def test_declared_figures_in_their_own_form_pass(contract, updates, signed):
    figures = {"patient_count": 5, "image_count": 9, "label_counts": {"radiology": [4, 5]}, "train_loss": 0.5}
    counts = [1] * len(contract.specialties["radiology"].labels)
    declared = {**figures, "label_counts": {"radiology": counts}}
    check_update(signed(told(updates["alder"], declared=declared)), contract, 1, False, JOB)


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
