"""The order reserve → charge → noise → outbox → release, under processes that are killed at any moment."""

import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from clinifed.privacy.ledger import read_ledger
from clinifed.privacy.outbox import Outbox

WRITERS = Path(__file__).with_name("writers.py")
KILLS = 510


@pytest.mark.parametrize("writers", [2, 4])
def test_no_release_is_ever_uncharged_and_the_budget_is_never_exceeded(tmp_path, writers):
    kills = KILLS // 2 if writers == 2 else KILLS - KILLS // 2
    done = subprocess.run(
        [sys.executable, "-P", WRITERS, tmp_path, str(writers), str(kills)], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert not (failed := [path.read_text() for path in tmp_path.rglob("failed.log")]), failed
    assert int(done.stdout) == kills
    ledgers = sorted(tmp_path.glob("ledger-*"))
    seen = [assert_paid(folder) for folder in ledgers]
    assert sum(sent for sent, _ in seen) > 50
    assert sum(lost for _, lost in seen) > 0, "no kill fell between charge and release, so this test shows nothing"


def assert_paid(folder: Path) -> tuple[int, int]:
    """Every release of this ledger was paid for; returns how many there were, and how many charges were lost."""
    state, account, _ = read_ledger(folder / "ledger.jsonl")  # every record was checked against those before it
    assert state.spent_units + state.reserved_units <= state.budget_units
    assert state.spent_units == sum(units for job in account.jobs.values() for _, units in job.charges.values())
    sent = defaultdict(set)
    for line in (folder / "sent.log").read_text().splitlines():
        job, number, digest = line.split()
        sent[job, int(number)].add(digest)
    for (name, number), digests in sent.items():
        assert len(digests) == 1, "the same release was sent with other bytes"
        paid = [nonce for nonce, (r, _) in account.jobs[name].charges.items() if r == number]
        assert set(paid) & set(account.jobs[name].releases), "a release that no charge paid for"
    kept = Outbox(folder / "ledger.jsonl.outbox")
    for path in kept.folder.rglob("*"):
        assert path.is_dir() or not path.name.startswith(".") or path.suffix == ".tmp"
    return len(sent), sum(job.lost() for job in account.jobs.values())
