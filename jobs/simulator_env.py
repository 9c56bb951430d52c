"""FLARE's simulator as a recipe's environment, for any number of sites."""

import subprocess
import sys
import tempfile
from pathlib import Path

from nvflare.job_config.api import FedJob
from nvflare.recipe import SimEnv

__all__ = ["Simulation"]

_MOST = 100  # sites that the simulator's command takes unless it is told to take more, which `SimEnv` never does
_COMMAND = "nvflare.private.fed.app.simulator.simulator"  # the module that `FedJob.simulator_run` starts, too


class Simulation(SimEnv):
    """``SimEnv``, which starts the same command with ``--max_clients`` where there are more than 100 sites."""

    def deploy(self, job: FedJob) -> str:
        """Run ``job`` to its end; returns its name.

        Raises:
            RuntimeError: the simulator ended with an error.
        """
        if len(self.clients) <= _MOST:
            return str(super().deploy(job))
        workspace = Path(self.workspace_root) / job.name
        self._ensure_default_component_policy(str(workspace))
        with tempfile.TemporaryDirectory() as folder:
            job.export_job(folder)
            options = {
                "-w": workspace,
                "-c": ",".join(self.clients),
                "-t": self.num_threads,
                "-m": len(self.clients),
            }
            words = [str(word) for pair in options.items() for word in pair]
            done = subprocess.run([sys.executable, "-m", _COMMAND, str(Path(folder) / job.name), *words])
        self.last_run_failed = done.returncode != 0
        if self.last_run_failed:
            raise RuntimeError(f"FLARE's simulator ended with {done.returncode}; its logs are beneath {workspace}")
        return str(job.name)
