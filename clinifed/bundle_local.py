"""Engines that a hospital built from a bundle on its own device, and signed with its own key.

::

    BUNDLE/local/<model>/engine.json   which bundle and which ONNX it was built from, and SHA-256 of every file here
                         engine.sig    Ed25519 over it, 64 raw bytes, by the device's key
                         …             the engine
"""

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from clinifed.bundle_files import FileEntry, FileName, differences, entries, kind_of, plain_name, shown
from clinifed.bundle_signed import check_object, parse_object, read_signed
from clinifed.errors import AuthenticityError, BundleError

__all__ = ["LOCAL", "PURPOSE", "SIDECAR", "SIDECAR_SIGNATURE", "LocalEngine", "check_local"]

LOCAL = "local"
SIDECAR = "engine.json"
SIDECAR_SIGNATURE = "engine.sig"
PURPOSE = "local engine"


class _Onnx(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    name: FileName  # relative to the bundle
    sha256: str


class _Sidecar(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    schema_version: Literal[1]
    manifest_sha256: str
    onnx: _Onnx
    files: dict[FileName, FileEntry] = Field(min_length=1)  # relative to the model's folder


@dataclass(frozen=True)
class LocalEngine:
    """One model's engine that was built on the device."""

    key: str | None  # the public key that signed it; None where it was not judged
    onnx: str  # what it was built from, a name in the bundle
    files: Mapping[str, FileEntry]  # by name relative to the bundle
    content: Mapping[str, Any]  # all that the sidecar says


def check_local(
    bundle: Path, manifest_sha256: str, files: Mapping[str, FileEntry], keys: Sequence[str]
) -> tuple[dict[str, LocalEngine], list[str], list[str]]:
    """Judge everything below ``local/``.

    Args:
        bundle: the bundle's directory.
        manifest_sha256: of its manifest.
        files: what the manifest lists.
        keys: public keys of the hospital's devices; with none, signatures are not judged.

    Returns:
        The engines by model, what is wrong, and what nobody vouches for.
    """
    folder = bundle / LOCAL
    if not os.path.lexists(folder):
        return {}, [], []
    mode = folder.lstat().st_mode
    if not stat.S_ISDIR(mode):
        return {}, [f"{LOCAL}: is {kind_of(mode)} that does not belong there"], []
    engines: dict[str, LocalEngine] = {}
    problems: list[str] = []
    unvouched: list[str] = []
    try:
        models = list(entries(folder, lambda _: False))
    except BundleError as error:
        return {}, [f"{LOCAL}/{problem}" for problem in error.problems], []
    if not models:
        problems.append(f"{LOCAL}: is an empty directory that does not belong there")
    for model, status in models:
        where = f"{LOCAL}/{shown(model)}"
        if not stat.S_ISDIR(status.st_mode):
            problems.append(f"{where}: is {kind_of(status.st_mode)} that does not belong there")
            continue
        try:
            plain_name(model)
            engines[model] = _check_engine(bundle, model, manifest_sha256, files, keys)
        except ValueError as error:
            problems.append(f"{where}: {error}")
        except AuthenticityError as error:
            unvouched += [f"{where}/{problem}" for problem in error.problems]
        except BundleError as error:
            problems += [f"{where}/{problem}" for problem in error.problems]
        else:
            if not keys:
                unvouched.append(f"{where}: built on a device, whose key was not given; give it with --local-key")
    return engines, problems, unvouched


def _check_engine(
    bundle: Path, model: str, manifest_sha256: str, files: Mapping[str, FileEntry], keys: Sequence[str]
) -> LocalEngine:
    """The engine in ``local/<model>``. Raises BundleError, its problems relative to that folder."""
    folder = bundle / LOCAL / model
    signed = read_signed(folder, SIDECAR, SIDECAR_SIGNATURE, PURPOSE, keys)
    content = parse_object(signed.content, SIDECAR)
    sidecar = check_object(_Sidecar, content, SIDECAR)
    problems = []
    if sidecar.manifest_sha256 != manifest_sha256:
        problems.append(f"{SIDECAR}: manifest_sha256: built from another bundle; build it again from this one")
    source = files.get(sidecar.onnx.name)
    if source is None:
        problems.append(f"{SIDECAR}: onnx.name: {sidecar.onnx.name} is not in the bundle")
    elif source.sha256 != sidecar.onnx.sha256:
        problems.append(f"{SIDECAR}: onnx.sha256: built from another {sidecar.onnx.name}; build it again")
    problems += [f"{SIDECAR}: files: lists {name}" for name in (SIDECAR, SIDECAR_SIGNATURE) if name in sidecar.files]
    problems += differences(folder, sidecar.files, besides=(SIDECAR, SIDECAR_SIGNATURE))
    if problems:
        raise BundleError(*problems)
    listed = {f"{LOCAL}/{model}/{name}": entry for name, entry in sidecar.files.items()}
    return LocalEngine(signed.key, sidecar.onnx.name, listed, content)
