"""Files that are whole or absent: atomic, durable writes, owner-only where they hold what must not leave."""

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

__all__ = ["append_line", "canonical_json", "file_sha256", "read_lines", "sha256_of", "write_atomic", "write_json"]

OWNER_ONLY = 0o600


def canonical_json(content: Any) -> bytes:
    """The one JSON text of ``content`` (sorted keys, no blanks, finite numbers), so that equal means equal bytes."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256_of(content: bytes) -> str:
    """SHA-256 of ``content``, hexadecimal."""
    return sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        digest = sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a new or replaced name in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write ``content`` to ``path``: afterwards the file is the old or the new one, never a mixture."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, content: Any, mode: int = 0o644) -> None:
    """Write ``content`` as readable JSON, atomically; NaN and infinity are refused."""
    write_atomic(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode(), mode)


def append_line(path: Path, content: Any, mode: int = OWNER_ONLY, *, durable: bool = False) -> None:
    """Append one JSON line; a reader that follows the file sees whole lines only after their newline.

    Args:
        durable: return only when the line is on the disk.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(canonical_json(content) + b"\n")
        if durable:
            file.flush()
            os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete JSON lines of ``path``; a torn last line is left out, an absent file is empty."""
    if not path.is_file():
        return []
    text = path.read_bytes()
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
