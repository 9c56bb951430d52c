"""The ledger: reserved and charged first, never exceeded, one for all jobs and processes of a site."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from clinifed.errors import BudgetExceededError, LedgerError
from clinifed.policy import Budget
from clinifed.privacy import ledger as module
from clinifed.privacy.accountant import budget_units, cost_units, noise_multiplier_for
from clinifed.privacy.ledger import Ledger, read_ledger
from clinifed.signing import make_signing_key, public_key

DELTA = 1e-5
BUDGET = Budget(epsilon=1.0, delta=DELTA)
CONTRACT = "c" * 64
TENTH = budget_units(1.0, DELTA) // 10


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger(tmp_path / "ledger.jsonl", "alder", BUDGET)
    ledger.create()
    return ledger


def again(ledger: Ledger, budget: Budget = BUDGET, **more) -> Ledger:
    """The same ledger in another process's eyes."""
    return Ledger(ledger.chain.path, "alder", budget, **more)


def spend(ledger: Ledger, job: str, rounds: int, units: int = TENTH) -> None:
    ledger.reserve(job, rounds * units, CONTRACT)
    for number in range(rounds):
        ledger.charge(job, number, units, f"{job}-{number}")
        ledger.release(job, number, f"{job}-{number}", "d" * 64)


def kinds(ledger: Ledger) -> list[str]:
    return [record["kind"] for record in ledger.chain.read().records]


def test_a_new_ledger_has_spent_nothing(ledger):
    state = ledger.state()
    assert (state.site, state.records, state.epsilon_spent, state.reserved_units) == ("alder", 1, 0.0, 0)
    assert state.budget_units == budget_units(1.0, DELTA)


def test_the_budget_is_never_exceeded_charges_and_reservations_together_stay_within_it(ledger):
    spend(ledger, "a", 6)
    ledger.reserve("b", 4 * TENTH, CONTRACT)
    assert ledger.state().reserved_units == 4 * TENTH
    with pytest.raises(BudgetExceededError, match=r"reserved by other jobs.*beyond the budget of 1 "):
        ledger.reserve("c", 2 * TENTH, CONTRACT)
    assert kinds(ledger)[-1] == "refuse"
    assert again(ledger).state().spent_units == 6 * TENTH


def test_nothing_is_charged_but_from_a_reservation(ledger):
    with pytest.raises(BudgetExceededError):
        ledger.charge("a", 0, TENTH, "n")
    ledger.reserve("a", TENTH, CONTRACT)
    ledger.charge("a", 0, TENTH, "n")
    with pytest.raises(BudgetExceededError):
        ledger.charge("a", 1, 1, "m")
    assert ledger.state().spent_units == TENTH


def test_nothing_is_released_but_what_was_charged_and_once(ledger):
    ledger.reserve("a", TENTH, CONTRACT)
    with pytest.raises(LedgerError, match="no unused charge"):
        ledger.release("a", 0, "n", "d" * 64)
    ledger.charge("a", 0, TENTH, "n")
    ledger.release("a", 0, "n", "d" * 64)
    with pytest.raises(LedgerError, match="no unused charge"):
        ledger.release("a", 0, "n", "e" * 64)


def test_a_restarted_job_keeps_its_reservation_and_reserves_only_what_it_lacks(ledger):
    ledger.reserve("a", 5 * TENTH, CONTRACT)
    ledger.charge("a", 0, TENTH, "n")
    again(ledger).reserve("a", 5 * TENTH, CONTRACT)
    assert ledger.state().reserved_units == 4 * TENTH
    with pytest.raises(LedgerError, match=r"reserved under contract c+, and comes with d+"):
        ledger.reserve("a", 5 * TENTH, "d" * 64)


def test_a_finished_job_returns_the_rest_and_takes_no_more(ledger):
    ledger.reserve("a", 5 * TENTH, CONTRACT)
    ledger.charge("a", 0, TENTH, "n")
    ledger.finish("a")
    records = len(kinds(ledger))
    ledger.finish("a")
    assert len(kinds(ledger)) == records
    assert (ledger.state().reserved_units, ledger.state().spent_units) == (0, TENTH)
    ledger.reserve("a", 5 * TENTH, CONTRACT)
    with pytest.raises(BudgetExceededError):
        ledger.charge("a", 1, TENTH, "m")
    ledger.reserve("b", 9 * TENTH, CONTRACT)


def test_the_reservation_of_a_dead_job_returns_when_another_needs_it(ledger, monkeypatch):
    ledger.reserve("dead", 8 * TENTH, CONTRACT)
    ledger.charge("dead", 0, TENTH, "n")
    with pytest.raises(BudgetExceededError):
        ledger.reserve("b", 5 * TENTH, CONTRACT)

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(hours=169)

    monkeypatch.setattr(module, "datetime", Later)
    assert Later.now(UTC) > datetime.now(UTC)
    ledger.reserve("b", 5 * TENTH, CONTRACT)
    assert (ledger.state().spent_units, ledger.state().reserved_units) == (TENTH, 5 * TENTH)
    with pytest.raises(BudgetExceededError):  # should it return after all, it has nothing reserved
        ledger.charge("dead", 1, TENTH, "m")


def test_ten_jobs_of_epsilon_0284_fit_a_lifetime_epsilon_of_1_and_the_eleventh_is_refused(ledger):
    units = cost_units(noise_multiplier_for(0.284, DELTA, 5))
    for job in range(10):
        spend(ledger, f"job {job}", 5, units)
        ledger.finish(f"job {job}")
    assert ledger.state().epsilon_spent <= 1.0
    with pytest.raises(BudgetExceededError):
        ledger.reserve("job 10", 5 * units, CONTRACT)


def test_the_exact_rest_fits_and_one_unit_more_does_not(ledger):
    spend(ledger, "a", 9)
    rest = ledger.state().budget_units - ledger.state().spent_units
    with pytest.raises(BudgetExceededError):
        ledger.reserve("b", rest + 1, CONTRACT)
    ledger.reserve("c", rest, CONTRACT)


def test_charges_survive_the_object(ledger):
    spend(ledger, "a", 3)
    assert again(ledger).state() == ledger.state()


@pytest.mark.parametrize("units", [0, -5, 1.5])
def test_a_charge_that_is_none_is_refused_before_it_is_written(ledger, units):
    ledger.reserve("a", TENTH, CONTRACT)
    records = len(kinds(ledger))
    with pytest.raises(LedgerError, match="units"):
        ledger.charge("a", 0, units, "n")
    assert len(kinds(ledger)) == records
    ledger.charge("a", 0, TENTH, "n")


def test_another_sites_ledger_is_refused(ledger):
    with pytest.raises(LedgerError, match="'alder', not of 'birch'"):
        Ledger(ledger.chain.path, "birch", BUDGET).state()


def test_a_missing_ledger_is_no_fresh_budget(ledger):
    spend(ledger, "a", 3)
    ledger.chain.path.unlink()
    ledger.chain.anchor.unlink()
    with pytest.raises(LedgerError, match="nothing is released without it"):
        again(ledger).reserve("b", 1, CONTRACT)


def test_an_empty_file_is_no_ledger(tmp_path):
    (tmp_path / "ledger.jsonl").touch()
    with pytest.raises(LedgerError, match="holds no record"):
        Ledger(tmp_path / "ledger.jsonl", "alder", BUDGET).state()


class TestTheBudget:
    def test_a_policy_may_permit_less_than_the_ledger(self, ledger):
        small = again(ledger, Budget(epsilon=0.3, delta=DELTA))
        assert small.state().epsilon_budget == 0.3
        with pytest.raises(BudgetExceededError, match=r"budget of 0\.3"):
            small.reserve("a", 5 * TENTH, CONTRACT)

    def test_a_policy_that_permits_more_is_refused(self, ledger):
        with pytest.raises(LedgerError, match="signed by a second person"):
            again(ledger, Budget(epsilon=2.0, delta=DELTA)).state()

    def test_delta_never_changes(self, ledger):
        with pytest.raises(LedgerError, match="never changes"):
            again(ledger, Budget(epsilon=1.0, delta=1e-6)).state()

    def test_an_increase_by_a_named_officer_counts(self, ledger, tmp_path):
        key = make_signing_key(tmp_path / "officer.key")
        larger = Budget(epsilon=2.0, delta=DELTA)
        mine = again(ledger, larger, officers={"dpo": public_key(key)})
        mine.increase(2.0, "steward", "dpo", "study 7", key)
        assert again(ledger, larger, officers={"dpo": public_key(key)}).state().budget_units == budget_units(2.0, DELTA)

    def test_one_person_is_not_two(self, ledger, tmp_path):
        key = make_signing_key(tmp_path / "officer.key")
        with pytest.raises(LedgerError, match="must not be the one who approves"):
            ledger.increase(2.0, "dpo", "dpo", "why not", key)
        assert kinds(ledger) == ["open"]

    def test_an_increase_by_a_stranger_stops_everything(self, ledger, tmp_path):
        key = make_signing_key(tmp_path / "stranger.key")
        ledger.increase(2.0, "steward", "dpo", "mine", key)
        with pytest.raises(LedgerError, match="names no officer"):
            again(ledger, officers={"dpo": "0" * 64}).state()

    def test_a_forged_signature_is_detected(self, ledger, tmp_path, monkeypatch):
        key = make_signing_key(tmp_path / "officer.key")
        monkeypatch.setattr(module, "sign", lambda *_: "00" * 64)
        with pytest.raises(LedgerError, match="not valid"):
            ledger.increase(2.0, "steward", "dpo", "forged", key)


class TestFormats:
    def first(self, path: Path, charges: int) -> Ledger:
        """A ledger as clinifed wrote it before reservations."""
        ledger = Ledger(path, "alder", BUDGET)
        path.touch(0o600)
        for number in range(charges):
            with ledger.chain.locked() as (_, append):
                budget = {"epsilon": 1.0, "delta": DELTA, "units": budget_units(1.0, DELTA)}
                kind = {"version": 1, "site": "alder", "kind": "charge", "units": TENTH, "budget": budget}
                append({**kind, "unit": "patient", "relation": "add_remove", "round": number})
        return ledger

    def test_the_first_format_is_read_but_not_written_before_its_migration(self, tmp_path):
        ledger = self.first(tmp_path / "old.jsonl", 4)
        assert read_ledger(tmp_path / "old.jsonl")[0].spent_units == 4 * TENTH
        with pytest.raises(LedgerError, match="ledger migrate"):
            ledger.reserve("a", TENTH, CONTRACT)

    def test_what_was_spent_stays_spent_after_the_migration(self, tmp_path):
        ledger = self.first(tmp_path / "old.jsonl", 4)
        ledger.migrate()
        assert ledger.state().spent_units == 4 * TENTH
        with pytest.raises(BudgetExceededError):
            ledger.reserve("a", 7 * TENTH, CONTRACT)
        spend(ledger, "b", 6)
        with pytest.raises(LedgerError, match="already"):
            ledger.migrate()

    def test_a_newer_format_is_refused(self, ledger):
        with ledger.chain.locked() as (_, append):
            append({"version": 3, "site": "alder", "kind": "charge"})
        with pytest.raises(LedgerError, match="newer than this clinifed"):
            ledger.state()


def test_a_chain_that_contradicts_itself_is_no_ledger_though_its_hashes_are_right(ledger):
    with ledger.chain.locked() as (_, append):
        append({"version": 2, "site": "alder", "kind": "charge", "job": "a", "round": 0, "units": 1, "nonce": "n"})
    with pytest.raises(LedgerError, match=r"record 2 \(charge\): 1 units were charged where the job had 0"):
        ledger.state()


RACE = """
import sys; from pathlib import Path
from clinifed.errors import BudgetExceededError
from clinifed.policy import Budget
from clinifed.privacy.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]), "alder", Budget(epsilon=1.0, delta=1e-5))
sys.stdin.readline()
try:
    ledger.reserve(sys.argv[2], int(sys.argv[3]), "c" * 64)
    print("won")
except BudgetExceededError:
    print("refused")
"""


def test_two_jobs_never_both_get_the_last_of_the_budget(ledger):
    """Four real processes, each wanting the whole rest at the same moment: exactly one gets it."""
    spend(ledger, "before", 9)
    rest = ledger.state().budget_units - ledger.state().spent_units
    command = [sys.executable, "-P", "-c", RACE, str(ledger.chain.path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([*command, f"job {n}", str(rest)], **pipes) for n in range(4)]
    for run in runs:  # all have imported what they need before the first starts
        assert run.stdin is not None
        run.stdin.write("go\n")
        run.stdin.flush()
    said = sorted(run.communicate()[0].strip() for run in runs)
    assert said == ["refused", "refused", "refused", "won"]
    assert ledger.state().reserved_units == rest
    assert json.loads(ledger.chain.path.read_text().splitlines()[-1])["kind"] == "refuse"
