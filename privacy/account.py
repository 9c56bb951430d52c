"""What the records of a ledger add up to: budget, charges, reservations, releases. Pure; no file is touched here.

Kinds of records, format 2::

    open      the budget of the site's lifetime; the first record, or the first of format 2
    reserve   a job's whole cost, set aside before a pixel is read
    charge    one round's cost, taken from the job's reservation before its noise is drawn
    release   the hash of what a charge paid for, written before it leaves
    free      what is left of a reservation returns to the budget: its job finished, or is dead
    refuse    a job that the budget did not pay for
    increase  a larger budget, asked for by one person and signed by another

Format 1 knew ``charge`` and ``refuse`` only, with the budget in each record.
"""

from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256

from clinifed.errors import LedgerError
from clinifed.files import canonical_json
from clinifed.privacy.accountant import budget_units
from clinifed.privacy.chain import Record
from clinifed.signing import verify

__all__ = ["FORMAT", "INCREASE", "Account", "JobAccount", "increase_digest"]

FORMAT = 2
INCREASE = "budget increase"  # the purpose that an officer's signature is for


@dataclass
class JobAccount:
    """One job's part."""

    contract: str = ""
    cohort: str = ""  # the keyed hash of its patients
    reserved: int = 0  # units still set aside
    charged: int = 0  # units, over all its charges
    last: datetime | None = None  # its last record
    finished: bool = False
    charges: dict[str, tuple[int, int]] = field(default_factory=dict)  # nonce → (round, units)
    releases: dict[str, str] = field(default_factory=dict)  # nonce → SHA-256 of what left

    def lost(self) -> int:
        """Charges that paid for nothing: a crash came before the release."""
        return len(self.charges) - len(self.releases)


@dataclass
class Account:
    """The sum of a chain."""

    site: str = ""
    epsilon: float = 0.0  # of the budget
    delta: float = 0.0
    budget: int = 0  # units of 1e-12 of μ²
    spent: int = 0
    format: int = 0
    jobs: dict[str, JobAccount] = field(default_factory=dict)
    approvals: list[tuple[str, str]] = field(default_factory=list)  # of increases: officer, public key

    @property
    def reserved(self) -> int:
        """Units set aside for jobs that are under way."""
        return sum(job.reserved for job in self.jobs.values())

    @property
    def available(self) -> int:
        """Units that a new reservation may take."""
        return self.budget - self.spent - self.reserved

    def add(self, record: Record) -> None:
        """Take ``record`` into the sum.

        Raises:
            LedgerError: the record contradicts those before it; a chain that was written by this code never does.
        """
        try:
            wrong = self._add(record)
        except (KeyError, TypeError, ValueError) as error:
            wrong = f"it has no usable {error}"
        if wrong:
            raise LedgerError(f"record {record.get('seq')} ({record.get('kind')}): {wrong}")

    def _add(self, record: Record) -> str:
        kind, version = record["kind"], record["version"]
        if version > FORMAT:
            return f"format {version} is newer than this clinifed, which knows {FORMAT}; update clinifed"
        if version == 1:
            return self._add_first_format(record)
        self.site = self.site or record["site"]
        if record["site"] != self.site:
            return f"it is of site {record['site']!r}, the ledger of {self.site!r}"
        if kind == "open":
            return self._open(record)
        if self.format < FORMAT:
            return "the ledger was not opened in this format"
        if kind == "increase":
            return self._increase(record)
        if kind == "refuse":
            return ""
        job = self.jobs.setdefault(record["job"], JobAccount())
        job.last = datetime.fromisoformat(record["time"])
        return {"reserve": self._reserve, "charge": self._charge, "release": self._release, "free": self._free}[kind](
            record, job
        )

    def _open(self, record: Record) -> str:
        if self.format == FORMAT:
            return "the ledger is open already; its budget grows by a signed increase only"
        epsilon, delta = record["epsilon"], record["delta"]
        if self.format == 1 and (epsilon, delta) != (self.epsilon, self.delta):
            return "the budget changed with the format"
        self.epsilon, self.delta, self.format = epsilon, delta, FORMAT
        self.budget = budget_units(epsilon, delta)
        return ""

    def _add_first_format(self, record: Record) -> str:
        budget = record["budget"]
        if self.format == FORMAT:
            return "format 1 after format 2"
        if self.format == 1 and record["site"] != self.site:
            return f"it is of site {record['site']!r}, the ledger of {self.site!r}"
        self.site, self.format = record["site"], 1
        self.epsilon, self.delta = budget["epsilon"], budget["delta"]
        self.budget = budget_units(self.epsilon, self.delta)
        if record["kind"] == "charge":
            self.spent += int(record["units"])
        return "" if self.spent <= self.budget else "more was charged than the budget"

    def _reserve(self, record: Record, job: JobAccount) -> str:
        units = _positive(record)
        if units > self.available:
            return f"{units} units were reserved where {self.available} were left"
        if job.reserved:
            return "the job has a reservation already"
        job.reserved, job.contract = units, record["contract"]
        job.cohort = record.get("cohort", {}).get("patients_hmac", "")
        return ""

    def _charge(self, record: Record, job: JobAccount) -> str:
        units, nonce = _positive(record), record["nonce"]
        if units > job.reserved:
            return f"{units} units were charged where the job had {job.reserved} reserved"
        if nonce in job.charges:
            return "its nonce was charged before"
        job.reserved -= units
        job.charged += units
        self.spent += units
        job.charges[nonce] = (int(record["round"]), units)
        return ""

    def _release(self, record: Record, job: JobAccount) -> str:
        nonce = record["nonce"]
        if nonce not in job.charges or nonce in job.releases:
            return "no charge paid for it" if nonce not in job.charges else "its charge was used before"
        job.releases[nonce] = record["release_sha256"]
        return ""

    def _free(self, record: Record, job: JobAccount) -> str:
        job.finished = job.finished or record["why"] == "finished"
        job.reserved = 0
        return ""

    def _increase(self, record: Record) -> str:
        if record["requested_by"] == record["approved_by"]:
            return "the person who asks for a larger budget must not be the one who approves it"
        if not verify(record["public_key"], INCREASE, increase_digest(record), record["signature"]):
            return "the signature of the approving officer is not valid"
        units = budget_units(record["epsilon"], self.delta)
        if units <= self.budget:
            return "an increase must increase the budget"
        self.epsilon, self.budget = record["epsilon"], units
        self.approvals.append((record["approved_by"], record["public_key"]))
        return ""


def _positive(record: Record) -> int:
    units = record["units"]
    if type(units) is not int or units <= 0:
        raise ValueError(f"units ({units!r})")
    return units


def increase_digest(record: Record) -> str:
    """What an officer signs: the increase, at its place in this site's chain, so that it cannot be used twice."""
    names = ("site", "prev", "epsilon", "requested_by", "approved_by", "reason", "public_key")
    return sha256(canonical_json({name: record[name] for name in names})).hexdigest()
