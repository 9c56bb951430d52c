"""Process trees that always end: each process carries a mark in its environment, by which all of them are found.

FLARE starts sites and jobs in new sessions, where a signal to our group does not reach them, and parents die before
their children. The mark is inherited by every child, however it was started.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

__all__ = ["MARK", "end_processes", "marked", "marked_environment"]

MARK = "CLINIFED_RUN"
_KILL_S = 10.0  # what SIGKILL has not ended by then hangs in the kernel, and no further signal helps


def marked_environment(mark: str, scratch: Path | None = None, **more: str) -> dict[str, str]:
    """The environment for a tree of processes that carries ``mark``, and ``more`` variables.

    Args:
        scratch: their folder for temporary files; what they leave there when they are ended goes with it.
    """
    # FLARE starts `python3` by name, so the console script's folder comes first.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    temporary = {} if scratch is None else {"TMPDIR": str(scratch)}
    return {**os.environ, **temporary, MARK: mark, "PATH": path, **more}


def marked(mark: str, more: Mapping[str, str] | None = None) -> list[psutil.Process]:
    """All living processes that carry ``mark``, and ``more`` variables if given."""
    wanted = {MARK: mark, **(more or {})}
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if process.status() != psutil.STATUS_ZOMBIE and wanted.items() <= environment.items():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def end_processes(mark: str, grace_s: float = 3.0, more: Mapping[str, str] | None = None) -> None:
    """End every process that carries ``mark`` (and ``more``): asked first, unless ``grace_s`` is 0, then killed."""
    if grace_s > 0:
        for process in marked(mark, more):
            _send(process, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while marked(mark, more) and time.monotonic() < deadline:
            time.sleep(0.1)
    # A daemon that restarts what dies may have started one in between: killed until none is left.
    deadline = time.monotonic() + _KILL_S
    while (left := marked(mark, more)) and time.monotonic() < deadline:
        for process in left:
            _send(process, signal.SIGKILL)
        time.sleep(0.05)
