"""FLARE's own ``nvflare preflight-check`` of a kit, run where it can be run, and what it says in our words.

FLARE's check ends with a dry run: it starts the kit for a few seconds. Of a kit that runs, that would be a second
process with the same identity, which stock FLARE lets displace the first; and the ports of a running server are taken.
So of a running kit only what is safe is asked.
"""

import errno
import re
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil
from nvflare.tool.package_checker.check_rule import CHECK_PASSED, CheckServerAvailable
from nvflare.tool.package_checker.utils import NVFlareRole

from clinifed.jobs.kit import Kit
from clinifed.jobs.processes import end_processes, marked_environment

__all__ = ["Outcome", "flare_check", "is_running"]

_LIMIT_S = 120.0
_ADVICE = {"Check server available": "start the server, or open the way to it"}


@dataclass(frozen=True)
class Outcome:
    """What FLARE's check found."""

    problems: tuple[str, ...]
    says: str


def is_running(kit: Kit) -> bool:
    """Whether a FLARE process of this kit lives on this machine."""
    module = f"nvflare.private.fed.app.{'server.server_train' if kit.role == 'server' else 'client.client_train'}"
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            if module in line and Path(line[line.index("-m", line.index(module)) + 1]).resolve() == kit.path:
                return True
        except (psutil.NoSuchProcess, psutil.AccessDenied, ValueError, IndexError):
            continue
    return False


def _ports(kit: Kit) -> list[int]:
    return [kit.address[1], int(kit.config["servers"][0]["admin_port"])]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(5)
        return probe.connect_ex(("localhost", port)) == 0


def _held(port: int) -> bool:
    """Whether the kernel still keeps a port from a stopped server, as it does for a minute."""
    with socket.socket() as probe:
        try:
            probe.bind(("localhost", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE and not _listens(port)
    return False


def flare_check(kit: Kit, patience_s: float) -> Outcome:
    """Run FLARE's check of ``kit``, and end whatever it started.

    Args:
        patience_s: how long to wait for ports that a server stopped a moment ago still holds.
    """
    if is_running(kit):
        return _running(kit)
    if kit.role == "server":
        deadline = time.monotonic() + patience_s
        while any(_held(port) for port in _ports(kit)) and time.monotonic() < deadline:
            time.sleep(1.0)
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="clinifed-preflight-") as scratch:
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "nvflare.cli", "preflight-check", "-p", str(kit.path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=marked_environment(mark, Path(scratch), NVFLARE_SECURE_LOGGING="true", COLUMNS="200"),
                timeout=_LIMIT_S,
                text=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Outcome((f"{kit.path}: FLARE's check did not end within {_LIMIT_S:g} s",), "no answer")
        finally:
            end_processes(mark)
    if done.returncode == 0:
        return Outcome((), "passed, with a dry run")
    rows = re.findall(r"^\| (.+?)\s*\| (.+?)\s*\| (.+?)\s*\|$", done.stdout, re.M)
    failed = [row for row in rows if row[1] not in (CHECK_PASSED, "Problems")]
    problems = [f"{kit.path}: {name}: {what}; {_ADVICE.get(name, advice)}" for name, what, advice in failed]
    return Outcome(tuple(problems) or (f"{kit.path}: FLARE's check ended with {done.returncode}",), "failed")


def _running(kit: Kit) -> Outcome:
    """Of a kit that runs: whether the server answers at its ports, or can be reached from the site."""
    if kit.role == "server":
        silent = [port for port in _ports(kit) if not _listens(port)]
        problems = tuple(
            f"{kit.path}: the server runs, but nothing listens on port {port}; see log.txt" for port in silent
        )
        return Outcome(problems, "the server runs and holds its ports, so that only they were asked")
    result = CheckServerAvailable("Check server available", NVFlareRole.CLIENT)(str(kit.path), None)
    problems = () if result.problem == CHECK_PASSED else (f"{kit.path}: {result.problem}; {result.solution}",)
    return Outcome(problems, "the site runs, so that FLARE's dry run was left out")
