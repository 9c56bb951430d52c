"""A JSON file beside its signature: first the bytes and the signature, and only then what they say."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from clinifed.bundle_files import limited, read_file, shown
from clinifed.errors import AuthenticityError, BundleError
from clinifed.signing import verify

__all__ = ["MAX_JSON_BYTES", "SIGNATURE_BYTES", "Signed", "check_object", "parse_object", "read_signed"]

MAX_JSON_BYTES = 4 << 20
SIGNATURE_BYTES = 64  # Ed25519, raw: of hexadecimal there would be several spellings
_MAX_DEPTH = 32

_M = TypeVar("_M", bound=BaseModel)


@dataclass(frozen=True)
class Signed:
    """The bytes of a JSON file, of which nothing has been parsed."""

    content: bytes
    sha256: str
    key: str | None  # the public key that signed it; None where there was none to judge by


def read_signed(folder: Path, name: str, signature_name: str, purpose: str, keys: Sequence[str]) -> Signed:
    """The bytes of ``name``, once the signature beside it held.

    Args:
        folder: holds both files.
        name: the JSON file.
        signature_name: 64 raw bytes: Ed25519 for ``purpose`` over the SHA-256 of ``name``, as
            :func:`clinifed.signing.sign` makes it.
        purpose: what the signature must have been made for.
        keys: public keys, hexadecimal, one of which must have signed; with none, the signature is not judged.

    Raises:
        BundleError: a file cannot be read, or no key made this signature of these bytes.
        AuthenticityError: there are keys, but no signature.
    """
    content = read_file(folder, name, MAX_JSON_BYTES)
    digest = sha256(content).hexdigest()
    signature = None
    if os.path.lexists(folder / signature_name):
        signature = read_file(folder, signature_name, SIGNATURE_BYTES)
        if len(signature) != SIGNATURE_BYTES:
            raise BundleError(f"{signature_name}: has {len(signature)} bytes; a signature has {SIGNATURE_BYTES}")
    if not keys:
        return Signed(content, digest, None)
    if signature is None:
        raise AuthenticityError(f"{signature_name}: is missing, so nobody vouches for it; ask for a signed one")
    for key in keys:
        if verify(key, purpose, digest, signature.hex()):
            return Signed(content, digest, key)
    raise BundleError(
        f"{signature_name}: no given key ({len(keys)}) made this signature of this {name}; "
        "somebody else signed it, or it was changed since"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError("a number is not finite")
    return value


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object: UTF-8, no key twice, finite numbers, no deep nesting.

    Raises:
        BundleError: it is something else.
    """
    try:
        found = json.loads(
            content.decode("utf-8"), object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite
        )
    except RecursionError:
        raise BundleError(f"{where}: nested deeper than {_MAX_DEPTH}") from None
    except ValueError as error:
        raise BundleError(f"{where}: not JSON that can be read ({shown(error)})") from None
    if not isinstance(found, dict):
        raise BundleError(f"{where}: expected an object, found {type(found).__name__}")
    level: list[Any] = [found]
    for _ in range(_MAX_DEPTH):
        inside = [value for node in level for value in (node.values() if isinstance(node, dict) else node)]
        level = [value for value in inside if isinstance(value, dict | list)]
        if not level:
            return found
    raise BundleError(f"{where}: nested deeper than {_MAX_DEPTH}")


def check_object(model: type[_M], found: dict[str, Any], where: str) -> _M:
    """``found`` as a ``model``.

    Raises:
        BundleError: with every key that is wrong.
    """
    try:
        return model.model_validate(found)
    except ValidationError as error:
        problems = [
            f"{where}: {'.'.join(shown(part) for part in e['loc']) or 'whole'}: {shown(e['msg'])}"
            for e in error.errors(include_input=False, include_url=False, include_context=False)
        ]
        raise BundleError(*limited(problems)) from None
