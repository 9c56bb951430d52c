"""A run as a chain of FLARE jobs, submitted one after the other and followed from the coordinator's side.

FLARE fixes a job's sites when it is dispatched, so a site that comes late or comes back takes part in the next one.
Each job goes on where the run's state on the server ends; the coordinator may go away, come back, and submit a job too
many without a round being done twice.
"""

import contextlib
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

from nvflare.apis.job_def import JobMetaKey
from nvflare.fuel.flare_api.api_spec import (
    InternalError,
    JobNotDone,
    JobNotFound,
    NoConnection,
    NoReply,
    SessionClosed,
    TargetType,
)

from clinifed.aggregators.run_state import SERVER_FOLDER, STATE_FILE, RunState
from clinifed.contract import Contract
from clinifed.errors import ClinifedError, FederationError
from clinifed.files import append_line, read_lines
from clinifed.jobs.follow import tell_round
from clinifed.jobs.kit_processes import connected_sites, coordinator_session
from clinifed.jobs.recipe import FederationRecipe

__all__ = ["JOBS_FILE", "RunChain"]

JOBS_FILE = "jobs.jsonl"  # the FLARE jobs of the run, in order
_POLL_S = 1.0
_FRUITLESS = 3  # jobs in a row without a round, and we give up
_ENDED = "FINISHED"  # how every status of a job that is over begins

_TRANSIENT = (NoConnection, NoReply, SessionClosed, InternalError, JobNotDone)  # asked again while patience lasts

_T = TypeVar("_T")


class RunChain:
    """One run, from the coordinator's side; use as a context manager.

    Args:
        run: the run's name.
        folder: what was submitted and fetched; made if absent.
        admin: the coordinator's startup kit.
        rounds_per_job: of each job of the chain.
        patience_s: so long a server that does not answer, or sites that are not there, are waited for.

    Guarantees:
        - Success is judged by the run's own state, never by FLARE's word on a job.
        - A server that is gone is waited for; the run goes on where its state says.
    """

    def __init__(
        self,
        contract: Contract,
        run: str,
        folder: Path,
        admin: Path,
        rounds_per_job: int,
        progress: Callable[[str], None],
        patience_s: float = 600.0,
    ) -> None:
        self.contract, self.run, self.folder, self.admin = contract, run, folder, admin
        self.rounds_per_job, self.progress, self.patience_s = rounds_per_job, progress, patience_s
        self.state: RunState | None = None
        self._known = 0  # rounds done, as far as we heard
        self._told = 0  # rounds told of
        self._stack = contextlib.ExitStack()
        self._session: Any = None
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def finish(self) -> RunState:
        """Submit job after job until the run is complete; returns its state.

        Raises:
            FederationError: jobs end without a round, the server or the sites stay away, or no round ever counted.
        """
        fruitless = 0
        submitted = read_lines(self.folder / JOBS_FILE)
        job = str(submitted[-1]["job"]) if submitted else None  # an earlier coordinator's, running or not
        while True:
            before = self._known
            job = job or self._submit()
            status = self._watch(job)
            self._fetch(job)
            if self.state is not None and self.state.complete:
                if not self.state.counted:
                    raise FederationError(f"run {self.run}: no round had enough good updates; the model is unchanged")
                return self.state
            fruitless = fruitless + 1 if self._known == before else 0
            self.progress(f"job {job} ended ({status}) after round {self._known} of {self.contract.rounds}")
            if fruitless == _FRUITLESS:
                raise FederationError(
                    f"run {self.run}: {fruitless} jobs in a row ended without a round, the last with {status}; the "
                    "server's log and its events.jsonl say why"
                )
            job = None

    def ask(self, question: Callable[[Any], _T]) -> _T:
        """The server's answer, waited for as long as patience lasts.

        Raises:
            FederationError: there is none.
        """
        deadline = time.monotonic() + self.patience_s
        while True:
            try:
                if self._session is None:
                    left = max(5.0, deadline - time.monotonic())
                    self._session = self._stack.enter_context(coordinator_session(self.admin, left))
                with contextlib.redirect_stdout(io.StringIO()):  # FLARE prints what it is asked
                    return question(self._session)
            except (*_TRANSIENT, OSError) as error:
                with contextlib.suppress(Exception):  # of a session that is broken anyway
                    self._stack.close()
                self._session = None
                if time.monotonic() > deadline:
                    raise FederationError(
                        f"the server did not answer for {self.patience_s:g} s ({type(error).__name__}); the run's "
                        "state lies there, and the run can be resumed"
                    ) from None
                time.sleep(_POLL_S)
            except (JobNotFound, ClinifedError):
                raise
            except Exception as error:  # FLARE's own word: no right to it, no valid job; waiting does not help
                raise FederationError(f"run {self.run}: the server refuses: {type(error).__name__}: {error}") from error

    def _submit(self) -> str:
        """Submit the next job once enough sites are connected."""
        self._wait_for_sites()
        until = min(self._known + self.rounds_per_job, self.contract.rounds)
        number = len(read_lines(self.folder / JOBS_FILE)) + 1
        place = self.folder / "jobs" / f"{number:03d}-{time.time_ns()}"
        FederationRecipe(self.contract, self.run, until).write(place)
        job = self.ask(lambda session: session.submit_job(str(place / self.contract.federation)))
        append_line(self.folder / JOBS_FILE, {"job": job, "until": until, "time": round(time.time(), 3)}, durable=True)
        self.progress(f"job {job}: rounds {self._known + 1} to {until} of {self.contract.rounds}")
        return str(job)

    def _wait_for_sites(self) -> None:
        deadline, told = time.monotonic() + self.patience_s, False
        while len(there := set(self.ask(connected_sites)) & set(self.contract.sites)) < self.contract.min_clients:
            if time.monotonic() > deadline:
                raise FederationError(
                    f"{len(there)} sites are connected ({', '.join(sorted(there)) or 'none'}), min_clients is "
                    f"{self.contract.min_clients}; not there: {', '.join(sorted(set(self.contract.sites) - there))}"
                )
            if not told:
                self.progress(f"waiting for sites: {len(there)} of at least {self.contract.min_clients}")
                told = True
            time.sleep(_POLL_S)

    def _status(self, job: str) -> str:
        def question(session: Any) -> str:
            try:
                return str(session.get_job_meta(job).get(JobMetaKey.STATUS.value))
            except JobNotFound:
                return f"{_ENDED}:UNKNOWN"

        return self.ask(question)

    def _watch(self, job: str) -> str:
        """Follow ``job`` to its end, telling of each round; one that makes no progress at all is aborted."""
        settings = self.contract.aggregation
        limit_s = settings.start_timeout_s + 2 * settings.round_timeout_s + self.patience_s
        known, since = self._known, time.monotonic()
        while not (status := self._status(job)).startswith(_ENDED):
            with contextlib.suppress(Exception):  # a job that does not run yet, or no more, has no stats
                self._hear(self.ask(lambda session: session.show_stats(job, TargetType.SERVER)))
            if self._known > known:
                known, since = self._known, time.monotonic()
            if time.monotonic() - since > limit_s:
                self.progress(f"job {job}: nothing was heard for {limit_s:.0f} s; aborted")
                self.ask(lambda session: session.abort_job(job))
                since = time.monotonic()
            time.sleep(_POLL_S)
        return status

    def _hear(self, stats: dict[str, Any]) -> None:
        """Tell of what the job's controller said of itself."""
        said = stats.get("server", {}).get(SERVER_FOLDER)
        if isinstance(said, dict) and said.get("run") == self.run:
            self._tell(said["last"], int(said["next_round"]))

    def _tell(self, rounds: list[dict[str, Any]], known: int) -> None:
        for entry in rounds:
            if entry["round"] >= self._told:
                self.progress(tell_round(entry, self.contract.rounds))
                self._told = entry["round"] + 1
        self._known = max(self._known, known)

    def _fetch(self, job: str) -> None:
        """Bring the run's state home, as the job left it; a job that was killed may have left none."""
        try:
            place = Path(self.ask(lambda session: session.download_job_result(job, str(self.folder / "results"))))
        except JobNotFound:
            return
        for path in sorted(place.glob(f"**/{SERVER_FOLDER}/{STATE_FILE}")):
            self.state = RunState(path.parent, self.run, self.contract)
            self._tell(self.state.rounds, self.state.next_round)
