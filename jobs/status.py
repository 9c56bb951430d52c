"""``clinifed status``: what a running federation is doing, asked of its server with the coordinator's kit."""

import contextlib
import io
import time
from pathlib import Path
from typing import Any

from nvflare.apis.job_def import JobMetaKey
from nvflare.fuel.flare_api.api_spec import TargetType
from rich.table import Table

from clinifed.aggregators.run_state import SERVER_FOLDER
from clinifed.files import read_lines
from clinifed.jobs.chain import JOBS_FILE
from clinifed.jobs.follow import tell_round
from clinifed.jobs.kit_processes import coordinator_session
from clinifed.jobs.submit import RUN_FILE, read_run

__all__ = ["federation_status", "status_tables"]

_JOBS = 10  # the last ones


def federation_status(place: Path, timeout_s: float = 15.0) -> dict[str, Any]:
    """Server, sites, and the last jobs; of those that run, how far.

    Args:
        place: a run directory, or a coordinator's kit. Of a run directory only its own jobs are told.

    Raises:
        ConfigError: it is neither.
        FederationError: the server does not answer.
    """
    mine: set[str] | None = None
    admin = place
    if (place / RUN_FILE).exists():
        content, _, _ = read_run(place)
        admin, mine = Path(content["admin_kit"]), {entry["job"] for entry in read_lines(place / JOBS_FILE)}
    with coordinator_session(admin, timeout_s) as session, contextlib.redirect_stdout(io.StringIO()):
        system = session.get_system_info()
        now = time.time()
        jobs = [job for job in session.list_jobs(detailed=True) if mine is None or job["job_id"] in mine]
        told = []
        for job in jobs[-_JOBS:]:
            entry = {
                "job": job["job_id"],
                "name": job.get(JobMetaKey.JOB_NAME.value) or job.get("name"),
                "status": job[JobMetaKey.STATUS.value],
                "run": None,
            }
            if entry["status"] == "RUNNING":
                with contextlib.suppress(Exception):  # it may end in this moment
                    stats = session.show_stats(job["job_id"], TargetType.SERVER)
                    entry["run"] = stats["server"][SERVER_FOLDER]
            told.append(entry)
    return {
        "server": system.server_info.status,
        "sites": {client.name: round(now - client.last_connect_time, 1) for client in system.client_info},
        "jobs": told,
    }


def status_tables(status: dict[str, Any]) -> list[Any]:
    """The same for people."""
    sites = Table(title=f"server {status['server']}")
    for column in ("site", "last heard of"):
        sites.add_column(column)
    for name, seconds in sorted(status["sites"].items()):
        sites.add_row(name, f"{seconds:.0f} s ago")
    jobs = Table(title="jobs")
    for column in ("job", "federation", "status", "rounds done", "last round"):
        jobs.add_column(column, overflow="fold")
    for job in status["jobs"]:
        run = job["run"]
        done = f"{run['next_round']} of {run['rounds']}" if run else "–"
        last = tell_round(run["last"][-1], run["rounds"]) if run and run["last"] else "–"
        jobs.add_row(job["job"], str(job["name"]), job["status"], done, last)
    return [sites, jobs]
