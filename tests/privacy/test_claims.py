"""Claims: an epsilon never goes without what belongs to it."""

import pytest

from clinifed.errors import PrivacyError
from clinifed.privacy.accountant import budget_units
from clinifed.privacy.claims import check_claim, claim_schema, disagreements, make_claim

HEAD = "a" * 64


@pytest.fixture
def contract(make_contract):
    return make_contract({"alder": ["radiology"]})


@pytest.fixture
def claim(contract):
    return make_claim(contract, "alder", "job", budget_units(1.0, 1e-5), 1e-5, HEAD)


def test_a_claim_states_what_its_units_amount_to(claim):
    assert claim["epsilon"] == pytest.approx(1.0, rel=1e-6)
    assert (claim["delta"], claim["ledger_head"], claim["nominal_patients"]) == (1e-5, HEAD, 10)


@pytest.mark.parametrize("key", claim_schema()["required"])
def test_a_claim_without_one_of_its_parts_is_refused(claim, key):
    with pytest.raises(PrivacyError):
        check_claim({k: v for k, v in claim.items() if k != key})


WRONG = {
    "epsilon": [-1.0, None, "1"],
    "delta": [0.0, 1.0, None],
    "unit": ["image", "site"],
    "relation": ["replace_one"],
    "nominal_patients": [0, 1.5, None],
    "ledger_head": [None, "A" * 64, "a"],
    "accountant": [None, {"name": "x"}],
    "noise_multiplier": [0.0, None],
    "trust_model": [""],
    "scope": ["round"],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in WRONG.items() for v in values])
def test_a_claim_with_a_wrong_part_is_refused(claim, key, value):
    with pytest.raises(PrivacyError):
        check_claim({**claim, key: value})


def test_nothing_is_added_to_a_claim(claim):
    with pytest.raises(PrivacyError, match="patients"):
        check_claim({**claim, "patients": 501})


def test_with_privacy_off_nothing_is_claimed(contract):
    off = contract.model_copy(update={"promise": contract.promise.model_copy(update={"mode": "off"})})
    claim = make_claim(off, "alder", "lifetime")
    assert {claim[k] for k in ("epsilon", "delta", "noise_multiplier", "accountant", "ledger_head")} == {None}
    with pytest.raises(PrivacyError):
        check_claim({**claim, "epsilon": 0.0})


def test_a_received_claim_must_be_this_contracts(contract, claim):
    assert disagreements(claim, contract, "alder") == []
    for key, value in {
        "noise_multiplier": 1.0,
        "max_grad_norm": 2.0,
        "nominal_patients": 11,
        "scope": "lifetime",
    }.items():
        assert key in disagreements({**claim, key: value}, contract, "alder")[0]
    assert disagreements({}, contract, "alder")
    assert disagreements("epsilon 1", contract, "alder")
