"""A file of records that nobody alters unseen: append-only JSON lines, hash-chained, locked, fsynced, anchored.

Every record names the hash of the one before it. The head, the last hash, stands in a second file too, the anchor: a
shortened or replaced chain no longer meets it. What a chain means is its ledger's business (``ledger.py``).
"""

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from clinifed.errors import LedgerError
from clinifed.files import OWNER_ONLY, canonical_json, sync_folder, write_atomic

__all__ = ["GENESIS", "Chain", "Record", "View"]

GENESIS = "0" * 64
Record = dict[str, Any]

# Never a part of a text, whose quotation marks are escaped, and never the last of a record: `kind` comes behind it.
_HASH = re.compile(rb'"hash":"[0-9a-f]{64}",')
_RESTORE = "nothing is released until the data protection officer has restored the ledger"


@dataclass(frozen=True)
class View:
    """A verified chain."""

    records: tuple[Record, ...]
    head: str  # hash of the last record, GENESIS where there is none
    torn_bytes: int  # of a last line that a crash left unfinished; it was never a record
    ahead: bool  # a crash came between the last record and its anchor


@dataclass(frozen=True)
class _Seen:
    """What of the file was verified before: its whole lines, by length and digest."""

    length: int
    hasher: Any  # hashlib's SHA-256 of those bytes
    records: tuple[Record, ...]
    head: str


_NOTHING = _Seen(0, sha256(b""), (), GENESIS)


class Chain:
    """The chain in ``path`` with its head in ``anchor``.

    Guarantees:
        - A record is on the disk, and its anchor behind it, before ``append`` returns.
        - An edit, a deletion, a reordering, a shortening or a rollback of the file is detected at the next access.
        - One process at a time writes: the file is locked while it is read and written.
        - A last line torn by a crash is cut off; a chain one record ahead of its anchor is accepted.

    Not detected: file and anchor rolled back, or rewritten, together. The head that went out with each update shows it.
    """

    def __init__(self, path: Path, anchor: Path | None = None) -> None:
        self.path = path
        self.anchor = anchor or path.with_name(f"{path.name}.anchor")
        self._seen = _NOTHING

    def create(self, record: Record) -> None:
        """Start a chain with ``record``.

        Raises:
            LedgerError: the file or its anchor is there already, or cannot be written.
        """
        there = [str(p) for p in (self.path, self.anchor) if p.exists()]
        if there:
            raise LedgerError(f"{' and '.join(there)} exists; a ledger is never replaced")
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, OWNER_ONLY))
        except OSError as error:
            raise LedgerError(f"{self.path}: the ledger cannot be made ({error.strerror})") from error
        with self.locked() as (_, append):
            append(record)

    @contextmanager
    def locked(self) -> Iterator[tuple[View, Callable[[Record], Record]]]:
        """The verified chain, and a function that appends one record to it; nobody else writes meanwhile.

        Raises:
            LedgerError: there is no file, it is damaged, or it does not meet its anchor.
        """
        with self._open(fcntl.LOCK_EX) as file:
            view = self._verify(file)
            if view.torn_bytes:
                file.truncate(self._seen.length)
            if view.ahead:  # before another record: a second crash would leave the chain two ahead, and refused
                self._move_anchor(view.head)
            yield view, lambda record: self._append(file, record)

    def read(self) -> View:
        """The verified chain; changes nothing.

        Raises:
            LedgerError: as ``locked``.
        """
        with self._open(fcntl.LOCK_SH) as file:
            return self._verify(file)

    @contextmanager
    def _open(self, lock: int) -> Iterator[BinaryIO]:
        try:
            handle = os.open(self.path, os.O_RDWR if lock == fcntl.LOCK_EX else os.O_RDONLY)
        except OSError as error:
            raise LedgerError(
                f"{self.path}: the ledger cannot be opened ({error.strerror}); nothing is released without it; a new "
                "site makes its own with `clinifed privacy ledger init`"
            ) from error
        with os.fdopen(handle, "r+b" if lock == fcntl.LOCK_EX else "rb") as file:
            fcntl.flock(file, lock)
            yield file

    def _verify(self, file: BinaryIO) -> View:
        """Replay the file. What was verified before is only compared, by its digest."""
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        seen = self._seen
        if sha256(whole[: seen.length]).digest() != seen.hasher.digest():
            seen = _NOTHING
        records, head, before = list(seen.records), seen.head, seen.records[-1]["prev"] if seen.records else None
        for line in whole[seen.length :].splitlines():
            record = self._record(line, len(records) + 1, head)
            before, head = head, record["hash"]
            records.append(record)
        hasher = seen.hasher.copy()
        hasher.update(whole[seen.length :])
        self._seen = _Seen(len(whole), hasher, tuple(records), head)
        anchored = self._anchored()
        # A crash between record and anchor leaves the chain one ahead; that record counts.
        if anchored not in (head, before):
            raise LedgerError(
                f"{self.path}: its head does not meet {self.anchor}: records are missing or were replaced; {_RESTORE}"
            )
        return View(tuple(records), head, len(content) - len(whole), ahead=anchored != head)

    def _record(self, line: bytes, number: int, head: str) -> Record:
        """The record in ``line``, checked byte for byte against its place in the chain."""
        # The hash is of the line without it, as it stands there: nothing is written anew to be compared.
        body, hashes = _HASH.subn(b"", line)
        record: Record = {}
        intact = hashes == 1
        if intact:
            try:
                record = json.loads(line)
                intact = record["prev"] == head and record["seq"] == number
                intact = intact and sha256(body).hexdigest() == record["hash"]
            except (ValueError, KeyError, TypeError, AttributeError):
                intact = False
        if not intact:
            raise LedgerError(f"{self.path}: record {number} is not the one that was written; {_RESTORE}")
        return record

    def _anchored(self) -> str:
        try:
            return self.anchor.read_text(encoding="ascii").strip()
        except FileNotFoundError:
            return GENESIS
        except (OSError, UnicodeDecodeError) as error:
            raise LedgerError(
                f"{self.anchor}: the anchor cannot be read ({type(error).__name__}); {_RESTORE}"
            ) from None

    def _append(self, file: BinaryIO, record: Record) -> Record:
        """Write one record, make it durable, then move the anchor."""
        full = {
            **record,
            "seq": len(self._seen.records) + 1,
            "prev": self._seen.head,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        full["hash"] = sha256(canonical_json(full)).hexdigest()
        line = canonical_json(full) + b"\n"
        try:
            file.seek(0, os.SEEK_END)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            sync_folder(self.path.parent)
        except OSError as error:
            raise LedgerError(f"{self.path}: could not be written ({error.strerror}); nothing is released") from error
        self._move_anchor(str(full["hash"]))
        hasher = self._seen.hasher.copy()
        hasher.update(line)
        self._seen = _Seen(self._seen.length + len(line), hasher, (*self._seen.records, full), full["hash"])
        return full

    def _move_anchor(self, head: str) -> None:
        try:
            write_atomic(self.anchor, head.encode(), OWNER_ONLY)
        except OSError as error:
            raise LedgerError(f"{self.anchor}: could not be written ({error.strerror}); nothing is released") from error
