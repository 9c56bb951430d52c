"""Which patients took part in which job: kept at the site, owner-only, for the day on which one of them asks.

The ledger names a cohort by a keyed hash that says nothing elsewhere; the list behind it lies in a folder beside.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from hmac import compare_digest
from hmac import new as hmac
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from clinifed.errors import LedgerError
from clinifed.files import OWNER_ONLY, write_atomic
from clinifed.privacy.account import Account
from clinifed.privacy.chain import Record

__all__ = ["Cohorts", "Touched", "touched"]


class Cohorts:
    """The cohorts of one site.

    Args:
        folder: a file per cohort, of keyed pseudonyms.
        key: the site's signing key, which keys the hash as well.
    """

    def __init__(self, folder: Path, key: Ed25519PrivateKey) -> None:
        self.folder, self._key = folder, key.private_bytes_raw()

    def _name(self, content: bytes) -> str:
        return hmac(self._key, b"cohort\x00" + content, sha256).hexdigest()

    def keep(self, patients: Sequence[str]) -> str:
        """Keep the sorted pseudonyms of one cohort; returns its name, HMAC-SHA256, hexadecimal."""
        content = "\n".join(patients).encode()
        name = self._name(content)
        path = self.folder / name
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomic(path, content, OWNER_ONLY)
        return name

    def patients(self, name: str) -> frozenset[str]:
        """The pseudonyms of cohort ``name``.

        Raises:
            LedgerError: the list is missing, or not the one that was kept.
        """
        path = self.folder / name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise LedgerError(f"{path}: the list of this cohort is missing ({error.strerror}); restore it") from None
        if not compare_digest(self._name(content), name):
            raise LedgerError(f"{path}: not the list that was kept, or another signing key; restore it")
        return frozenset(content.decode().split("\n"))


@dataclass(frozen=True)
class Touched:
    """One job whose releases a patient's data touched."""

    job: str
    contract: str
    rounds: tuple[int, ...]
    release_sha256: tuple[str, ...]
    checkpoints: tuple[str, ...]  # cards of models that these releases went into


def touched(
    patient: str, account: Account, records: Sequence[Record], cohorts: Cohorts, cards: Mapping[str, Mapping[str, Any]]
) -> list[Touched]:
    """What of the site's releases ``patient`` took part in, by ledger and lineage.

    Args:
        patient: the keyed pseudonym in the site's manifest.
        records: of the site's ledger.
        cards: where a checkpoint's card lies → its content; a card names its job, those of the checkpoint that it
            began with, and the cohort of an in-house head, if any.

    Raises:
        LedgerError: a cohort's list is missing: then nobody can say, and this does not guess.
    """
    found = []
    for record in records:
        if record["kind"] != "reserve" or "cohort" not in record:
            continue
        job = account.jobs[record["job"]]
        if patient in cohorts.patients(record["cohort"]["patients_hmac"]) and job.releases:
            found.append(
                Touched(
                    record["job"],
                    job.contract,
                    tuple(sorted(job.charges[nonce][0] for nonce in job.releases)),
                    tuple(job.releases.values()),
                    tuple(where for where, card in cards.items() if record["job"] in _jobs(card)),
                )
            )
    for where, card in cards.items():
        own = (card.get("personalised") or {}).get("patients_hmac")
        if own is not None and patient in cohorts.patients(own):
            found.append(Touched("in-house heads, never released", str(card.get("contract_sha256")), (), (), (where,)))
    return found


def _jobs(card: Mapping[str, Any]) -> tuple[str, ...]:
    """The jobs that a checkpoint's parameters come from: its own, and those it began with."""
    return (str(card.get("job")), *(str(job) for job in (card.get("started_from") or {}).get("jobs", ())))
