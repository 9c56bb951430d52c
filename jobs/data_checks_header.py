"""The few attributes of a DICOM header that a check compares; they stay in memory and are never told.

Strangers' files are read in a process of its own, with limits: what goes wrong there costs that file's header.
"""

import json
import resource
import selectors
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["MODALITIES", "PHOTOMETRIC", "HeaderReader"]

# Defined terms of Modality (0008,0060), PS3.3 C.7.3.1.1.1, whose objects hold images.
MODALITIES = frozenset(
    (
        *("BI", "BMD", "CR", "CT", "DG", "DMS", "DX", "ECG", "EPS", "ES", "GM", "HD", "IO", "IVOCT", "IVUS", "LS"),
        *("MG", "MR", "NM", "OAM", "OCT", "OP", "OPM", "OPT", "OPTBSV", "OPTENF", "OT", "PT", "PX", "RF", "RG", "SC"),
        *("SM", "TG", "US", "VA", "XA", "XC"),
    )
)
# Defined terms of Photometric Interpretation (0028,0004), PS3.3 C.7.6.3.1.2.
PHOTOMETRIC = frozenset(
    ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
)

_KEYWORDS = (
    "Modality",
    "PhotometricInterpretation",
    "BurnedInAnnotation",
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "AccessionNumber",
    "StudyInstanceUID",
    "SOPInstanceUID",
)
_PATIENCE_S = 5.0  # for one file
_START_S = 60.0  # more for the first: the process imports pydicom
_MEMORY_BYTES = 1 << 30  # address space of the process
_LONGEST = 512  # characters of one value; longer ones are cut
_LINE_BYTES = 64 << 10  # of one answer


class HeaderReader:
    """A process that reads headers, started with the first file and again where it ended.

    Guarantees:
        - Nothing of a file is parsed in this process but the answer, JSON of at most 64 KiB.
        - A file that takes more than five seconds or a gigabyte has no header; the next one has a new process.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._fresh = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def read(self, path: Path) -> dict[str, str]:
        """Keyword → text of what stands there; empty where the header cannot be read."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # it may quote values
                bufsize=0,
            )
            self._fresh = True
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(str(path)).encode() + b"\n")
            answer = json.loads(self._answer())
            if not isinstance(answer, dict):
                raise ValueError(answer)
            self._fresh = False
            return {name: str(answer[name])[:_LONGEST] for name in _KEYWORDS if name in answer}
        except (OSError, ValueError, RecursionError):
            self._end()
            return {}
        except BaseException:
            self._end()
            raise

    def _answer(self) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        handle, content = self._process.stdout, b""
        deadline = time.monotonic() + _PATIENCE_S + (_START_S if self._fresh else 0.0)
        with selectors.DefaultSelector() as waiting:
            waiting.register(handle, selectors.EVENT_READ)
            while not content.endswith(b"\n"):
                left = deadline - time.monotonic()
                part = handle.read(_LINE_BYTES) if left > 0 and waiting.select(left) else b""
                content += part
                if not part or len(content) > _LINE_BYTES:
                    raise ValueError("no answer")
        return content

    def _end(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.communicate()


def _header(path: Path) -> dict[str, str]:
    """In the process of its own."""
    from pydicom import dcmread
    from pydicom.multival import MultiValue

    try:
        ds = dcmread(path, stop_before_pixels=True, specific_tags=list(_KEYWORDS))
        values = {name: ds.get(name) for name in _KEYWORDS}
        return {
            name: ("\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value))[:_LONGEST]
            for name, value in values.items()
            if value
        }
    except Exception:  # a stranger's bytes: pydicom raises whatever they make it meet, MemoryError too
        return {}


def _serve() -> None:
    """Answer each path on standard input by one line; end with the input."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold what was read
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(_header(Path(json.loads(line)))).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
