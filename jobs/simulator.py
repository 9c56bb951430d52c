"""FLARE's simulator in a process tree of its own, so that no failure and no Ctrl-C leaves anything running.

FLARE starts every simulated site in a new session, where a signal to our group does not reach it. So each process of
a run carries a mark in its environment, by which all of them are found and ended.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from clinifed.contract import Contract
from clinifed.files import write_json

__all__ = ["end_processes", "main", "simulator_process"]

_MARK = "CLINIFED_RUN"
_CONTRACT_FILE = "contract.json"


def _marked(mark: str) -> list[psutil.Process]:
    """All living processes that carry ``mark``."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def end_processes(mark: str, grace_s: float = 3.0) -> None:
    """End every process that carries ``mark``: asked first, then killed."""
    for process in _marked(mark):
        try:
            process.send_signal(signal.SIGTERM)
        except psutil.NoSuchProcess:
            continue
    deadline = time.monotonic() + grace_s
    while (left := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


@contextmanager
def simulator_process(
    contract: Contract, workspace: Path, threads: int, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """FLARE's simulator running ``contract`` under ``workspace``, its output in ``log``; ended on every way out."""
    workspace.mkdir(parents=True, exist_ok=True)
    write_json(workspace / _CONTRACT_FILE, contract.model_dump(mode="json"))
    mark = uuid.uuid4().hex
    # What FLARE and its libraries leave behind when they are ended in the middle stays inside the run, and goes.
    scratch = workspace / "tmp"
    scratch.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "TMPDIR": str(scratch),
        _MARK: mark,
        # The console script's folder, since FLARE starts `python3` by name.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "OMP_NUM_THREADS": "1",
        "NVFLARE_SECURE_LOGGING": "1",
    }
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "clinifed.jobs.simulator", str(workspace), str(threads)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches us first, and we end the tree
        )
        try:
            yield process
        finally:
            end_processes(mark)
            process.wait()
            shutil.rmtree(scratch, ignore_errors=True)


def main() -> None:
    """``python -m clinifed.jobs.simulator WORKSPACE THREADS``: the body of the process above."""
    from nvflare.recipe import SimEnv

    from clinifed.jobs.recipe import FederationRecipe

    workspace, threads = Path(sys.argv[1]), int(sys.argv[2])
    contract = Contract.read((workspace / _CONTRACT_FILE).read_text(encoding="utf-8"))
    environment = SimEnv(clients=sorted(contract.sites), num_threads=threads, workspace_root=str(workspace))
    FederationRecipe(contract).simulate(environment)


if __name__ == "__main__":
    main()
