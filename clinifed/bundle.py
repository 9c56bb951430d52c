"""What a bundle is: a directory, a manifest over every file of it, and a signature over the manifest.

::

    BUNDLE/manifest.json   schema_version 2; files: name → SHA-256 and size of every other file; exportable, reasons
           manifest.sig    Ed25519 over manifest.json, 64 raw bytes; absent from a bundle that nobody signed
           local/          what a hospital built from it on its own device (clinifed.bundle_local)
           …               everything else, as the manifest lists it

Engines are programs: whoever loads one runs it. So nothing here loads anything, and nothing is parsed before
the signature over its bytes held. No heavy library is imported.
"""

import json
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, model_validator

from clinifed.bundle_files import (
    FileEntry,
    FileName,
    differences,
    entries,
    folders_of,
    kind_of,
    limited,
    measure,
    plain_name,
    read_file,
    shown,
)
from clinifed.bundle_local import LOCAL, LocalEngine, check_local
from clinifed.bundle_signed import MAX_JSON_BYTES, check_object, parse_object, read_signed
from clinifed.errors import AuthenticityError, BundleError, ExportError
from clinifed.files import write_atomic
from clinifed.signing import sign

__all__ = [
    "LOCAL",
    "MANIFEST",
    "PURPOSE",
    "SCHEMA_VERSION",
    "SIGNATURE",
    "Contents",
    "FileEntry",
    "LocalEngine",
    "Verified",
    "check",
    "seal",
    "verify",
]

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
PURPOSE = "bundle"
SCHEMA_VERSION = 2
_OWN = (MANIFEST, SIGNATURE)


class _Manifest(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    schema_version: Literal[2]
    files: dict[FileName, FileEntry] = Field(min_length=1)
    exportable: bool  # may it leave the place where it was made?
    reasons: list[str] = []  # why not

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        wrong = [name for name in self.files if name in _OWN or name.split("/")[0] == LOCAL]
        if wrong:
            raise ValueError(f"files: lists {', '.join(wrong[:5])}, which no manifest can list")
        if self.exportable == bool(self.reasons):
            raise ValueError("reasons: say why a bundle is not exportable, and are absent from one that is")
        return self


@dataclass(frozen=True)
class Contents:
    """A bundle whose files are what its manifest says. That alone says nothing about who made it."""

    folder: Path
    manifest: Mapping[str, Any]  # all that it says
    manifest_sha256: str
    files: Mapping[str, FileEntry]
    exportable: bool
    reasons: tuple[str, ...]  # why it is not exportable
    local: Mapping[str, LocalEngine]  # by model
    key: str | None  # the public key that signed the manifest; None where nobody is known to have
    unvouched: tuple[str, ...]  # what nobody vouches for

    def read(self, name: str) -> bytes:
        """The bytes of the file ``name``, hashed again: what was checked, even if the disk has changed since.

        Raises:
            BundleError: the bundle has no such file, or it is no longer what was checked.
        """
        local = (engine.files for engine in self.local.values())
        entry = next((files[name] for files in (self.files, *local) if name in files), None)
        if entry is None:
            raise BundleError(f"{shown(name)}: the bundle has no such file")
        content = read_file(self.folder, name, entry.bytes)
        if len(content) != entry.bytes or sha256(content).hexdigest() != entry.sha256:
            raise BundleError(f"{name}: was changed after the bundle was checked")
        return content


@dataclass(frozen=True)
class Verified(Contents):
    """A bundle that somebody trusted vouches for, whole; only :func:`verify` makes one."""

    key: str


def check(folder: Path, keys: Sequence[str] = (), local_keys: Sequence[str] = ()) -> Contents:
    """See that the files of a bundle are exactly those of its manifest, and who vouches for them.

    Args:
        folder: the bundle.
        keys: public keys, hexadecimal, one of which must have signed; with none, any manifest is taken.
        local_keys: public keys of the hospital's devices, for engines that were built there.

    Raises:
        BundleError: the signature is of none of the keys, or anything was changed, added or removed; every
            problem, up to a number that can be read.
        AuthenticityError: there are keys, but no signature.
    """
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle")
    signed = read_signed(folder, MANIFEST, SIGNATURE, PURPOSE, keys)
    content = parse_object(signed.content, MANIFEST)
    manifest = check_object(_Manifest, content, MANIFEST)
    problems = differences(folder, manifest.files, besides=_OWN, elsewhere=(LOCAL,))
    local, wrong, unvouched = check_local(folder, signed.sha256, manifest.files, local_keys)
    if problems or wrong:
        raise BundleError(*limited([*problems, *wrong]))
    if signed.key is None:
        unvouched.insert(
            0,
            "authenticity unknown: the files agree with the manifest, but whoever changed one could have changed "
            "both; give the maker's public key with --key",
        )
    return Contents(
        folder,
        content,
        signed.sha256,
        manifest.files,
        manifest.exportable,
        tuple(manifest.reasons),
        local,
        signed.key,
        tuple(unvouched),
    )


def verify(folder: Path, keys: Sequence[str], local_keys: Sequence[str] = ()) -> Verified:
    """A bundle that is exactly what the holder of one of ``keys`` signed; arguments as for :func:`check`.

    Raises:
        BundleError: it is not.
        AuthenticityError: it may be, but there is no signature or no key to judge it by, for the bundle or for an
            engine that was built on a device.
    """
    found = check(folder, keys, local_keys)
    if found.unvouched or found.key is None:
        raise AuthenticityError(*limited(found.unvouched))
    return Verified(**vars(found))


def seal(folder: Path, content: Mapping[str, Any], key: Ed25519PrivateKey | None) -> None:
    """Write the manifest over every file of ``folder``, and its signature: the last step of making a bundle.

    Args:
        folder: the files, complete; its manifest and signature must not be there yet.
        content: what the manifest says besides ``schema_version`` and ``files``: ``exportable``, ``reasons`` where
            it is false, and whatever else is of use, as JSON values.
        key: who signs; with None the bundle stays unsigned, and :func:`verify` says so.

    Raises:
        ExportError: the folder holds what no bundle may hold, or the content is not a manifest's.
    """
    problems = [f"{name}: is what sealing writes" for name in ("schema_version", "files") if name in content]
    found: dict[str, FileEntry] = {}
    folders = set()
    for name, status in entries(folder, lambda name: name != LOCAL):
        mode = status.st_mode
        try:
            plain_name(name)
        except ValueError as error:
            problems.append(f"{shown(name)}: {error}")
            continue
        if name in (*_OWN, LOCAL):
            problems.append(f"{name}: is there before the bundle is sealed")
        elif stat.S_ISDIR(mode):
            folders.add(name)
        elif stat.S_ISREG(mode):
            found[name] = measure(folder, name)
        else:
            problems.append(f"{name}: is {kind_of(mode)}; a bundle holds files and directories only")
    problems += [f"{name}: is an empty directory" for name in sorted(folders - folders_of(found))]
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "files": {name: found[name].model_dump() for name in sorted(found)},
        **content,
    }
    try:
        written = (json.dumps(manifest, indent=2, allow_nan=False) + "\n").encode()
        check_object(_Manifest, parse_object(written, MANIFEST), MANIFEST)
        if len(written) > MAX_JSON_BYTES:
            problems.append(f"{MANIFEST}: has {len(written)} bytes, more than {MAX_JSON_BYTES}")
    except (TypeError, ValueError) as error:
        problems.append(f"{MANIFEST}: not JSON: {error}")
    except BundleError as error:
        problems += error.problems
    if problems:
        raise ExportError(*limited(problems))
    write_atomic(folder / MANIFEST, written)
    if key is not None:
        write_atomic(folder / SIGNATURE, bytes.fromhex(sign(key, PURPOSE, sha256(written).hexdigest())))
