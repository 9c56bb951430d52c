"""Real processes: one smoke federation for all tests of a session, run through the command line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

CONFIGS = Path(__file__).parents[2] / "simulator_configs"


@dataclass(frozen=True)
class Finished:
    """A command that ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-P", "-m", "clinifed", *map(str, arguments)]


@pytest.fixture(scope="session")
def clinifed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    elsewhere = tmp_path_factory.mktemp("elsewhere")  # never the repository root: bare folders are importable there

    def run(*arguments: object, timeout_s: float = 400, typed: str = "") -> Finished:
        done = subprocess.run(
            command(*arguments), capture_output=True, text=True, cwd=elsewhere, timeout=timeout_s, input=typed
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


@dataclass(frozen=True)
class Run:
    """A finished smoke run."""

    path: Path
    summary: dict[str, Any]
    err: str


@pytest.fixture(scope="session")
def smoke(clinifed: Callable[..., Finished], tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("smoke") / "run"
    done = clinifed("simulate", CONFIGS / "smoke.yaml", "--out", path, "--json")
    assert done.code == 0, done.err + (path / "log.txt").read_text()[-3000:]
    return Run(path, done.json(), done.err)


def processes_of(run: Path) -> list[str]:
    """Command lines of living processes that name ``run``, which none may after it ended."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            if str(run) in line and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(line)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
