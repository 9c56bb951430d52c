"""One process that reads strangers' files, from the outside: asked, watched, and ended."""

import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clinifed.data.decoding_worker import LENGTH_BYTES, Limits
from clinifed.data.reasons import Reason
from clinifed.data.volumes import MAX_FRAME_VALUES

__all__ = ["GoneError", "Reader"]

Floats = NDArray[np.float32]

_MAX_HEADER_BYTES = 1 << 16
_MAX_BYTES = 64 << 20  # of an answer that is text: what a directory lists
_START_S = 60.0  # imports of a reader, on a busy machine
_STOP_S = 0.5


class GoneError(Exception):
    """The reader ended, said nonsense, or was ended; the text is the reason."""


class Reader:
    """One process that reads files, one after the other."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self.files, self.rss_kib = limits, 0, 0
        # FLARE's credentials of a job are no business of a reader; threads of libraries would only take memory.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("NVFLARE_JOB")}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "clinifed.data.decoding_worker", limits.encoded()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what a codec prints may be of the file
            env=environment,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        self._poll = select.poll()
        self._poll.register(self._out, select.POLLIN | select.POLLHUP)
        try:
            self._header(time.monotonic() + _START_S)
        except GoneError:
            self.end()
            raise RuntimeError("the process that reads images does not start") from None

    def ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], Floats | bytes | None]:
        """The answer to one request. Raises GoneError, after which the reader is of no use."""
        text = json.dumps(request).encode()
        deadline = time.monotonic() + self._limits.wall_s
        try:
            os.write(self._in, len(text).to_bytes(LENGTH_BYTES, "big") + text)
        except OSError:
            raise GoneError(Reason.CRASHED) from None
        header = self._header(deadline)
        self.files += 1
        size, shape = header.get("bytes"), header.get("shape")
        if size is not None:
            if type(size) is not int or not 0 <= size <= _MAX_BYTES:
                raise GoneError(Reason.CRASHED)
            content = bytearray(size)
            self._fill(memoryview(content), deadline)
            return header, bytes(content)
        if shape is None:
            return header, None
        if (
            not isinstance(shape, list)
            or len(shape) not in (3, 4)
            or not all(type(side) is int and side > 0 for side in shape)
            or (len(shape) == 4 and shape[3] != 3)
            or math.prod(shape) > MAX_FRAME_VALUES
        ):
            raise GoneError(Reason.CRASHED)
        values = np.empty(shape, np.float32)
        self._fill(values.data.cast("B"), deadline)
        return header, values

    def _header(self, deadline: float) -> dict[str, Any]:
        prefix = bytearray(LENGTH_BYTES)
        self._fill(memoryview(prefix), deadline)
        length = int.from_bytes(prefix, "big")
        if length > _MAX_HEADER_BYTES:
            raise GoneError(Reason.CRASHED)
        text = bytearray(length)
        self._fill(memoryview(text), deadline)
        try:
            header = json.loads(text)
        except ValueError:
            header = None
        if not isinstance(header, dict):
            raise GoneError(Reason.CRASHED)
        return header

    def _fill(self, space: memoryview, deadline: float) -> None:
        at = 0
        while at < len(space):
            left = deadline - time.monotonic()
            if left <= 0 or not self._poll.poll(left * 1000):
                raise GoneError(Reason.TIME)
            count = os.readv(self._out, [space[at:]])
            if count == 0:
                raise GoneError(Reason.CRASHED)
            at += count

    def end(self, patience_s: float = _STOP_S) -> str:
        """End the process, now, or when it follows its closed input. Returns why it had ended by itself, if it had."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        if not self._ends_by_itself(patience_s):
            self._process.kill()
        if self._process.returncode is None:
            with suppress(ChildProcessError):
                _, status = os.waitpid(self._process.pid, 0)
                self._process.returncode = os.waitstatus_to_exitcode(status)
        return Reason.TIME if self._process.returncode == -signal.SIGXCPU else Reason.CRASHED

    def _ends_by_itself(self, patience_s: float) -> bool:
        deadline, pause = time.monotonic() + patience_s, 0.001
        while True:
            with suppress(ChildProcessError):
                if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                    if time.monotonic() > deadline:
                        return False
                    time.sleep(pause)
                    pause *= 2
                    continue
            return True

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def forget(self) -> None:
        """In a forked child: the process is the parent's; only our copies of its pipes are closed."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        self._process.returncode = 0
