"""The ledger: charged first, never exceeded, never altered unseen, one for all processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from clinifed.errors import BudgetExceededError, LedgerError
from clinifed.privacy.accountant import budget_units, cost_units, noise_multiplier_for
from clinifed.privacy.ledger import GENESIS, Ledger

DELTA = 1e-5


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl", "alder", 1.0, DELTA)


def spend(ledger: Ledger, times: int, rounds: int = 10) -> None:
    units = cost_units(noise_multiplier_for(1.0, DELTA, rounds))
    for number in range(times):
        ledger.charge(units, job="j", round=number)


def test_a_new_ledger_has_spent_nothing_and_makes_no_file(ledger):
    state = ledger.state()
    assert (state.head, state.records, state.epsilon_spent) == (GENESIS, 0, 0.0)
    assert not ledger.path.exists()


def test_charges_add_up_to_the_epsilon_of_the_plan(ledger):
    spend(ledger, 10)
    assert ledger.state().epsilon_spent == pytest.approx(1.0, rel=1e-6)


def test_the_budget_is_never_exceeded_and_the_refusal_is_recorded(ledger):
    spend(ledger, 10)
    before = ledger.state()
    with pytest.raises(BudgetExceededError, match="beyond the budget of 1"):
        spend(ledger, 1)
    after = ledger.state()
    assert after.spent_units == before.spent_units <= budget_units(1.0, DELTA)
    assert json.loads(ledger.path.read_text().splitlines()[-1])["kind"] == "refuse"


def test_charges_survive_the_object(ledger):
    spend(ledger, 3)
    again = Ledger(ledger.path, "alder", 1.0, DELTA)
    assert again.state() == ledger.state()


def test_the_file_is_the_owners_alone(ledger):
    spend(ledger, 1)
    assert ledger.path.stat().st_mode & 0o777 == 0o600
    assert ledger.anchor.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("line", [0, 1, 2])
@pytest.mark.parametrize("edit", [(b'"units":', b'"units": '), (b'"round":', b'"rounds":'), (b'"charge"', b'"refuse"')])
def test_an_edit_anywhere_is_detected(ledger, line, edit):
    spend(ledger, 3)
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(*edit)
    ledger.path.write_bytes(b"".join(lines))
    with pytest.raises(LedgerError, match=f"record {line + 1} is not the one"):
        ledger.state()


@pytest.mark.parametrize("kept", [0, 1])
def test_a_shortened_file_is_detected(ledger, kept):
    spend(ledger, 3)
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    ledger.path.write_bytes(b"".join(lines[:kept]))
    with pytest.raises(LedgerError, match="does not meet"):
        ledger.charge(1)


def test_a_deleted_file_is_detected(ledger):
    spend(ledger, 1)
    ledger.path.unlink()
    with pytest.raises(LedgerError, match="does not meet"):
        ledger.state()


def test_a_deleted_middle_and_a_swap_are_detected(ledger):
    spend(ledger, 3)
    first, second, third = ledger.path.read_bytes().splitlines(keepends=True)
    for content in (first + third, second + first + third):
        ledger.path.write_bytes(content)
        with pytest.raises(LedgerError):
            ledger.state()


def test_a_torn_last_line_is_cut_off_and_not_counted(ledger):
    spend(ledger, 2)
    before = ledger.state()
    with ledger.path.open("ab") as file:
        file.write(b'{"half": ')
    assert ledger.state() == before
    spend(ledger, 1)
    assert ledger.state().records == 3


def test_a_chain_one_ahead_of_its_anchor_counts(ledger):
    spend(ledger, 2)
    anchor = ledger.anchor.read_bytes()
    spend(ledger, 1)
    ledger.anchor.write_bytes(anchor)
    assert ledger.state().records == 3


def test_another_sites_ledger_is_refused(ledger):
    spend(ledger, 1)
    with pytest.raises(LedgerError):
        Ledger(ledger.path, "birch", 1.0, DELTA).state()


def test_a_ledger_that_cannot_be_opened_stops_everything(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger(tmp_path / "folder", "alder", 1.0, DELTA).charge(1)


def test_processes_racing_for_the_last_budget_never_exceed_it(ledger):
    """Four real processes try ten charges each where fifteen fit: exactly fifteen go through."""
    units = cost_units(noise_multiplier_for(1.0, DELTA, 15))
    script = (
        "import sys; from pathlib import Path\n"
        "from clinifed.errors import BudgetExceededError\n"
        "from clinifed.privacy.ledger import Ledger\n"
        f"ledger = Ledger(Path(sys.argv[1]), 'alder', 1.0, {DELTA})\n"
        "done = 0\n"
        "for _ in range(10):\n"
        "    try:\n"
        f"        ledger.charge({units}, job='race')\n"
        "        done += 1\n"
        "    except BudgetExceededError:\n"
        "        pass\n"
        "print(done)\n"
    )
    command = [sys.executable, "-P", "-c", script, str(ledger.path)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert sum(int(run.communicate()[0]) for run in runs) == 15
    assert ledger.state().spent_units == 15 * units
