"""A run as a chain of jobs: it ends where its state says, whatever becomes of jobs, server, sites or coordinator."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from nvflare.fuel.flare_api.api_spec import JobNotFound, NoConnection

from clinifed.aggregators.run_state import SERVER_FOLDER, RunState
from clinifed.contract import Contract
from clinifed.errors import FederationError
from clinifed.files import read_lines
from clinifed.jobs import chain
from clinifed.jobs.chain import JOBS_FILE, RunChain

RUN = "run"
ROUNDS = 5


class Power(BaseException):
    """The coordinator's process ends here."""


class Server:
    """Stands for FLARE's server and its session: takes jobs, and does their rounds on a real state of the run.

    Args:
        fates: of the jobs in the order in which they come: fine, dies, vanishes, stuck, lossy (rounds do not count).
    """

    def __init__(self, folder: Path, contract: Contract, *fates: str) -> None:
        self.folder, self.contract, self.fates = folder, contract, list(fates)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.sites = list(contract.sites)
        self.away = 0  # so many questions get no answer
        self.lost_answers = 0  # so many submissions are taken, and the answer is lost
        self.sessions = 0
        self.aborted: list[str] = []
        self.word = ""  # of every job that is over, whatever became of it
        self.meanwhile: Callable[[], None] = lambda: None

    @property
    def state(self) -> RunState:
        return RunState(self.folder / RUN, RUN, self.contract)

    def _answer(self) -> None:
        if self.away:
            self.away -= 1
            raise NoConnection("gone")
        self.meanwhile()
        for job in self.jobs.values():
            if job["status"] == "RUNNING" and job["fate"] in ("fine", "lossy"):
                self._work(job)

    def _work(self, job: dict[str, Any]) -> None:
        """A round, as a job of its own would do it: from the state on the disk."""
        state = self.state
        if state.next_round < min(job["until"], self.contract.rounds):
            number, counted = state.next_round, job["fate"] == "fine"
            delta = {n: v + np.float32(counted) for n, v in state.delta.items()}
            record = {"round": number, "counted": counted, "accepted": ["alder"], "missing": {}, "seconds": 0.1}
            state.commit(number, delta, {}, {**record, "nonces": {}})
            job["did"].append(number)
        else:
            job["status"] = "FINISHED:COMPLETED"

    def get_connected_client_list(self) -> list[Any]:
        self._answer()
        return [SimpleNamespace(name=name, last_connect_time=time.time()) for name in self.sites]

    def submit_job(self, place: str) -> str:
        self._answer()
        (config,) = Path(place).glob("app*/config/config_fed_server.json")
        settings = json.loads(config.read_text())["workflows"][0]["args"]
        assert (settings["run"], settings["contract"]) == (RUN, self.contract.text())
        name, fate = f"job-{len(self.jobs)}", self.fates.pop(0) if self.fates else "fine"
        status = "FINISHED:EXECUTION_EXCEPTION" if fate == "dies" else "RUNNING"
        self.jobs[name] = {"until": settings["until"], "fate": fate, "status": status, "did": []}
        if self.lost_answers:
            self.lost_answers -= 1
            raise NoConnection("the answer was lost")
        return name

    def get_job_meta(self, job: str) -> dict[str, str]:
        self._answer()
        if self.jobs[job]["fate"] == "vanishes":
            raise JobNotFound(job)
        status = self.jobs[job]["status"]
        return {"status": self.word or status if status.startswith("FINISHED") else status}

    def show_stats(self, job: str, target: str) -> dict[str, Any]:
        state = self.state
        said = {"run": RUN, "next_round": state.next_round, "rounds": ROUNDS, "last": state.rounds[-20:]}
        sys.stdout.write("what FLARE prints")
        return {"server": {SERVER_FOLDER: said}}

    def abort_job(self, job: str) -> None:
        self.aborted.append(job)
        self.jobs[job]["status"] = "FINISHED:ABORTED"

    def download_job_result(self, job: str, folder: str) -> str:
        self._answer()
        if self.jobs[job]["fate"] in ("vanishes", "dies"):
            raise JobNotFound(job)
        place = Path(folder) / job
        self.state.publish(place / "workspace" / SERVER_FOLDER)
        return str(place)


@pytest.fixture
def contract(make_contract: Callable[..., Contract]) -> Contract:
    made = make_contract({name: ["radiology"] for name in ("alder", "birch", "cedar")})
    settings = made.aggregation.model_copy(update={"round_timeout_s": 5, "start_timeout_s": 5})
    return made.model_copy(update={"rounds": ROUNDS, "min_clients": 2, "aggregation": settings})


@pytest.fixture
def follow(tmp_path: Path, contract: Contract, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Follow the run on ``server`` with a coordinator of its own; returns its state and what was told."""
    monkeypatch.setattr(chain, "_POLL_S", 0.001)

    def run(server: Server, per_job: int = 2, patience_s: float = 5.0) -> tuple[RunState, list[str]]:
        @contextmanager
        def session(admin: Path, timeout_s: float) -> Iterator[Server]:
            server.sessions += 1
            yield server

        monkeypatch.setattr(chain, "coordinator_session", session)
        said: list[str] = []
        with RunChain(contract, RUN, tmp_path / "out", tmp_path / "kit", per_job, said.append, patience_s) as one:
            return one.finish(), said

    return run


@pytest.fixture
def serve(tmp_path: Path, contract: Contract) -> Callable[..., Server]:
    return lambda *fates: Server(tmp_path / "server", contract, *fates)


def done(server: Server) -> list[int]:
    """The rounds, in the order in which jobs did them."""
    return [number for job in server.jobs.values() for number in job["did"]]


def test_a_run_is_as_many_jobs_as_it_takes_each_from_where_the_state_ends(follow, serve, contract, tmp_path):
    server = serve()
    state, said = follow(server)
    assert [(j["until"], j["did"]) for j in server.jobs.values()] == [(2, [0, 1]), (4, [2, 3]), (5, [4])]
    assert state.complete
    assert {float(v) for value in state.delta.values() for v in value.ravel()} == {5.0}
    assert [e["until"] for e in read_lines(tmp_path / "out" / JOBS_FILE)] == [2, 4, 5]
    assert [line.split(":")[0] for line in said if line.startswith("round")] == [f"round {n} of 5" for n in range(1, 6)]
    assert state.folder.is_relative_to(tmp_path / "out"), "the state is at home, not on the server"


def test_what_flare_prints_is_not_ours(follow, serve, capsys):
    follow(serve())
    assert capsys.readouterr().out == ""


def test_success_is_judged_by_the_state_and_never_by_flares_word(follow, serve, tmp_path):
    server = serve()

    server.word = "FINISHED:ABNORMAL"
    state, said = follow(server)
    assert state.complete
    assert any("FINISHED:ABNORMAL" in line for line in said)
    server = serve("dies", "dies", "dies")
    server.folder, server.word = server.folder / "another", "FINISHED:COMPLETED"
    (tmp_path / "out" / JOBS_FILE).unlink()
    with pytest.raises(FederationError, match="without a round, the last with FINISHED:COMPLETED"):
        follow(server)


def test_a_job_that_vanished_is_followed_by_another(follow, serve):
    server = serve("fine", "vanishes")
    state, said = follow(server)
    assert state.complete
    assert done(server) == list(range(ROUNDS))
    assert any("FINISHED:UNKNOWN" in line for line in said)


def test_jobs_that_end_without_a_round_are_an_error_after_three(follow, serve):
    server = serve("fine", "dies", "dies", "dies")
    with pytest.raises(FederationError, match=r"3 jobs in a row ended without a round.*EXECUTION_EXCEPTION"):
        follow(server)
    assert len(server.jobs) == 4
    assert server.state.next_round == 2


def test_two_fruitless_jobs_in_a_row_are_forgiven_each_time(follow, serve):
    server = serve("dies", "dies", "fine", "dies", "dies", "fine")
    assert follow(server)[0].complete
    assert done(server) == list(range(ROUNDS))


def test_a_run_that_never_counted_is_an_error_and_says_so(follow, serve):
    server = serve("lossy", "lossy", "lossy")
    with pytest.raises(FederationError, match="no round had enough good updates; the model is unchanged"):
        follow(server)
    assert server.state.complete


@pytest.mark.parametrize("moment", range(0, 16, 2))
def test_a_coordinator_that_died_goes_on_where_the_run_stands(follow, serve, moment, tmp_path):
    server, asked = serve(), 0

    def dies() -> None:
        nonlocal asked
        asked += 1
        if asked == moment + 1:
            raise Power

    server.meanwhile = dies
    with pytest.raises(Power):
        follow(server)
    state, said = follow(server)
    assert state.complete
    assert done(server) == list(range(ROUNDS))
    assert [e["round"] for e in state.rounds] == list(range(ROUNDS))
    assert len([line for line in said if line.startswith("round")]) == ROUNDS, "a new coordinator hears of all rounds"


def test_a_job_that_still_runs_is_followed_and_none_is_submitted_beside_it(follow, serve):
    server = serve("stuck")

    def dies() -> None:
        if server.jobs:
            raise Power

    server.meanwhile = dies
    with pytest.raises(Power):
        follow(server)
    (job,) = server.jobs.values()
    beside, asked = [], 0

    def recovers() -> None:
        nonlocal asked
        asked += 1
        job["fate"] = "fine" if asked > 5 else "stuck"
        beside.append(len(server.jobs) > 1 and not job["status"].startswith("FINISHED"))

    server.meanwhile = recovers
    follow(server, per_job=9)
    assert not any(beside)
    assert [j["did"] for j in server.jobs.values()] == [[0, 1], [2, 3, 4]]


def test_a_run_that_is_complete_does_no_round_and_needs_no_job_again(follow, serve):
    server = serve()
    first, _ = follow(server)
    jobs = set(server.jobs)
    again, _ = follow(server)
    assert set(server.jobs) == jobs
    assert done(server) == list(range(ROUNDS))
    assert (again.next_round, again.rounds) == (first.next_round, first.rounds)


def test_one_job_too_many_does_no_round_twice(follow, serve):
    """The answer to a submission is lost, so it is submitted again: both jobs run."""
    server = serve()
    server.lost_answers = 1
    state, _ = follow(server)
    assert state.complete
    assert sorted(done(server)) == list(range(ROUNDS))
    assert len(server.jobs) >= 4


@pytest.mark.parametrize("moment", range(0, 16, 2))
def test_a_server_that_is_gone_for_a_while_is_waited_for(follow, serve, moment):
    server, asked = serve(), 0

    def breaks() -> None:
        nonlocal asked
        asked += 1
        if asked == moment + 1:
            server.away = 7
            raise NoConnection("gone")

    server.meanwhile = breaks
    state, _ = follow(server)
    assert state.complete
    assert done(server) == list(range(ROUNDS))
    assert server.sessions >= 8, "a broken session is not asked again"


def test_a_server_that_stays_away_is_an_error_once_patience_ends(follow, serve):
    server = serve()
    server.away = 10**9
    started = time.monotonic()
    with pytest.raises(FederationError, match=r"did not answer for 0\.3 s \(NoConnection\).*can be resumed"):
        follow(server, patience_s=0.3)
    assert 0.3 <= time.monotonic() - started < 3


def test_no_job_is_submitted_before_min_clients_are_there(follow, serve):
    server, polls = serve(), 0
    server.sites = ["alder", "stranger"]

    def comes() -> None:
        nonlocal polls
        polls += 1
        assert len(server.sites) == 3 or not server.jobs
        if polls == 5:
            server.sites = ["alder", "birch", "stranger"]

    server.meanwhile = comes
    state, said = follow(server)
    assert state.complete
    assert said[0] == "waiting for sites: 1 of at least 2"
    assert len([line for line in said if line.startswith("waiting")]) == 1


def test_sites_that_stay_away_are_named(follow, serve):
    server = serve()
    server.sites = ["alder", "stranger"]
    with pytest.raises(FederationError) as caught:
        follow(server, patience_s=0.1)
    assert str(caught.value) == "1 sites are connected (alder), min_clients is 2; not there: birch, cedar"
    assert server.jobs == {}


def test_a_job_that_makes_no_progress_is_aborted_and_followed_by_another(follow, serve, contract, monkeypatch):
    server = serve("fine", "stuck")
    clock = [0.0]

    def passes() -> float:
        clock[0] += 0.5
        return clock[0]

    monkeypatch.setattr(chain, "time", SimpleNamespace(monotonic=passes, sleep=lambda s: None, **vars_of_time()))
    state, said = follow(server, patience_s=1000.0)
    limit = 5 + 2 * 5 + 1000
    assert server.aborted == ["job-1"]
    assert f"job job-1: nothing was heard for {limit} s; aborted" in said
    assert state.complete
    assert clock[0] > limit


def vars_of_time() -> dict[str, Any]:
    return {"time": time.time, "time_ns": time.time_ns}


def test_a_published_state_of_another_contract_is_refused(follow, serve, contract, tmp_path):
    other = contract.model_copy(update={"federation": "other"})
    server = serve()
    server.download_job_result = lambda job, folder: foreign(Path(folder) / job, other)  # type: ignore[method-assign]
    with pytest.raises(FederationError, match="a run keeps its contract to its end"):
        follow(server)


def foreign(place: Path, other: Contract) -> str:
    state = RunState(place / "workspace" / SERVER_FOLDER, RUN, other)
    state.commit(0, state.delta, {}, {"round": 0, "counted": True, "nonces": {}})
    return str(place)
