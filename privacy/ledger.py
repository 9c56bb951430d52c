"""The budget ledger a hospital holds: one for the site's lifetime, reserved and charged before anything is released.

The order is reserve → charge → noise → outbox → release → send. A crash after the charge and before the outbox loses
the charge; a crash after the outbox loses nothing, since the same bytes are sent again.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from clinifed.errors import BudgetExceededError, LedgerError
from clinifed.policy import Budget, SitePolicy
from clinifed.privacy.account import FORMAT, INCREASE, Account, JobAccount, increase_digest
from clinifed.privacy.accountant import budget_units, epsilon_of
from clinifed.privacy.chain import Chain, Record
from clinifed.signing import public_key, sign

__all__ = ["Ledger", "LedgerState", "read_ledger"]


@dataclass(frozen=True)
class LedgerState:
    """What a verified ledger adds up to."""

    site: str
    head: str  # hash of the last record
    records: int
    spent_units: int  # Σ 1/σ² over all charges, units of 1e-12
    reserved_units: int  # set aside for jobs under way
    budget_units: int
    epsilon_budget: float
    delta: float

    @property
    def epsilon_spent(self) -> float:
        """ε that all charges so far amount to, at the ledger's δ."""
        return epsilon_of(self.spent_units, self.delta)


class Ledger:
    """The ledger of one site, for writing.

    Args:
        path: the file; there is one for the site's lifetime.
        site: whose it is.
        budget: what the site's policy permits now. Less than the ledger's budget counts; more is refused, since a
            budget grows by a signed, second-person record only (:meth:`increase`).
        anchor: the file of the head; default beside ``path``.
        reservation_hours: a reservation whose job has written nothing for so long is a dead job's. Its rest returns
            to the budget when another job needs it; the dead job, should it return, must reserve anew.
        officers: who may approve an increase, name → Ed25519 key; an increase by anybody else stops everything.

    Guarantees:
        - The budget is never exceeded: charges and reservations together stay within it, in whole units.
        - Nothing is charged but from a reservation, and nothing released but what was charged.
        - A charge is on the disk before ``charge`` returns; so is a release.
        - Two jobs never both get the last of the budget.
    """

    def __init__(
        self,
        path: Path,
        site: str,
        budget: Budget,
        anchor: Path | None = None,
        reservation_hours: float = 168.0,
        officers: Mapping[str, str] | None = None,
    ) -> None:
        self.chain = Chain(path, anchor)
        self.officers = dict(officers or {})
        self.site, self.budget = site, budget
        self.reservation = timedelta(hours=reservation_hours)
        self._account, self._added, self._head = Account(), 0, ""

    @classmethod
    def of(cls, policy: SitePolicy) -> "Ledger":
        """The ledger that ``policy`` names."""
        return cls(policy.ledger, policy.site, policy.budget, policy.anchor, policy.reservation_hours, policy.officers)

    def create(self) -> None:
        """Open a new ledger with the whole budget unspent.

        Raises:
            LedgerError: it, or its anchor, exists.
        """
        budget_units(self.budget.epsilon, self.budget.delta)  # an impossible budget is refused before a file is made
        self.chain.create(self._opening())

    def _opening(self) -> Record:
        return {
            "version": FORMAT,
            "site": self.site,
            "kind": "open",
            "unit": "patient",
            "relation": "add_remove",
            "epsilon": self.budget.epsilon,
            "delta": self.budget.delta,
            "units": budget_units(self.budget.epsilon, self.budget.delta),
        }

    def migrate(self) -> None:
        """Go on with a ledger of format 1 in the present format; what was spent stays spent.

        Raises:
            LedgerError: it is not of format 1, not this site's, or of another budget.
        """
        with self._open(checked=False) as (account, append):
            if account.format != 1:
                raise LedgerError(f"{self.chain.path}: is of format {account.format} already; there is nothing to do")
            append({**self._opening(), "migrated_from": 1})

    def reserve(self, job: str, units: int, contract: str, **what: Any) -> LedgerState:
        """Set ``units`` aside for ``job``, before a pixel is read. Again for the same job: only what it lacks.

        Args:
            units: the job's whole cost, reserve rounds included.
            contract: SHA-256 of its contract.
            what: more to record, such as the cohort.

        Raises:
            BudgetExceededError: they do not fit; the refusal is recorded.
            LedgerError: the ledger is damaged, or the job reserved under another contract.
        """
        with self._open() as (account, append):
            mine = account.jobs.get(job, JobAccount())
            if mine.contract not in ("", contract):
                raise LedgerError(f"job {job} reserved under contract {mine.contract}, and comes with {contract} now")
            lacking = units - mine.charged
            if mine.reserved or mine.finished or lacking <= 0:
                return self._state(account)
            room = self._room(account)
            if lacking > room:
                self._bury(account, append, job)
                room = self._room(account)
            if lacking > room:
                append({**self._named("refuse", job), "units": lacking, "contract": contract})
                self._refuse(account, lacking, account.reserved)
            append({**self._named("reserve", job), "units": lacking, "contract": contract, **what})
            return self._state(account)

    def charge(self, job: str, round_number: int, units: int, nonce: str, **what: Any) -> LedgerState:
        """Charge one round of ``job`` from its reservation, before its noise is drawn.

        Args:
            nonce: names this charge; the release it pays for carries the same one.
            what: more to record: releases, noise_multiplier, max_grad_norm, nominal_patients.

        Raises:
            BudgetExceededError: the reservation does not hold ``units`` (any more); nothing may be drawn.
            LedgerError: the ledger is damaged or cannot be written.
        """
        with self._open() as (account, append):
            mine = account.jobs.get(job, JobAccount())
            if units > mine.reserved or self._room(account) + account.reserved < units:
                append({**self._named("refuse", job), "units": units, "round": round_number})
                self._refuse(account, units, account.reserved - mine.reserved)
            append({**self._named("charge", job), "units": units, "round": round_number, "nonce": nonce, **what})
            return self._state(account)

    def release(self, job: str, round_number: int, nonce: str, release_sha256: str) -> LedgerState:
        """Record what a charge paid for, before it leaves. Once per charge.

        Raises:
            LedgerError: no charge has this nonce, or it was used.
        """
        with self._open() as (account, append):
            mine = account.jobs.get(job, JobAccount())
            if nonce not in mine.charges or nonce in mine.releases:
                raise LedgerError(f"job {job}, round {round_number}: no unused charge pays for this release")
            append(
                {
                    **self._named("release", job),
                    "round": round_number,
                    "nonce": nonce,
                    "release_sha256": release_sha256,
                }
            )
            return self._state(account)

    def finish(self, job: str) -> LedgerState:
        """Return what is left of the job's reservation to the budget; once is enough, again does nothing."""
        with self._open() as (account, append):
            mine = account.jobs.get(job)
            if mine is not None and not mine.finished:
                append({**self._named("free", job), "units": mine.reserved, "why": "finished"})
            return self._state(account)

    def increase(
        self, epsilon: float, requested_by: str, approved_by: str, reason: str, key: Ed25519PrivateKey
    ) -> LedgerState:
        """Enlarge the budget: asked for by one person, signed by another.

        Raises:
            LedgerError: the two are one, the budget does not grow, or the ledger is damaged.
        """
        with self._open(checked=False) as (account, append):
            record: Record = {
                **self._named("increase"),
                "epsilon": epsilon,
                "requested_by": requested_by,
                "approved_by": approved_by,
                "reason": reason,
                "public_key": public_key(key),
                "prev": self._head,
            }
            record["signature"] = sign(key, INCREASE, increase_digest(record))
            append(record)
            return self._state(account)

    def state(self) -> LedgerState:
        """Verify the whole ledger and add it up.

        Raises:
            LedgerError: it is missing, damaged, or not the one that the policy means.
        """
        return self._state(self.account())

    def account(self) -> Account:
        """The verified sum, job by job."""
        view = self.chain.read()
        account = self._add_up(view.records)
        self._check(account)
        return account

    @contextmanager
    def _open(self, *, checked: bool = True) -> Iterator[tuple[Account, Callable[[Record], None]]]:
        """The sum, and a function that appends one record and takes it into the sum."""
        with self.chain.locked() as (view, write):
            account = self._add_up(view.records)
            if checked:
                self._check(account)

            def append(record: Record) -> None:
                # What contradicts the records before it is refused here, before it is written.
                self._added = -1  # until it is on the disk, the sum is not the file's
                account.add({**record, "seq": len(view.records) + 1, "time": datetime.now(UTC).isoformat()})
                written = write(record)
                self._added, self._head = written["seq"], written["hash"]

            yield account, append

    def _add_up(self, records: tuple[Record, ...]) -> Account:
        """The sum over verified ``records``; those added before are not added again."""
        known = 0 < self._added <= len(records) and records[self._added - 1]["hash"] == self._head
        if not known:
            self._account, self._added = Account(), 0
        try:
            for record in records[self._added :]:
                self._account.add(record)
        except LedgerError as error:
            self._added = -1
            raise LedgerError(f"{self.chain.path}: {error}; nothing is released") from None
        self._added, self._head = len(records), records[-1]["hash"] if records else ""
        return self._account

    def _check(self, account: Account) -> None:
        """Refuse a ledger that is not the one that the policy means."""
        path, problem = self.chain.path, ""
        if not account.format:
            problem = "holds no record; a ledger starts with its budget"
        elif account.site != self.site:
            problem = f"is the ledger of site {account.site!r}, not of {self.site!r}"
        elif account.format < FORMAT:
            problem = f"is of format {account.format}; say `clinifed privacy ledger migrate {path}`"
        elif account.delta != self.budget.delta:
            problem = f"was opened for delta {account.delta:g}, the policy says {self.budget.delta:g}; it never changes"
        elif account.epsilon < self.budget.epsilon:
            problem = (
                f"holds a budget of epsilon {account.epsilon:g}, the policy says {self.budget.epsilon:g}; an increase "
                "is a record signed by a second person: `clinifed privacy ledger increase`"
            )
        strangers = sorted({name for name, key in account.approvals if self.officers.get(name) != key})
        if strangers:
            problem = f"a budget increase was approved by {', '.join(strangers)}, whom the policy names no officer"
        if problem:
            raise LedgerError(f"{path}: {problem}; nothing is released")

    def _named(self, kind: str, job: str | None = None) -> Record:
        return {"version": FORMAT, "site": self.site, "kind": kind, **({} if job is None else {"job": job})}

    def _permitted(self, account: Account) -> int:
        """The budget in units: the ledger's, or the policy's where that is less."""
        return min(account.budget, budget_units(self.budget.epsilon, self.budget.delta))

    def _room(self, account: Account) -> int:
        return self._permitted(account) - account.spent - account.reserved

    def _bury(self, account: Account, append: Callable[[Record], None], besides: str) -> None:
        """Free the reservations of dead jobs."""
        now = datetime.now(UTC)
        for name, job in account.jobs.items():
            if name != besides and job.reserved and job.last is not None and now - job.last > self.reservation:
                append({**self._named("free", name), "units": job.reserved, "why": "expired"})

    def _state(self, account: Account) -> LedgerState:
        return LedgerState(
            account.site,
            self._head,
            self._added,
            account.spent,
            account.reserved,
            self._permitted(account),
            min(account.epsilon, self.budget.epsilon),
            account.delta,
        )

    def _refuse(self, account: Account, units: int, others: int) -> NoReturn:
        taken = account.spent + others
        held = f" ({epsilon_of(others, account.delta):.4f} of it reserved by other jobs)" if others else ""
        raise BudgetExceededError(
            f"site {self.site}: this would take epsilon from {epsilon_of(taken, account.delta):.4f}{held} to "
            f"{epsilon_of(taken + units, account.delta):.4f}, beyond the budget of "
            f"{min(account.epsilon, self.budget.epsilon):g} (delta {account.delta:g}); nothing was released"
        )


def read_ledger(path: Path, anchor: Path | None = None) -> tuple[LedgerState, Account, Mapping[str, Any]]:
    """A ledger as its file says, for those who only look: state, sum, and what a crash left behind.

    Raises:
        LedgerError: it is missing, damaged, or does not meet its anchor.
    """
    view = Chain(path, anchor).read()
    account = Account()
    try:
        for record in view.records:
            account.add(record)
    except LedgerError as error:
        raise LedgerError(f"{path}: {error}") from None
    if not account.format:
        raise LedgerError(f"{path}: holds no record; a ledger starts with its budget")
    state = LedgerState(
        account.site,
        view.head,
        len(view.records),
        account.spent,
        account.reserved,
        account.budget,
        account.epsilon,
        account.delta,
    )
    return state, account, {"torn_bytes": view.torn_bytes, "ahead_of_anchor": view.ahead, "records": view.records}
