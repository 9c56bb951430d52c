"""A site's trainer in a process of its own: if it is killed, the site loses a round, not its place in the job."""

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from clinifed.contract import Contract
from clinifed.errors import FederationError
from clinifed.executors.frames import Frame, read_frame, write_frame
from clinifed.files import OWNER_ONLY
from clinifed.policy import SitePolicy

__all__ = ["TrainerGoneError", "TrainerProcess"]

_POLL_S = 0.2
_STOP_S = 5.0


class TrainerGoneError(FederationError):
    """The trainer's process ended before it answered: killed, or out of memory."""


class TrainerProcess:
    """The running trainer of one site and job.

    Its standard error goes to the policy's log, owner-only, not to FLARE's. It ends when this process ends, however
    that happens, since its standard input then closes.

    Guarantees:
        - An answer is whole or :class:`TrainerGoneError`.
    """

    def __init__(self, contract: Contract, policy: SitePolicy, job: str, coordinator: str) -> None:
        self.policy = policy
        policy.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        log = os.open(policy.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, OWNER_ONLY)
        # FLARE's credentials of this job are no business of the trainer.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("NVFLARE_JOB")}
        if policy.threads is not None:
            environment["OMP_NUM_THREADS"] = str(policy.threads)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "clinifed.executors.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
            )
        finally:
            os.close(log)
        header = {
            "contract": contract.model_dump(mode="json"),
            "policy": policy.model_dump(mode="json"),
            "job": job,
            "coordinator": coordinator,
        }
        self._send(header)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def train(self, round_number: int, delta: bytes, stopped: Callable[[], bool], timeout_s: float) -> Frame:
        """One round.

        Args:
            delta: the global delta as safetensors.
            stopped: asked while waiting; True gives up and ends the trainer.
            timeout_s: so long at most.

        Raises:
            TrainerGoneError: the process ended, or was stopped.
            FederationError: it said nothing for ``timeout_s``, and was ended.
        """
        return self._ask(f"round {round_number}", {"round": round_number}, delta, stopped, timeout_s)

    def hello(self, stopped: Callable[[], bool], timeout_s: float) -> Frame:
        """Which base model the trainer holds, in its header; it gets ready for the first round meanwhile.

        Raises:
            TrainerGoneError, FederationError: as for :meth:`train`.
        """
        return self._ask("handshake", {"hello": True}, b"", stopped, timeout_s)

    def _ask(
        self, what: str, header: dict[str, Any], body: bytes, stopped: Callable[[], bool], timeout_s: float
    ) -> Frame:
        self._send(header, body)
        deadline = time.monotonic() + timeout_s
        frame = read_frame(lambda size: self._read(size, stopped, deadline))
        if frame is None and time.monotonic() > deadline:
            self.stop()
            raise FederationError(f"{what}: the trainer did not answer in {timeout_s:g} s")
        if frame is None:
            self.stop()
            raise TrainerGoneError(f"{what}: the trainer's process ended, with {self._process.returncode}")
        return frame

    def _send(self, header: dict[str, Any], body: bytes = b"") -> None:
        assert self._process.stdin is not None
        try:
            write_frame(self._process.stdin.write, header, body)
            self._process.stdin.flush()
        except (OSError, ValueError) as error:  # ValueError: the pipe was closed on our side
            self.stop()
            raise TrainerGoneError(f"the trainer's process ended, with {self._process.returncode}") from error

    def _read(self, size: int, stopped: Callable[[], bool], deadline: float) -> bytes:
        """``size`` bytes of the answer; fewer when the process has ended or may not go on."""
        assert self._process.stdout is not None
        handle, content = self._process.stdout.fileno(), bytearray()
        while len(content) < size:
            if stopped() or time.monotonic() > deadline:
                break
            if select.select([handle], [], [], _POLL_S)[0]:
                part = os.read(handle, size - len(content))
                if not part:
                    break
                content += part
        return bytes(content)

    def stop(self) -> None:
        """End the process, now; a charge it may just have made stands."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):  # what was not read any more, it will not miss
                    stream.close()
        try:
            self._process.wait(_STOP_S if self._process.poll() is not None else 0.2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
