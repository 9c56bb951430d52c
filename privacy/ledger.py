"""The budget ledger a hospital holds: one file for the site's lifetime, append-only, hash-chained, charged first.

Every line is a JSON record that names the hash of the line before it. The head (last hash) stands in a second file,
the anchor, too: a shortened or replaced ledger no longer meets it. A charge is on disk before its noise is drawn.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from clinifed.errors import BudgetExceededError, LedgerError
from clinifed.files import OWNER_ONLY, canonical_json, sync_folder, write_atomic
from clinifed.privacy.accountant import budget_units, epsilon_of

__all__ = ["GENESIS", "Ledger", "LedgerState"]

GENESIS = "0" * 64
_VERSION = 1


@dataclass(frozen=True)
class LedgerState:
    """What a verified chain adds up to."""

    head: str  # hash of the last record, GENESIS where there is none
    records: int
    spent_units: int  # Σ 1/σ², units of 1e-12
    budget_units: int
    epsilon_budget: float
    delta: float

    @property
    def epsilon_spent(self) -> float:
        """ε that the charges so far amount to, at the ledger's δ."""
        return epsilon_of(self.spent_units, self.delta)


class Ledger:
    """The ledger of one site.

    Guarantees:
        - The budget is never exceeded: a charge that does not fit raises and leaves the file as it was.
        - Charges survive the process: a record is fsynced before ``charge`` returns.
        - An edit, a deletion or a shortening of the file is detected before the next charge.
        - Two processes never both get the last of the budget: the file is locked while it is read and written.
    """

    def __init__(self, path: Path, site: str, epsilon: float, delta: float) -> None:
        self.path = path
        self.anchor = path.with_name(path.name + ".anchor")
        self.site = site
        self.epsilon, self.delta = epsilon, delta

    def charge(self, units: int, **what: Any) -> LedgerState:
        """Charge ``units`` of μ² for ``what`` (job, round, releases, noise_multiplier, …), before anything is drawn.

        Raises:
            BudgetExceededError: it does not fit; the refusal is recorded, the spent budget is unchanged.
            LedgerError: the ledger is damaged, or cannot be written.
        """
        if units <= 0:
            raise LedgerError(f"a charge of {units} units is not a charge")
        with self._locked() as file:
            state = self._verify(file)
            if state.spent_units + units > state.budget_units:
                self._append(file, state, "refuse", units=units, **what)
                raise BudgetExceededError(
                    f"site {self.site}: this would take epsilon from {state.epsilon_spent:.4f} to "
                    f"{epsilon_of(state.spent_units + units, self.delta):.4f}, beyond the budget of "
                    f"{self.epsilon:g} (delta {self.delta:g}); nothing was released"
                )
            return self._append(file, state, "charge", units=units, **what)

    def state(self) -> LedgerState:
        """Verify the whole chain and its anchor, and add it up. A missing ledger is one that spent nothing.

        Raises:
            LedgerError: the chain is broken or does not meet its anchor.
        """
        if not self.path.exists() and not self.anchor.exists():
            return self._opened(GENESIS, 0, 0)
        with self._locked() as file:
            return self._verify(file)

    def _opened(self, head: str, records: int, spent: int) -> LedgerState:
        return LedgerState(head, records, spent, budget_units(self.epsilon, self.delta), self.epsilon, self.delta)

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The ledger file, open and locked against other processes."""
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, OWNER_ONLY)
        except OSError as error:
            raise LedgerError(
                f"{self.path}: the ledger cannot be opened ({error.strerror}); nothing is released"
            ) from error
        with os.fdopen(handle, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _verify(self, file: BinaryIO) -> LedgerState:
        """Replay the chain. A torn last line, which a crash leaves before its charge counted, is cut off."""
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) != len(content):
            file.truncate(len(whole))
        head, spent, hashes = GENESIS, 0, [GENESIS]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                as_written = canonical_json(record)
                claimed = record.pop("hash")
                intact = (
                    line == as_written  # byte for byte, blanks included
                    and record["prev"] == head
                    and record["seq"] == number
                    and record["site"] == self.site
                    and sha256(canonical_json(record)).hexdigest() == claimed
                )
            except (ValueError, KeyError, TypeError, AttributeError):
                intact = False
            if not intact:
                raise LedgerError(
                    f"{self.path}: record {number} is not the one that was written; nothing is released until the "
                    "data protection officer has restored the ledger"
                )
            head = claimed
            hashes.append(head)
            spent += record["units"] if record["kind"] == "charge" else 0
        anchored = self.anchor.read_text(encoding="ascii").strip() if self.anchor.exists() else GENESIS
        # A crash between record and anchor leaves the chain one ahead; that record counts.
        if anchored not in hashes[-2:]:
            raise LedgerError(
                f"{self.path}: its head does not meet {self.anchor.name}: records are missing or were replaced; "
                "nothing is released until the data protection officer has restored the ledger"
            )
        return self._opened(head, len(hashes) - 1, spent)

    def _append(self, file: BinaryIO, state: LedgerState, kind: str, units: int, **what: Any) -> LedgerState:
        """Write one record, make it durable, then move the anchor."""
        record = {
            "version": _VERSION,
            "seq": state.records + 1,
            "prev": state.head,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "site": self.site,
            "kind": kind,
            "units": units,
            "unit": "patient",
            "relation": "add_remove",
            "budget": {"epsilon": self.epsilon, "delta": self.delta, "units": state.budget_units},
            **what,
        }
        record["hash"] = sha256(canonical_json(record)).hexdigest()
        try:
            file.seek(0, os.SEEK_END)
            file.write(canonical_json(record) + b"\n")
            file.flush()
            os.fsync(file.fileno())
            sync_folder(self.path.parent)
            write_atomic(self.anchor, record["hash"].encode(), OWNER_ONLY)
        except OSError as error:
            raise LedgerError(f"{self.path}: could not be written ({error.strerror}); nothing is released") from error
        spent = state.spent_units + (units if kind == "charge" else 0)
        return self._opened(record["hash"], state.records + 1, spent)
