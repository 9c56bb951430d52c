"""The outbox: what a site released, kept until it is certain to have arrived, so that a crash resends the same bytes.

Sending a release again is post-processing and costs nothing; drawing its noise again would cost as much as the first.
"""

import json
import shutil
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load, save

from clinifed.errors import PrivacyError
from clinifed.files import OWNER_ONLY, canonical_json, write_atomic
from clinifed.messages import Update

__all__ = ["Outbox", "pack", "unpack"]

_HEADER = "clinifed"


def pack(update: Update) -> bytes:
    """``update`` as safetensors, its metadata in the header; equal updates give equal bytes."""
    content = {"site": update.site, "round": update.round, "meta": dict(update.meta)}
    return bytes(save(dict(sorted(update.params.items())), {_HEADER: canonical_json(content).decode()}))


def unpack(content: bytes) -> Update:
    """The update that ``pack`` made ``content`` of.

    Raises:
        PrivacyError: it is damaged; nothing of it may be sent.
    """
    try:
        params = load(content)
        length = int.from_bytes(content[:8], "little")  # safetensors: the header's length, the header, the arrays
        header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_HEADER])
        return Update(header["site"], header["round"], params, header["meta"])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise PrivacyError(f"a damaged release ({type(error).__name__}); it will not be sent") from None


class Outbox:
    """One folder per site, owner-only: a file per job and round.

    Guarantees:
        - A file is whole or absent, whenever the process is killed.
        - The same job and round give the same bytes, as often as they are asked for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, job: str, round_number: int) -> Path:
        """Where the release of this job and round lies, if there is one; the name says nothing."""
        return self._job(job) / f"{round_number}.safetensors"

    def _job(self, job: str) -> Path:
        return self.folder / sha256(job.encode()).hexdigest()[:32]

    def put(self, job: str, update: Update) -> Path:
        """Keep ``update``, on the disk before this returns.

        Raises:
            PrivacyError: something was released for this job and round already, or it cannot be written.
        """
        path = self.path(job, update.round)
        if path.exists():
            raise PrivacyError(f"round {update.round} was released already; a release is never replaced")
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.parent.mkdir(exist_ok=True, mode=0o700)
            write_atomic(path, pack(update), OWNER_ONLY)
        except OSError as error:
            raise PrivacyError(f"{path}: the release cannot be kept ({error.strerror}), so it may not leave") from error
        return path

    def get(self, job: str, round_number: int) -> Update | None:
        """What was released for this job and round, or None."""
        path = self.path(job, round_number)
        return unpack(path.read_bytes()) if path.is_file() else None

    def clean(self, jobs: Iterable[str]) -> None:
        """Forget the releases of ``jobs``: they are over, nobody asks for them again."""
        for job in jobs:
            shutil.rmtree(self._job(job), ignore_errors=True)
