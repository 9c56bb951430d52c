"""The process that reads strangers' files for :mod:`clinifed.data.decoding`, within limits, and then answers.

Standard input brings requests, standard output takes answers: the length of a JSON header (4 bytes, big-endian), the
header, then the bytes it announces. It ends with its standard input, so with its parent, however that ends.

Guarantees:
    - It writes no file: RLIMIT_FSIZE is 0, and so is RLIMIT_CORE, since a dump of its memory would hold a patient.
    - One file takes so much memory and processor time and no more; the kernel ends it otherwise.
"""

import ctypes
import json
import os
import resource
import sys
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from time import process_time
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from clinifed.data.reasons import Reason
from clinifed.errors import DataError

__all__ = ["LENGTH_BYTES", "Limits", "main"]

LENGTH_BYTES = 4
_MAX_FILES_OPEN = 32
_NICE = 5  # the model goes first
_PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h
_STATM, _STATUS = Path("/proc/self/statm"), Path("/proc/self/status")


@dataclass(frozen=True)
class Limits:
    """What one file may take; the process that reads it is ended at the limit."""

    memory_mib: int = 400  # more than the process has before it reads its first file
    cpu_s: int = 5
    wall_s: float = 4.8  # watched by the parent, which ends it within the rest of 5 s

    def encoded(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))


def confine(limits: Limits) -> None:
    """Give away what reading a file does not need."""
    os.nice(_NICE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MAX_FILES_OPEN, _MAX_FILES_OPEN))
    # What is mapped already, libraries most of all; elsewhere than on Linux the limit is on data only.
    mapped = int(_STATM.read_text().split()[0]) * resource.getpagesize() if _STATM.exists() else 0
    kind = resource.RLIMIT_AS if mapped else resource.RLIMIT_DATA
    resource.setrlimit(kind, (mapped + (limits.memory_mib << 20),) * 2)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # no process, no thread
        ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def most_memory_kib() -> int:
    """The most memory that this process has had; getrusage would count what its parent had when it was started."""
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = _STATUS.read_text()
    return int(status[status.index("VmHWM:") + 6 :].split(maxsplit=1)[0])


def allow_cpu(limits: Limits) -> None:
    """``cpu_s`` from now on, less what is lost by counting in whole seconds; the kernel ends the process then."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(process_time()) + limits.cpu_s, hard))


def answer(request: dict[str, Any]) -> tuple[dict[str, Any], NDArray[np.float32] | bytes | None]:
    """What one request asks for; a reason where the file does not give it."""
    from clinifed.data.dicom import read_volume
    from clinifed.data.dicomdir import read_directory
    from clinifed.data.fingerprint import read_header
    from clinifed.data.volumes import Frames

    path = Path(request["path"])
    try:
        if request["ask"] == "origin":
            return {"value": astuple(read_header(path, request["label_tag"]))}, None
        if request["ask"] == "directory":
            listed = json.dumps(read_directory(path)).encode()
            return {"bytes": len(listed)}, listed
        volume = read_volume(path, Frames(request["frames"]))
        return {"shape": volume.shape}, volume
    except DataError as error:
        return {"reason": str(error)}, None
    except MemoryError:
        return {"reason": str(Reason.MEMORY)}, None
    except RecursionError:
        return {"reason": str(Reason.DAMAGED)}, None


def read_request(stream: BinaryIO) -> dict[str, Any] | None:
    """The next request; None at the end."""
    prefix = stream.read(LENGTH_BYTES)
    if len(prefix) < LENGTH_BYTES:
        return None
    text = stream.read(int.from_bytes(prefix, "big"))
    request: dict[str, Any] = json.loads(text)
    return request


def write_answer(stream: BinaryIO, header: dict[str, Any], body: NDArray[np.float32] | bytes | None) -> None:
    """Header and values; an array must be contiguous."""
    text = json.dumps(header).encode()
    stream.write(len(text).to_bytes(LENGTH_BYTES, "big") + text)
    if body is not None:
        stream.write(body if isinstance(body, bytes) else body.data.cast("B"))
    stream.flush()


def main() -> None:
    """Answer until standard input closes, or a file took all the memory."""
    limits = Limits(**json.loads(sys.argv[1]))
    import clinifed.data.dicom
    import clinifed.data.dicomdir
    import clinifed.data.fingerprint  # noqa: F401 - all libraries and codecs, before memory is limited

    # Codecs written in C print to 1 and 2; answers go where they cannot.
    answers = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    confine(limits)
    with suppress(BrokenPipeError, KeyboardInterrupt):
        write_answer(answers, {"ready": True}, None)
        while (request := read_request(sys.stdin.buffer)) is not None:
            allow_cpu(limits)
            started = process_time()
            header, body = answer(request)
            header["cpu_s"] = process_time() - started
            header["rss_kib"] = most_memory_kib()
            # After the limit was met, what is left of the memory is in pieces.
            header["last"] = header.get("reason") == Reason.MEMORY
            write_answer(answers, header, body)
            body = None  # before the next one is read
            if header["last"]:
                break
    with suppress(OSError, ValueError):
        answers.close()


if __name__ == "__main__":
    main()
