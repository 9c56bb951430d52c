"""What a data protection officer sees: the truth, or an error that says what is wrong."""

import json
import shutil

import pytest

from clinifed.errors import LedgerError
from clinifed.policy import Budget
from clinifed.privacy.accountant import budget_units
from clinifed.privacy.ledger import Ledger
from clinifed.privacy.officer import backup_ledger, export_ledger, ledger_report, verify_ledger

TENTH = budget_units(1.0, 1e-5) // 10


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    ledger = Ledger(tmp_path / "ledger.jsonl", "alder", Budget(epsilon=1.0, delta=1e-5))
    ledger.create()
    charge(ledger, 0)
    return ledger


def charge(ledger, number) -> None:
    ledger.reserve("job", 5 * TENTH, "c" * 64)
    ledger.charge("job", number, TENTH, f"n{number}")
    ledger.release("job", number, f"n{number}", "d" * 64)


def test_a_report_states_an_epsilon_with_all_that_belongs_to_it(ledger):
    report = ledger_report(ledger.chain.path)
    needed = {"epsilon", "delta", "unit", "relation", "trust_model", "accountant", "ledger_head", "budget_epsilon"}
    assert needed <= set(report)
    (job,) = report["jobs"]
    assert (job["charges"], job["releases"], job["lost_charges"], job["reserved_units"]) == (1, 1, 0, 4 * TENTH)
    assert report["epsilon"] == ledger.state().epsilon_spent == job["epsilon"]


def test_looking_changes_nothing(ledger):
    before = ledger.chain.path.read_bytes(), ledger.chain.anchor.read_bytes()
    for look in (ledger_report, verify_ledger, export_ledger):
        look(ledger.chain.path)
    assert (ledger.chain.path.read_bytes(), ledger.chain.anchor.read_bytes()) == before


def test_an_export_holds_every_record_and_is_json(ledger):
    content = json.loads(json.dumps(export_ledger(ledger.chain.path)))
    assert [record["kind"] for record in content["chain"]] == ["open", "reserve", "charge", "release"]


def test_only_an_intact_chain_that_matches_its_anchor_is_verified(ledger):
    path, anchor = ledger.chain.path, ledger.chain.anchor
    assert verify_ledger(path)["records"] == 4
    earlier, whole = anchor.read_bytes(), path.read_bytes()
    charge(ledger, 1)
    anchor.write_bytes(earlier)
    with pytest.raises(LedgerError, match="does not meet"):
        verify_ledger(path)  # two records ahead
    path.write_bytes(whole + b"torn")
    with pytest.raises(LedgerError, match="torn"):
        verify_ledger(path)
    path.write_bytes(whole)
    head = ledger.chain.read().records[-2]["hash"]
    anchor.write_text(head)
    with pytest.raises(LedgerError, match="one record ahead"):
        verify_ledger(path)


def test_a_rollback_of_ledger_and_anchor_together_is_shown_by_a_head_that_left(ledger, tmp_path):
    path, anchor = ledger.chain.path, ledger.chain.anchor
    kept = path.read_bytes(), anchor.read_bytes()
    charge(ledger, 1)
    head = ledger.state().head
    card = tmp_path / "card.json"
    card.write_text(json.dumps({"sites": {"alder": {"privacy": {"ledger_head": head}}, "birch": {"ledger_head": "b"}}}))
    rounds = tmp_path / "rounds.jsonl"
    rounds.write_text(json.dumps({"round": 0, "claims": {"alder": {"ledger_head": head}}}) + "\n")
    verify_ledger(path, published=[card, rounds])
    path.write_bytes(kept[0])
    anchor.write_bytes(kept[1])
    assert verify_ledger(path)["records"] == 4  # the two alone do not show it
    with pytest.raises(LedgerError, match="rolled back") as caught:
        verify_ledger(path, published=[card, rounds])
    assert len(caught.value.problems) == 2


def test_a_publication_that_names_no_head_of_the_site_proves_nothing(ledger, tmp_path):
    card = tmp_path / "card.json"
    card.write_text("{}")
    with pytest.raises(LedgerError, match="names no ledger head"):
        verify_ledger(ledger.chain.path, published=[card])


class TestBackup:
    def test_a_backup_is_whole_and_goes_on(self, ledger, tmp_path):
        copy = backup_ledger(ledger.chain.path, tmp_path / "disk")
        assert verify_ledger(copy)["records"] == 4
        charge(ledger, 1)
        backup_ledger(ledger.chain.path, tmp_path / "disk")
        assert copy.read_bytes() == ledger.chain.path.read_bytes()
        assert copy.stat().st_mode & 0o077 == 0

    def test_a_ledger_that_was_rolled_back_does_not_replace_its_backup(self, ledger, tmp_path):
        old = tmp_path / "old"
        old.mkdir()
        for path in (ledger.chain.path, ledger.chain.anchor):
            shutil.copy(path, old)
        charge(ledger, 1)
        copy = backup_ledger(ledger.chain.path, tmp_path / "disk")
        whole = copy.read_bytes()
        for path in (ledger.chain.path, ledger.chain.anchor):
            shutil.copy(old / path.name, path)
        with pytest.raises(LedgerError, match="rolled back"):
            backup_ledger(ledger.chain.path, tmp_path / "disk")
        assert copy.read_bytes() == whole

    def test_a_damaged_ledger_is_not_backed_up(self, ledger, tmp_path):
        ledger.chain.path.write_bytes(b"nonsense\n")
        with pytest.raises(LedgerError):
            backup_ledger(ledger.chain.path, tmp_path / "disk")
        assert not (tmp_path / "disk").exists()

    def test_the_ledgers_own_folder_is_no_other_place(self, ledger):
        with pytest.raises(LedgerError, match="itself lies there"):
            backup_ledger(ledger.chain.path, ledger.chain.path.parent)
