"""What is known of a base model without loading it: a small file of the site's cache, for exactly these files.

A site whose images are all in the cache needs of its model only the hash, how it wants its images, and what its prompts
come to. All three are a function of the model's bytes and of the libraries that read them, and are kept under both.
"""

import base64
import hmac
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clinifed.files import OWNER_ONLY, canonical_json, write_atomic
from clinifed.models.model_files import Preprocess
from clinifed.models.shards import folder_key

__all__ = ["Identity", "KeptIdentity", "prompts_key"]

log = logging.getLogger(__name__)

_SCHEMA = 1


@dataclass(frozen=True)
class Identity:
    """What a base model is."""

    sha256: str  # of all weights
    preprocess: Preprocess
    parameter_bytes: int
    prompts: dict[str, Tensor] = field(default_factory=dict)  # prompts_key → (N, D) float32, L2-normalised


def prompts_key(texts: Sequence[str]) -> str:
    """The name of what was computed for ``texts`` in one pass; last digits depend on what else was in it."""
    return sha256(canonical_json(list(texts))).hexdigest()


class KeptIdentity:
    """The file that keeps an identity.

    Args:
        folder: the embedding cache, its owner's alone; made with the first identity that is kept.
        files: SHA-256 of each of the model's files, by name.
        versions: of the libraries that read them.

    Guarantees:
        - What :meth:`read` gives was written in this folder for the same files and versions, or it is not given:
          the content carries a keyed hash (HMAC-SHA256 under the folder's own key).
    """

    def __init__(self, folder: Path, files: Mapping[str, str], versions: Mapping[str, str | None]) -> None:
        self._folder = folder
        self._of = canonical_json({"schema": _SCHEMA, "files": dict(files), "versions": dict(versions)})

    def _hmac(self, key: bytes, content: bytes) -> bytes:
        return hmac.new(key, b"identity|" + sha256(self._of).digest() + content, sha256).hexdigest().encode()

    def _path(self, key: bytes) -> Path:
        return self._folder / f"base-{self._hmac(key, b'name')[:32].decode()}.json"

    def read(self) -> Identity | None:
        """The identity, or None where there is none or the file is damaged.

        Raises:
            DataError: others than the owner may enter the folder, or it cannot be used.
        """
        if not self._folder.exists():
            return None
        key = folder_key(self._folder)
        try:
            stated, _, body = self._path(key).read_bytes().partition(b"\n")
        except OSError:
            return None
        if not hmac.compare_digest(stated, self._hmac(key, body)):
            log.warning("what was kept of the base model is damaged; the model is loaded instead")
            return None
        content = json.loads(body)
        how = content["preprocess"]
        return Identity(
            sha256=content["sha256"],
            preprocess=Preprocess(how["size_px"], tuple(how["mean"]), tuple(how["std"]), how["interpolation"]),
            parameter_bytes=content["parameter_bytes"],
            prompts={name: _tensor(*entry) for name, entry in content["prompts"].items()},
        )

    def write(self, identity: Identity) -> None:
        """Keep ``identity``; a disk that takes no more costs time at the next start, nothing else.

        Raises:
            DataError: others than the owner may enter the folder, or it cannot be used.
        """
        content = {
            "sha256": identity.sha256,
            "preprocess": asdict(identity.preprocess),
            "parameter_bytes": identity.parameter_bytes,
            "prompts": {name: _text(rows) for name, rows in identity.prompts.items()},
        }
        body, key = canonical_json(content), folder_key(self._folder)
        try:
            write_atomic(self._path(key), self._hmac(key, body) + b"\n" + body, OWNER_ONLY)
        except OSError as error:
            log.warning("the disk takes no more of the embedding cache (%s); the model is not kept", error.strerror)


def _text(rows: Tensor) -> tuple[int, str]:
    """(N, D) float32 as N and base64 of its little-endian bytes."""
    return len(rows), base64.b64encode(rows.numpy().astype("<f4").tobytes()).decode()


def _tensor(count: int, text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").reshape(count, -1).astype(np.float32))
