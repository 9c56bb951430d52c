"""What `clinifed status` tells: server, sites and jobs, of a run directory its own jobs only."""

import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from rich.console import Console

from clinifed.aggregators.run_state import SERVER_FOLDER
from clinifed.errors import ConfigError
from clinifed.files import append_line
from clinifed.jobs import status as module
from clinifed.jobs.chain import JOBS_FILE
from clinifed.jobs.status import federation_status, status_tables
from clinifed.jobs.submit import begin

LAST = {"round": 1, "counted": True, "accepted": ["alder", "birch"], "missing": {"cedar": "deadline"}, "seconds": 3.5}
RUNNING = {"run": "run", "next_round": 2, "rounds": 5, "last": [LAST]}


class Session:
    """Stands for FLARE's admin session."""

    def __init__(self, jobs):
        self.jobs = jobs

    def get_system_info(self):
        sys.stdout.write("what FLARE prints")
        clients = [SimpleNamespace(name=name, last_connect_time=time.time() - 4) for name in ("birch", "alder")]
        return SimpleNamespace(server_info=SimpleNamespace(status="started"), client_info=clients)

    def list_jobs(self, detailed):
        return [{"job_id": name, "name": "unit", "status": status} for name, status in self.jobs.items()]

    def show_stats(self, job, target):
        if job == "ending":
            raise RuntimeError("no such job")
        return {"server": {SERVER_FOLDER: RUNNING}}


@pytest.fixture
def ask(monkeypatch):
    def run(place, **jobs):
        @contextmanager
        def session(admin, timeout_s):
            asked.append(admin)
            yield Session(jobs)

        monkeypatch.setattr(module, "coordinator_session", session)
        return federation_status(place)

    asked = run.asked = []
    return run


def test_server_sites_and_jobs_are_told_and_of_running_ones_how_far(ask, tmp_path, capsys):
    told = ask(tmp_path, old="FINISHED:COMPLETED", new="RUNNING")
    assert told["server"] == "started"
    assert {name: round(seconds) for name, seconds in told["sites"].items()} == {"alder": 4, "birch": 4}
    assert told["jobs"] == [
        {"job": "old", "name": "unit", "status": "FINISHED:COMPLETED", "run": None},
        {"job": "new", "name": "unit", "status": "RUNNING", "run": RUNNING},
    ]
    assert capsys.readouterr().out == ""
    assert ask.asked == [tmp_path]


def test_a_job_that_ends_in_this_moment_is_told_without_its_rounds(ask, tmp_path):
    assert ask(tmp_path, ending="RUNNING")["jobs"] == [
        {"job": "ending", "name": "unit", "status": "RUNNING", "run": None}
    ]


def test_only_the_last_jobs_are_told(ask, tmp_path):
    told = ask(tmp_path, **{f"job{n:02d}": "FINISHED:COMPLETED" for n in range(25)})
    assert [job["job"] for job in told["jobs"]] == [f"job{n}" for n in range(15, 25)]


def test_of_a_run_directory_its_own_jobs_are_told_and_its_own_kit_is_used(
    ask, tmp_path, make_contract, make_federation
):
    begin(make_federation("alder"), tmp_path / "run", tmp_path / "kit", make_contract({"alder": ["radiology"]}))
    append_line(tmp_path / "run" / JOBS_FILE, {"job": "mine"})
    told = ask(tmp_path / "run", mine="FINISHED:COMPLETED", anothers="RUNNING")
    assert [job["job"] for job in told["jobs"]] == ["mine"]
    assert ask.asked == [tmp_path / "kit"]


def test_a_run_without_a_job_yet_has_none(ask, tmp_path, make_contract, make_federation):
    begin(make_federation("alder"), tmp_path / "run", tmp_path / "kit", make_contract({"alder": ["radiology"]}))
    assert ask(tmp_path / "run", anothers="RUNNING")["jobs"] == []


def test_what_is_neither_a_run_nor_a_kit_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=str(tmp_path)):
        federation_status(tmp_path)


def test_the_tables_say_the_same_for_people(ask, tmp_path):
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as said:
        for table in status_tables(ask(tmp_path, old="FINISHED:COMPLETED", new="RUNNING")):
            console.print(table)
    text = said.get()
    for part in ("server started", "4 s ago", "2 of 5", "round 2 of 5: 2 updates averaged (3.5 s); cedar: deadline"):
        assert part in text
