"""``mirror.json``: where a model's directory came from, and what every file of it must be."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clinifed.errors import ModelError
from clinifed.files import file_sha256, write_json
from clinifed.models.model_files import MIRROR

__all__ = ["Mirror", "Source", "check_mirror", "listing", "read_mirror", "write_mirror"]

_SCHEMA = 1
_MAX_BYTES = 1 << 20  # a mirror has about ten files
_SHOWN = 8  # hexadecimal digits of a hash in a message


@dataclass(frozen=True)
class Source:
    """One repository at one commit."""

    repository: str  # OWNER/NAME on the hub
    revision: str  # commit, 40 hexadecimal digits


@dataclass(frozen=True)
class Mirror:
    """What ``mirror.json`` says."""

    model: Source
    text: Source | None  # of the text tower's configuration; None where the model's own holds it
    tokenizer: Source  # of the tokenizer's files
    state_sha256: str  # of the weights, whatever file they are in
    files: dict[str, tuple[int, str]]  # name → size in bytes, SHA-256

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        files = {name: {"size": size, "sha256": digest} for name, (size, digest) in sorted(self.files.items())}
        return {"schema_version": _SCHEMA, **asdict(self), "files": files}


def listing(root: Path) -> dict[str, tuple[int, str]]:
    """Size in bytes and SHA-256 of every file below ``root`` but ``mirror.json``; contents are streamed."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if name != MIRROR and not path.is_dir():
            # What is no plain file is listed with no hash, and so is never as it should be.
            found[name] = (path.stat().st_size, file_sha256(path)) if path.is_file() else (0, "no plain file")
    return found


def write_mirror(root: Path, mirror: Mirror) -> None:
    """Write ``mirror.json``."""
    write_json(root / MIRROR, mirror.to_dict())


def read_mirror(root: Path) -> Mirror:
    """Read ``mirror.json``.

    Raises:
        ModelError: there is none, or it is not one.
    """
    path = root / MIRROR
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ModelError(f"{path}: larger than {_MAX_BYTES} bytes; this is no mirror's")
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema_version"] != _SCHEMA:
            raise ModelError(f"{path}: schema_version {content['schema_version']!r}; this clinifed reads {_SCHEMA}")
        return Mirror(
            model=Source(**content["model"]),
            text=Source(**content["text"]) if content["text"] else None,
            tokenizer=Source(**content["tokenizer"]),
            state_sha256=str(content["state_sha256"]),
            files={str(name): (int(e["size"]), str(e["sha256"])) for name, e in content["files"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: no description of a mirror ({type(error).__name__}: {error})") from error


def check_mirror(root: Path) -> Mirror:
    """Compare every file of ``root`` with its ``mirror.json``.

    Guarantees:
        - A file that is extra, missing or changed is refused, and all of them are told at once.

    Raises:
        ModelError: they differ, or there is no ``mirror.json``.
    """
    mirror, found = read_mirror(root), listing(root)
    problems = [f"{root / name}: missing" for name in sorted(mirror.files.keys() - found.keys())]
    problems += [f"{root / name}: not part of the mirror" for name in sorted(found.keys() - mirror.files.keys())]
    for name in sorted(mirror.files.keys() & found.keys()):
        (size, digest), (size_wanted, wanted) = found[name], mirror.files[name]
        if (size, digest) != (size_wanted, wanted):
            problems.append(
                f"{root / name}: changed, {size} bytes of SHA-256 {digest[:_SHOWN]}… instead of {size_wanted} of "
                f"{wanted[:_SHOWN]}…"
            )
    if problems:
        raise ModelError(*problems, f"{root} is not the mirror that {MIRROR} describes; fetch it again")
    return mirror
