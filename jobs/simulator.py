"""FLARE's simulator in a process tree of its own, so that no failure and no Ctrl-C leaves anything running.

FLARE starts every simulated site in a new session, where a signal to our group does not reach it; the mark of
:mod:`clinifed.jobs.processes` does.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clinifed.contract import Contract
from clinifed.files import write_json
from clinifed.jobs.processes import end_processes, marked_environment

__all__ = ["main", "simulator_process"]

_CONTRACT_FILE = "contract.json"
_SOCKET_FOLDER = 107 - len("/pymp-12345678/listener-12345678")


def _scratch(workspace: Path) -> Path:
    """A folder for temporary files in ``workspace``, or in the system's where that would be too deep.

    Python's multiprocessing, which FLARE's simulator uses, binds a socket in it, and a socket's path has 107 bytes.
    """
    scratch = workspace / "tmp"
    if len(os.fsencode(scratch)) > _SOCKET_FOLDER:
        return Path(tempfile.mkdtemp(prefix="clinifed-"))
    scratch.mkdir(exist_ok=True)
    return scratch


@contextmanager
def simulator_process(
    contract: Contract, run: str, workspace: Path, threads: int, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """FLARE's simulator running ``contract`` under ``workspace``, its output in ``log``; ended on every way out."""
    workspace.mkdir(parents=True, exist_ok=True)
    write_json(workspace / _CONTRACT_FILE, contract.model_dump(mode="json"))
    mark = uuid.uuid4().hex
    # What FLARE and its libraries leave behind when they are ended in the middle stays inside the run, and goes.
    scratch = _scratch(workspace)
    environment = marked_environment(mark, scratch, OMP_NUM_THREADS="1", NVFLARE_SECURE_LOGGING="1")
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "clinifed.jobs.simulator", str(workspace), run, str(threads)],
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
    """``python -m clinifed.jobs.simulator WORKSPACE RUN THREADS``: the body of the process above."""
    from clinifed.jobs.recipe import FederationRecipe
    from clinifed.jobs.simulator_env import Simulation

    workspace, run, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    contract = Contract.read((workspace / _CONTRACT_FILE).read_text(encoding="utf-8"))
    environment = Simulation(clients=sorted(contract.sites), num_threads=threads, workspace_root=str(workspace))
    FederationRecipe(contract, run).simulate(environment)


if __name__ == "__main__":
    main()
