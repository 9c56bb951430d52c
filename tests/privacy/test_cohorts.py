"""Withdrawal: which releases and models a patient's data touched, or an error; never a guess."""

from types import SimpleNamespace

import pytest

from clinifed.errors import LedgerError
from clinifed.policy import Budget
from clinifed.privacy.cohorts import Cohorts, touched
from clinifed.privacy.ledger import Ledger, read_ledger
from clinifed.signing import make_signing_key


@pytest.fixture
def site(tmp_path):
    """Two jobs: one with patients a and b and two releases, one with b alone and a charge that was lost."""
    cohorts = Cohorts(tmp_path / "cohorts", make_signing_key(tmp_path / "key"))
    ledger = Ledger(tmp_path / "ledger.jsonl", "alder", Budget(epsilon=1.0, delta=1e-5))
    ledger.create()
    for job, patients, releases in (("first", ["a", "b"], 2), ("second", ["b"], 0), ("third", ["b"], 1)):
        ledger.reserve(job, 100, "c" * 64, cohort={"name": "all", "patients_hmac": cohorts.keep(patients)})
        for number in range(2):
            ledger.charge(job, number, 10, f"{job}{number}")
            if number < releases:
                ledger.release(job, number, f"{job}{number}", f"{number}" * 64)
    return SimpleNamespace(cohorts=cohorts, path=tmp_path / "ledger.jsonl")


def asked(site, patient, cards=None):
    _, account, more = read_ledger(site.path)
    return touched(patient, account, more["records"], site.cohorts, cards or {})


def test_the_jobs_a_patient_took_part_in_and_that_released_something(site):
    assert [(t.job, t.rounds) for t in asked(site, "a")] == [("first", (0, 1))]
    assert [t.job for t in asked(site, "b")] == ["first", "third"]
    assert asked(site, "nobody") == []


def test_the_models_are_those_whose_card_names_the_job(site):
    cards = {"one/card.json": {"job": "first"}, "two/card.json": {"job": "third"}, "old/card.json": {}}
    assert asked(site, "a", cards)[0].checkpoints == ("one/card.json",)


def test_a_model_that_began_with_another_holds_the_patients_of_both(site):
    cards = {"one/card.json": {"job": "tuned", "started_from": {"jobs": ["first", "earlier"]}}}
    assert asked(site, "a", cards)[0].checkpoints == ("one/card.json",)


def test_in_house_heads_name_their_cohort(site):
    cards = {"own/card.json": {"job": "x", "personalised": {"patients_hmac": site.cohorts.keep(["a", "b"])}}}
    assert [t.checkpoints for t in asked(site, "a", cards)][-1] == ("own/card.json",)
    assert all(t.checkpoints == () for t in asked(site, "a", {"own/card.json": {"job": "x", "personalised": None}}))
    site.cohorts.keep(["c"])
    assert asked(site, "c", cards) == []


def test_a_missing_or_changed_list_is_an_error_not_a_no(site):
    lists = sorted(site.cohorts.folder.iterdir(), key=lambda p: p.stat().st_size)
    lists[-1].write_text("b")
    with pytest.raises(LedgerError, match="not the list that was kept"):
        asked(site, "a")
    lists[-1].unlink()
    with pytest.raises(LedgerError, match="missing"):
        asked(site, "a")


def test_equal_cohorts_are_kept_once_owner_only_and_named_by_a_keyed_hash(site, tmp_path):
    assert len(list(site.cohorts.folder.iterdir())) == 2
    assert all(p.stat().st_mode & 0o077 == 0 for p in site.cohorts.folder.iterdir())
    other = Cohorts(tmp_path / "other", make_signing_key(tmp_path / "other.key"))
    assert other.keep(["a", "b"]) != site.cohorts.keep(["a", "b"])
