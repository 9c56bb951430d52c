"""What a data protection officer does with a ledger: look, verify, export, back up. None of it changes the ledger."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clinifed.errors import LedgerError
from clinifed.files import OWNER_ONLY, canonical_json, read_lines, write_atomic
from clinifed.privacy.accountant import epsilon_of
from clinifed.privacy.chain import Chain, Record
from clinifed.privacy.claims import statement
from clinifed.privacy.ledger import LedgerState, read_ledger

__all__ = ["backup_ledger", "export_ledger", "ledger_report", "verify_ledger"]


def ledger_report(path: Path, anchor: Path | None = None) -> dict[str, Any]:
    """What a verified ledger says, as plain data: the sum, and each job's part of it.

    Raises:
        LedgerError: it is missing, damaged, or does not meet its anchor.
    """
    return _report(path, anchor)[0]


def _report(path: Path, anchor: Path | None) -> tuple[dict[str, Any], tuple[Record, ...]]:
    """The report, and the records behind it."""
    state, account, left = read_ledger(path, anchor)
    report = {
        "site": state.site,
        "format": account.format,
        **_sum(state),
        "reserved_epsilon": epsilon_of(state.reserved_units, state.delta),
        "records": state.records,
        "torn_bytes": left["torn_bytes"],
        "ahead_of_anchor": left["ahead_of_anchor"],
        "increases": [{"approved_by": name, "public_key": key} for name, key in account.approvals],
        "jobs": [
            {
                "job": name,
                "contract_sha256": job.contract,
                "epsilon": epsilon_of(job.charged, state.delta),
                "charges": len(job.charges),
                "releases": len(job.releases),
                "lost_charges": job.lost(),
                "reserved_units": job.reserved,
                "finished": job.finished,
                "last_record": job.last.isoformat() if job.last else None,
            }
            for name, job in account.jobs.items()
        ],
    }
    return report, left["records"]


def _sum(state: LedgerState) -> dict[str, Any]:
    """An epsilon with all that belongs to it; N₀, σ and C belong to a job, and stand in its records."""
    return {
        "epsilon": state.epsilon_spent,
        "delta": state.delta,
        **statement(),
        "budget_epsilon": state.epsilon_budget,
        "spent_units": state.spent_units,
        "reserved_units": state.reserved_units,
        "budget_units": state.budget_units,
        "ledger_head": state.head,
    }


def verify_ledger(path: Path, anchor: Path | None = None, published: Sequence[Path] = ()) -> dict[str, Any]:
    """Verify an intact chain that matches its anchor, and that all heads which left the site are in it.

    Args:
        published: cards, summaries, or the server's round records (``rounds.jsonl``): what others hold of this ledger.
            A ledger that was rolled back together with its anchor lacks a head that they have.

    Raises:
        LedgerError: it is not intact; with every reason.
    """
    report, records = _report(path, anchor)
    problems = []
    if report["torn_bytes"]:
        problems.append(
            f"{path}: its last line is torn ({report['torn_bytes']} bytes, a crash); the next charge cuts it off"
        )
    if report["ahead_of_anchor"]:
        problems.append(f"{path}: is one record ahead of its anchor (a crash); the next charge moves the anchor")
    own = {record["hash"] for record in records}
    for file in published:
        heads = set(_heads(_read(file), report["site"]))
        if not heads:
            problems.append(f"{file}: names no ledger head of site {report['site']}")
        problems += [
            f"{file}: head {head} left this site, but is not in {path}: the ledger was rolled back or replaced"
            for head in sorted(heads - own)
        ]
    if problems:
        raise LedgerError(*problems)
    return report


def _read(path: Path) -> Any:
    try:
        return read_lines(path) if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LedgerError(f"{path}: cannot be read as JSON ({type(error).__name__})") from None


def _heads(content: Any, site: str) -> Iterator[str]:
    """Every ``ledger_head`` below the name of ``site``."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _named(value) if key == site else _heads(value, site)
    elif isinstance(content, list):
        for value in content:
            yield from _heads(value, site)


def _named(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        for key, value in content.items():
            if key == "ledger_head" and isinstance(value, str):
                yield value
            else:
                yield from _named(value)


def export_ledger(path: Path, anchor: Path | None = None) -> dict[str, Any]:
    """The whole verified ledger as plain data: the report, and every record."""
    report, records = _report(path, anchor)
    return {"schema_version": 1, **report, "chain": list(records)}


def backup_ledger(path: Path, folder: Path, anchor: Path | None = None) -> Path:
    """Copy a verified ledger and its anchor into ``folder``; returns the copy, verified.

    An earlier backup is replaced only by one that continues it: a ledger which lacks records of its backup was rolled
    back, and the backup is then the better one.

    Raises:
        LedgerError: the ledger is not intact, was rolled back, or cannot be copied.
    """
    chain = Chain(path, anchor)
    view = chain.read()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    copy = Chain(folder / path.name)
    if copy.path.resolve() == path.resolve():
        raise LedgerError(f"{folder}: the ledger itself lies there; back it up on another disk")
    content = b"".join(canonical_json(record) + b"\n" for record in view.records)
    if copy.path.exists() and not content.startswith(copy.path.read_bytes()):
        raise LedgerError(
            f"{path}: lacks records that its backup {copy.path} has: it was rolled back or replaced; nothing was "
            "overwritten, restore the ledger from the backup"
        )
    try:
        write_atomic(copy.path, content, OWNER_ONLY)
        write_atomic(copy.anchor, view.head.encode(), OWNER_ONLY)
    except OSError as error:
        raise LedgerError(f"{folder}: the backup cannot be written ({error.strerror})") from error
    copy.read()
    return copy.path
