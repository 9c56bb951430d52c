"""Our controller on FLARE's own task server, with sites that are threads: no processes, no network."""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from nvflare.apis.client import Client
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.impl.wf_comm_server import WFCommServer
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants

from clinifed.aggregators.flare import FederatedRounds
from clinifed.aggregators.run_state import SERVER_FOLDER, RunState
from clinifed.aggregators.specialty import SpecialtyAggregator
from clinifed.aggregators.tracking import EVENTS_FILE
from clinifed.contract import Contract
from clinifed.executors.filters import to_shareable
from clinifed.files import read_lines
from clinifed.messages import TASK_HANDSHAKE, Update, allowed_names
from clinifed.privacy.claims import make_claim

RUN, HEAD = "run", "a" * 64

Answer = Shareable | None  # None: the site does not answer this task
Site = Callable[[str, str, Shareable, Contract], Answer]  # (site, task, what came, contract)


def hello(contract: Contract, **other: object) -> Shareable:
    """The handshake of an honest site, or of one that says something else."""
    reply = make_reply(ReturnCode.OK)
    reply[TASK_HANDSHAKE] = {
        "contract_sha256": contract.sha256(),
        "clinifed_version": contract.clinifed_version,
        "base_model_sha256": contract.base_model.sha256,
        **other,
    }
    return reply


def update(site: str, number: int, contract: Contract, value: float = 1.0, **meta: object) -> Update:
    """A good update whose parameters are all ``value``."""
    names = sorted(allowed_names(contract.shapes, contract.sites[site].specialties))
    params = {name: np.full(contract.shapes[name], value, np.float32) for name in names}
    claim = make_claim(contract, site, "job", 10**9, contract.promise.delta, HEAD)
    known = {"job": RUN, "nonce": f"{sorted(contract.sites).index(site):016x}{number:016x}"}
    return Update(site, number, params, {**known, "claim": claim, "ledger_head": HEAD, **meta})


def honest(site: str, task: str, came: Shareable, contract: Contract) -> Answer:
    """What a site does: it agrees, and adds one to every parameter."""
    if task == TASK_HANDSHAKE:
        return hello(contract)
    if task == AppConstants.TASK_TRAIN:
        return to_shareable(update(site, came.get_header(AppConstants.CURRENT_ROUND), contract))
    return make_reply(ReturnCode.OK)


def trains(answer: Callable[[str, int, Contract], Answer]) -> Site:
    """An honest site but for its training: (site, round, contract) → what it answers."""

    def behave(site: str, task: str, came: Shareable, contract: Contract) -> Answer:
        if task != AppConstants.TASK_TRAIN:
            return honest(site, task, came, contract)
        return answer(site, came.get_header(AppConstants.CURRENT_ROUND), contract)

    return behave


class Engine:
    """What of FLARE's server engine our controller and FLARE's task server use."""

    def __init__(self, root: Path, job: str, sites: Mapping[str, Site]) -> None:
        self.clients = [Client(name, "token") for name in sites]
        self.workspace = SimpleNamespace(
            get_root_dir=lambda: str(root), get_run_dir=lambda job_id: str(root / str(job_id))
        )
        self.handlers: list[Any] = []
        self.panics: list[str] = []
        self.figures: list[Any] = []
        self.abort = Signal()
        self.manager = FLContextManager(self, "server", job)
        (root / job).mkdir(parents=True, exist_ok=True)

    def new_context(self) -> FLContext:
        return self.manager.new_context()

    def get_clients(self) -> list[Client]:
        return self.clients

    def get_workspace(self) -> Any:
        return self.workspace

    def fire_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.FATAL_SYSTEM_ERROR:  # FLARE then ends the job
            self.panics.append(str(fl_ctx.get_prop(FLContextKey.EVENT_DATA)))
            self.abort.trigger(True)
        if event_type == "analytix_log_stats":
            self.figures.append(fl_ctx.get_prop(FLContextKey.EVENT_DATA))
        for handler in self.handlers:
            handler.handle_event(event_type, fl_ctx)


class Served:
    """One FLARE job of a run, done to its end when made."""

    def __init__(
        self,
        root: Path,
        contract: Contract,
        sites: Mapping[str, Site],
        until: int | None = None,
        job: str = "job-1",
        aggregator: SpecialtyAggregator | None = None,
        meanwhile: Callable[["Served"], None] | None = None,
    ) -> None:
        self.root, self.contract, self.trained = root, contract, []  # type: ignore[var-annotated]
        self.engine = Engine(root, job, sites)
        text = contract.text()
        self.controller = FederatedRounds(text, RUN, until or contract.rounds, aggregator or SpecialtyAggregator(text))
        self.server = WFCommServer()
        self.controller.set_communicator(self.server)
        self.server._task_check_period = 0.02
        self.controller._task_check_period = 0.02
        self.engine.handlers += [self.controller]
        self._over = threading.Event()
        threads = [threading.Thread(target=self._live, args=site, daemon=True) for site in sites.items()]
        if meanwhile is not None:
            threads.append(threading.Thread(target=meanwhile, args=(self,), daemon=True))
        context = self.engine.new_context()
        self.controller.initialize(context)
        self.server.initialize_run(context)
        started = time.monotonic()
        for thread in threads:
            thread.start()
        try:
            self.controller.control_flow(self.engine.abort, context)
            self.seconds = time.monotonic() - started
        finally:
            self._over.set()
            for thread in threads:
                thread.join(10)
            self.server._all_done = True
            self.server._task_monitor.join(10)

    def _live(self, name: str, behave: Site) -> None:
        client = next(c for c in self.engine.clients if c.name == name)
        ignored: set[str] = set()
        while not self._over.is_set():
            context = self.engine.new_context()
            task, task_id, came = self.server.process_task_request(client, context)
            if not task or task_id in ignored:  # FLARE sends a task again until it is answered
                time.sleep(0.01)
                continue
            if task == AppConstants.TASK_TRAIN:
                self.trained.append((name, came.get_header(AppConstants.CURRENT_ROUND)))
            answer = behave(name, task, came, self.contract)
            if answer is None:
                ignored.add(task_id)
                continue
            self.server.process_submission(client, task, task_id, answer, context)

    @property
    def state(self) -> RunState:
        """What the job left on the server's disk."""
        return RunState(self.root / SERVER_FOLDER / RUN, RUN, self.contract)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind, of all jobs of the run."""
        return [e for e in read_lines(self.root / SERVER_FOLDER / RUN / EVENTS_FILE) if e["event"] == kind]
