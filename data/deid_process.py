"""De-identification in a process of its own: a file that crashes, hangs or fills the memory costs itself only.

The process is this module, run as ``python -m``. Standard input brings one JSON line of settings and then one for each
path; standard output takes, for each, a JSON line and the bytes it announces. It ends with its standard input.

Guarantees:
    - The process writes no file (RLIMIT_FSIZE is 0) and leaves no dump of its memory, which would hold a patient.
    - What it prints to standard error, where codecs in C quote what they read, goes nowhere.
    - The site's key goes through the pipe, not through the command line that others on the machine can read.
"""

import json
import os
import re
import resource
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from clinifed.data.deid_dataset import DEEDS
from clinifed.data.deid_table import image_classes
from clinifed.errors import DataError

__all__ = ["Deidentifier"]

_MEMORY_MIB = 2048  # more than the process has when it starts; several times the largest decoded file
_WALL_S = 60.0  # for one file; pictures of many frames are looked at for text one by one
_START_S = 60.0  # imports, on a busy machine
_MAX_HEADER_BYTES = 1 << 16
_MAX_CONTENT_BYTES = 512 << 20
_MAX_REASON = 80  # characters
_NAME = re.compile(r"[0-9a-f]{20}\.dcm")
_CRASHED = "reading it ended its process"


class Deidentifier:
    """The process from the outside; a context that ends it.

    Args:
        options, key, issuer: as for ``clinifed.data.deidentify``.
        wall_s: how long one file may take, in seconds.
        memory_mib: how much memory one file may take, in MiB.
    """

    def __init__(
        self, options: Sequence[str], key: bytes, issuer: str, wall_s: float = _WALL_S, memory_mib: int = _MEMORY_MIB
    ) -> None:
        settings = {"options": list(options), "key": key.hex(), "issuer": issuer, "memory_mib": memory_mib}
        self._settings, self._wall_s = settings, wall_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def file(self, path: Path, *, reviewed: bool = False) -> tuple[str, bytes, str, Counter[str]]:
        """One file de-identified: its name, content, SOP Class UID, and what was done.

        Args:
            reviewed: a person has looked at the picture: no text is suspected in it any more.

        Raises:
            DataError: it must stay behind, or it ended the process, or took too long or too much memory.
        """
        try:
            process = self._started()
            deadline = time.monotonic() + self._wall_s
            self._say(process, {"path": os.fsdecode(path), "reviewed": reviewed})
            header = self._line(process, deadline)
            if isinstance(reason := header.get("reason"), str) and len(reason) <= _MAX_REASON:
                raise DataError(reason)
            name, sop_class, done, size = (header.get(part) for part in ("name", "sop_class", "done", "bytes"))
            # A file that took the process over could make it say anything.
            if (
                not (isinstance(name, str) and _NAME.fullmatch(name))
                or not (isinstance(sop_class, str) and sop_class in image_classes())
                or not (
                    isinstance(done, dict) and set(done) <= set(DEEDS) and all(type(n) is int for n in done.values())
                )
                or type(size) is not int
            ):
                raise _GoneError(_CRASHED)
            return name, self._bytes(process, size, deadline), sop_class, Counter(done)
        except _GoneError as gone:
            self._end()  # the next file has a new one
            raise DataError(str(gone)) from None
        except BaseException as error:
            if not isinstance(error, DataError):
                self._end()  # what it still says would be taken for an answer about the next file
            raise

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "clinifed.data.deid_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                bufsize=0,
            )
            self._say(self._process, self._settings)
            try:
                self._line(self._process, time.monotonic() + _START_S)
            except _GoneError:
                self._end()
                raise RuntimeError("the process that de-identifies does not start") from None
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    @staticmethod
    def _say(process: subprocess.Popen[bytes], content: dict[str, Any]) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(content).encode() + b"\n")
        except OSError:
            raise _GoneError(_CRASHED) from None

    def _line(self, process: subprocess.Popen[bytes], deadline: float) -> dict[str, Any]:
        length = int.from_bytes(self._bytes(process, 4, deadline), "big")
        if length > _MAX_HEADER_BYTES:
            raise _GoneError(_CRASHED)
        try:
            header = json.loads(self._bytes(process, length, deadline))
        except ValueError:
            header = None
        if not isinstance(header, dict):
            raise _GoneError(_CRASHED)
        return header

    @staticmethod
    def _bytes(process: subprocess.Popen[bytes], length: int, deadline: float) -> bytes:
        assert process.stdout is not None
        if not 0 <= length <= _MAX_CONTENT_BYTES:
            raise _GoneError(_CRASHED)
        found, handle = bytearray(), process.stdout.fileno()
        while len(found) < length:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([handle], [], [], left)[0]:
                raise _GoneError("takes too long")
            block = os.read(handle, min(length - len(found), 1 << 20))
            if not block:
                raise _GoneError(_CRASHED)
            found += block
        return bytes(found)


class _GoneError(Exception):
    """The process ended, said nonsense, or must be ended; the text is the reason."""


def _confine(memory_mib: int) -> None:
    """Give away what one file's de-identification does not need."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    statm = Path("/proc/self/statm")  # libraries are mapped already; elsewhere than on Linux the limit is on data only
    mapped = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0
    kind = resource.RLIMIT_AS if mapped else resource.RLIMIT_DATA
    resource.setrlimit(kind, (mapped + (memory_mib << 20),) * 2)


def main() -> None:
    """Answer until standard input ends."""
    from clinifed.data.deid_table import Profile
    from clinifed.data.deidentify import deidentify_file

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # codecs print where answers are not

    def answer(header: dict[str, Any], content: bytes = b"") -> None:
        text = json.dumps(header).encode()
        answers.write(len(text).to_bytes(4, "big") + text + content)
        answers.flush()

    settings = json.loads(sys.stdin.buffer.readline())
    profile, key = Profile(settings["options"]), bytes.fromhex(settings["key"])
    _confine(settings["memory_mib"])
    with suppress(BrokenPipeError, KeyboardInterrupt):
        answer({"ready": True})
        for line in sys.stdin.buffer:
            asked = json.loads(line)
            try:
                found = deidentify_file(
                    Path(asked["path"]), profile, key, issuer=settings["issuer"], reviewed=asked["reviewed"]
                )
            except DataError as error:
                answer({"reason": str(error)})
                continue
            header = {"name": found.name, "sop_class": found.sop_class, "done": dict(found.done)}
            answer(header | {"bytes": len(found.content)}, found.content)


if __name__ == "__main__":
    main()
