"""FLARE's simulator in a process tree of its own, so that no failure and no Ctrl-C leaves anything running.

FLARE starts every simulated site in a new session, where a signal to our group does not reach it; the mark of
:mod:`clinifed.jobs.processes` does.
"""

import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clinifed.contract import Contract
from clinifed.files import write_json
from clinifed.jobs.processes import end_processes, marked_environment

__all__ = ["main", "simulator_process"]

_CONTRACT_FILE = "contract.json"


@contextmanager
def simulator_process(
    contract: Contract, run: str, workspace: Path, threads: int, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """FLARE's simulator running ``contract`` under ``workspace``, its output in ``log``; ended on every way out."""
    workspace.mkdir(parents=True, exist_ok=True)
    write_json(workspace / _CONTRACT_FILE, contract.model_dump(mode="json"))
    mark = uuid.uuid4().hex
    # What FLARE and its libraries leave behind when they are ended in the middle stays inside the run, and goes.
    scratch = workspace / "tmp"
    scratch.mkdir(exist_ok=True)
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
    from nvflare.recipe import SimEnv

    from clinifed.jobs.recipe import FederationRecipe

    workspace, run, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    contract = Contract.read((workspace / _CONTRACT_FILE).read_text(encoding="utf-8"))
    environment = SimEnv(clients=sorted(contract.sites), num_threads=threads, workspace_root=str(workspace))
    FederationRecipe(contract, run).simulate(environment)


if __name__ == "__main__":
    main()
