"""Frames between an executor and its trainer: a JSON header, then the bytes that it announces. No pickle."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from clinifed.errors import FederationError
from clinifed.files import canonical_json

__all__ = ["Frame", "read_frame", "write_frame"]

_LENGTH = 4  # bytes of the header's length, big-endian
_LIMIT = 1 << 24  # of a header: contracts are a few kilobytes


@dataclass(frozen=True)
class Frame:
    """One message."""

    header: dict[str, Any]
    body: bytes


def write_frame(write: Callable[[bytes], Any], header: dict[str, Any], body: bytes = b"") -> None:
    """Write one frame through ``write``."""
    text = canonical_json({**header, "body_bytes": len(body)})
    write(len(text).to_bytes(_LENGTH, "big") + text + body)


def read_frame(read: Callable[[int], bytes]) -> Frame | None:
    """The next frame, or None at the end of the stream.

    Args:
        read: returns exactly as many bytes as asked for, fewer only at the end.

    Raises:
        FederationError: what came is no frame.
    """
    prefix = read(_LENGTH)
    if len(prefix) < _LENGTH:
        return None
    length = int.from_bytes(prefix, "big")
    if length > _LIMIT:
        raise FederationError(f"a frame announces a header of {length} bytes; the trainer is not one of ours")
    text = read(length)
    if len(text) < length:
        return None
    header: dict[str, Any] = json.loads(text)
    size = int(header.pop("body_bytes"))
    body = read(size)
    return Frame(header, body) if len(body) == size else None
