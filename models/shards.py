"""The embedding cache on disk: safetensors shards, owner-only, whose names say nothing and vouch for their bytes.

A shard's name is a keyed hash (HMAC-SHA256) of its bytes, so that a damaged or truncated one is known before anything
of it is parsed, and two processes that write the same rows write the same file. Rows are found by keyed hashes of what
they depend on, the first half of each of the image alone, so that its rows are found whatever else they depend on. The
key is a random one of the folder's own; without it neither says which images were seen.
"""

import hmac
import os
import re
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from clinifed.errors import DataError
from clinifed.files import OWNER_ONLY, canonical_json, write_atomic

__all__ = ["LIMIT_BYTES", "Dropped", "Shard", "Shards", "Wiped", "folder_key", "keep_only", "row_bytes", "wipe"]

LIMIT_BYTES = 8 << 30  # of all shards of a folder; the least recently used go first
_KEY = "cache.key"
_KEY_BYTES = 32
_HALF_BYTES = 16  # of the name of a row: 128 bits of its image, and 128 of all that it depends on
_ROW_BYTES = 2 * _HALF_BYTES
_SHARD = re.compile(r"^([0-9a-f]{16})-[0-9a-f]{32}\.safetensors$")
_EARLIER = re.compile(r"^[0-9a-f]{32}\.safetensors$")  # one file per manifest, before there were shards
_IDENTITY = re.compile(r"^base-[0-9a-f]{32}\.json$")  # of `KeptIdentity`
_TEMPORARY = re.compile(r"^\.(.+)\.[0-9]+\.tmp$")  # of `write_atomic`
_ABANDONED_S = 3600.0  # a temporary file so old is a dead process's
_SHOWN = 3  # names in one message


def row_bytes(features: int) -> int:
    """What one row of ``features`` float32 values takes on the disk, without a shard's header (about 200 bytes)."""
    return 4 * features + _ROW_BYTES


class Shards:
    """The shards of one space: what was made by one model, cut at one place, with one way of reading images.

    Args:
        folder: made with mode 0700 where it is absent.
        space: hashes of all that features depend on besides image and view.
        limit_bytes: of all shards of the folder, whatever their space.

    Guarantees:
        - What :meth:`read` gives is what :meth:`write` was given, byte for byte, or it is not given.
        - Any number of processes may read and write one folder at once.
        - The folder holds at most ``limit_bytes`` when a write ends, and one shard more for each process that writes.

    Raises:
        DataError: others than the owner may enter the folder, or it cannot be used.
    """

    def __init__(self, folder: Path, space: Mapping[str, object], limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder, self._limit = folder, limit_bytes
        self.damaged = 0  # shards that were dropped
        self._key = folder_key(folder)
        self._space = canonical_json(space)
        self._tag = _hmac(self._key, b"space", self._space)[:8].hex()
        self._used: set[str] = set()
        for entry in _entries(folder):
            if entry.kind == "temporary" and entry.modified < time.time() - _ABANDONED_S:
                entry.path.unlink(missing_ok=True)

    def row_key(self, image: str, *what: object) -> bytes:
        """The name, 32 bytes, of rows that are a function of ``image``, the rest of ``what``, and the space."""
        parts = (str(part).encode() for part in (image, *what))
        return _half_of(self._key, image) + _hmac(self._key, b"row", self._space, *parts)[:_HALF_BYTES]

    def read(self) -> Iterator["Shard"]:
        """Every sound shard, one in memory at a time; what is taken of one is told to :meth:`use`."""
        for entry in _entries(self.folder):
            if entry.kind == "shard" and entry.path.name.startswith(self._tag):
                found = self._open(entry.path)
                if found is not None:
                    yield found

    def use(self, shard: "Shard") -> None:
        """Note that something of it was of use: what was of none for longest goes first."""
        with suppress(FileNotFoundError):  # another process has made room
            os.utime(shard.path)
        self._used.add(shard.path.name)

    def _open(self, path: Path) -> "Shard | None":
        """One shard, or None where it is gone, or was damaged and is dropped."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # another process has made room
            return None
        except OSError:
            content = b""
        found = _parsed(self._key, path, content)
        if found is None:
            self.damaged += 1
            path.unlink(missing_ok=True)
        return found

    def write(self, rows: Sequence[bytes], features: Tensor) -> bool:
        """Keep rows (N, F) under their N names, which may repeat; returns whether there was room.

        Raises:
            OSError: the disk does not take it; nothing is half-written.
        """
        content = _encoded(rows, features)
        path = self.folder / _shard_name(self._key, self._tag, content)
        if not self._make_room(len(content)):
            return False
        write_atomic(path, content, OWNER_ONLY)
        self._used.add(path.name)
        return True

    def _make_room(self, size: int) -> bool:
        """Drop what was not used for longest, and nothing that is in use here."""
        kept = sorted((e for e in _entries(self.folder) if e.kind == "shard"), key=lambda e: e.modified)
        excess = sum(e.size for e in kept) + size - self._limit
        for entry in kept:
            if excess <= 0:
                break
            if entry.path.name not in self._used:
                entry.path.unlink(missing_ok=True)
                excess -= entry.size
        return excess <= 0


@dataclass(frozen=True)
class Shard:
    """One file of rows."""

    path: Path
    names: list[bytes]  # N
    features: Tensor  # (N, F) float32


def _hmac(key: bytes, *parts: bytes) -> bytes:
    return hmac.new(key, b"".join(len(p).to_bytes(8, "big") + p for p in parts), sha256).digest()


def _half_of(key: bytes, image: str) -> bytes:
    """The first half of the names of an image's rows."""
    return _hmac(key, b"image", image.encode())[:_HALF_BYTES]


def _shard_name(key: bytes, tag: str, content: bytes) -> str:
    return f"{tag}-{_hmac(key, b'shard', content)[:16].hex()}.safetensors"


def _encoded(rows: Sequence[bytes], features: Tensor) -> bytes:
    names = torch.from_numpy(np.frombuffer(b"".join(rows), np.uint8).reshape(-1, _ROW_BYTES).copy())
    halves = {"images": names[:, :_HALF_BYTES].contiguous(), "rows": names[:, _HALF_BYTES:].contiguous()}
    content: bytes = save({**halves, "features": features.to(torch.float32).contiguous()})
    return content


def _parsed(key: bytes, path: Path, content: bytes) -> "Shard | None":
    """The shard in ``content``; None where it is damaged, or of an earlier form, which does not tell its images."""
    if path.name != _shard_name(key, path.name[:16], content):
        return None
    tensors = load(content)
    if "images" not in tensors:
        return None
    names = torch.cat([tensors["images"], tensors["rows"]], dim=1).numpy()
    return Shard(path, [row.tobytes() for row in names], tensors["features"])


@dataclass(frozen=True)
class _Entry:
    path: Path
    kind: str  # shard, identity, key, temporary, other
    size: int
    modified: float  # s since 1970


def _entries(folder: Path) -> list[_Entry]:
    """What lies in ``folder``, by name; files that vanish meanwhile are left out."""
    found = []
    with os.scandir(folder) as listing:
        for item in listing:
            try:
                state = item.stat(follow_symlinks=False)
                plain = item.is_file(follow_symlinks=False)
            except FileNotFoundError:
                continue
            kind = _kind(item.name) if plain else "other"
            found.append(_Entry(folder / item.name, kind, state.st_size, state.st_mtime))
    return sorted(found, key=lambda entry: entry.path.name)


def _kind(name: str) -> str:
    if _SHARD.match(name) or _EARLIER.match(name):
        return "shard"
    if _IDENTITY.match(name):
        return "identity"
    if name == _KEY:
        return "key"
    inner = _TEMPORARY.match(name)
    return "temporary" if inner and _kind(inner[1]) != "other" else "other"


def folder_key(folder: Path) -> bytes:
    """The secret of an embedding cache; folder and secret are made where they are absent.

    Raises:
        DataError: others than the owner may enter the folder, or it cannot be used.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_mode & 0o077:
            raise DataError(f"{folder}: the embedding cache must be its owner's alone; say chmod 700")
        return _secret(folder)
    except OSError as error:
        raise DataError(f"{folder}: the embedding cache cannot be used ({error.strerror})") from error


def _secret(folder: Path) -> bytes:
    """The folder's secret; made whole where there is none, by whichever process comes first."""
    path = folder / _KEY
    while True:
        try:
            key = path.read_bytes()
        except FileNotFoundError:
            key = b""
        if len(key) == _KEY_BYTES:
            return key
        if key or path.exists():  # damaged: whatever it named is lost
            path.unlink(missing_ok=True)
        temporary = folder / f".{_KEY}.{os.getpid()}.tmp"
        temporary.unlink(missing_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, OWNER_ONLY)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)
        except FileExistsError:
            continue
        finally:
            temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class Dropped:
    """What :func:`keep_only` removed."""

    rows: int  # in shards that could be read
    shards: int  # dropped whole, since nobody can say whose rows they hold


def keep_only(folder: Path, images: Collection[str]) -> Dropped:
    """Remove all rows in ``folder`` but those of ``images``, whatever model, view and frames they are of.

    What may stay is named, not what must go: whoever left the manifest earlier is forgotten as well. Files are
    unlinked, as by :func:`wipe`. A process that trains meanwhile may keep rows again; end it first.

    Args:
        images: SHA-256 of each image's bytes, hexadecimal.

    Guarantees:
        - No row of another image remains, nor a shard or temporary file in which one could be.

    Raises:
        DataError: something could not be removed.
    """
    if not folder.is_dir():
        return Dropped(0, 0)
    rows = shards = 0
    try:
        key_file = folder / _KEY
        key = key_file.read_bytes() if key_file.is_file() else b""
        kept = {_half_of(key, image) for image in images} if key else set()
        for entry in _entries(folder):
            if entry.kind == "temporary":
                entry.path.unlink(missing_ok=True)
            if entry.kind != "shard":
                continue
            found = _parsed(key, entry.path, entry.path.read_bytes()) if key else None
            staying = [] if found is None else [i for i, name in enumerate(found.names) if name[:_HALF_BYTES] in kept]
            if found is not None and len(staying) == len(found.names):
                continue
            entry.path.unlink(missing_ok=True)
            if found is None:
                shards += 1
                continue
            rows += len(found.names) - len(staying)
            if staying:
                content = _encoded([found.names[i] for i in staying], found.features[staying])
                path = folder / _shard_name(key, entry.path.name[:16], content)
                write_atomic(path, content, OWNER_ONLY)
                os.utime(path, (entry.modified, entry.modified))
    except OSError as error:
        raise DataError(
            f"{folder}: not all of it could be removed ({error.strerror}); say it again, or `clinifed data wipe`"
        ) from error
    return Dropped(rows, shards)


@dataclass(frozen=True)
class Wiped:
    """What was removed."""

    shards: int
    size_bytes: int


def wipe(folder: Path) -> Wiped:
    """Remove the shards, what is kept of base models and the key in ``folder``, and then the folder itself.

    The files are unlinked. Their bytes may outlast that, on an SSD above all, and nothing that a program writes over
    them changes it; where that matters the disk must be encrypted.

    Raises:
        DataError: the folder holds other files, and nothing was removed; or there is no such folder.
    """
    if not folder.is_dir() or folder.is_symlink():
        raise DataError(f"{folder}: no such folder; nothing was removed")
    try:
        entries = _entries(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); nothing was removed") from error
    if other := [entry.path.name for entry in entries if entry.kind == "other"]:
        more = f" and {len(other) - _SHOWN} more" if len(other) > _SHOWN else ""
        raise DataError(
            f"{folder}: holds what is not the cache's ({', '.join(map(repr, other[:_SHOWN]))}{more}); "
            "nothing was removed, look at what it is"
        )
    try:
        for entry in entries:
            entry.path.unlink(missing_ok=True)
        folder.rmdir()
    except OSError as error:
        raise DataError(f"{folder}: not all of it could be removed ({error.strerror}); say it again") from error
    shards = [entry for entry in entries if entry.kind == "shard"]
    return Wiped(len(shards), sum(entry.size for entry in entries))
