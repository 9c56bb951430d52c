"""The FLARE controller: rounds with a quorum and a deadline, whose state outlives the job.

The server holds the shared parameters as the difference from the zero-shot start, so it needs no model, no tower and
no prompts; it starts at zero.
"""

import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task, TaskCompletionStatus
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.workflows.model_controller import ModelController
from nvflare.widgets.info_collector import InfoCollector

from clinifed.aggregators.handshake import disagreements
from clinifed.aggregators.run_state import SERVER_FOLDER, RunState
from clinifed.aggregators.specialty import SpecialtyAggregator
from clinifed.aggregators.tracking import EVENTS_FILE, EventLog, track
from clinifed.contract import Contract
from clinifed.errors import ClinifedError, UpdateError
from clinifed.messages import TASK_FINISH, TASK_HANDSHAKE, update_norm

__all__ = ["FederatedRounds"]

_FINISH_S = 60  # for sites to hear that the run is over; one that does not frees its reservation when it expires
_TOLD_ROUNDS = 20  # of the last ones, to whoever asks for the job's stats


class FederatedRounds(ModelController):
    """Rounds with a deadline and a quorum of good updates; each is durable before the next begins.

    Args:
        contract: the federation's contract, :meth:`clinifed.contract.Contract.text`.
        run: the run's name. A job goes on where the run's state on this server ends.
        until: this job does the rounds before this one; a run may be a chain of jobs.
        aggregator: the :class:`SpecialtyAggregator` of the same contract.

    Guarantees:
        - A round with fewer good updates than the quorum changes nothing.
        - A round ends at its deadline, whoever is missing.
        - No round is applied twice, and a killed server loses at most the round it was in.
        - A site that holds another version, base model or contract takes no part.
    """

    def __init__(self, contract: str, run: str, until: int, aggregator: SpecialtyAggregator) -> None:
        # A site that fails costs the round that site, not the job: we count good updates ourselves. No persistor:
        # the run's state is the one authority, and it must outlive the job.
        super().__init__(persistor_id="", ignore_result_error=True, task_check_period=0.1)
        self.contract = contract
        self._run = run  # under this name FLARE's job exporter finds it; `run` is the method below
        self.until = until
        self.aggregator = aggregator
        self._agreed = Contract.read(contract)
        self._state: RunState | None = None
        self._told: EventLog | None = None
        self._outside: dict[str, str] = {}  # site → why it takes no part in this job
        self._agreeing: set[str] = set()

    def run(self) -> None:
        """The rounds of this job, from where the run's state ends."""
        root = Path(self.engine.get_workspace().get_root_dir())
        try:
            self._state = state = RunState(root / SERVER_FOLDER / self._run, self._run, self._agreed)
        except ClinifedError as error:
            self.panic(str(error))
            return
        self._told = self.aggregator.told = EventLog(state.folder / EVENTS_FILE)
        self.aggregator.job, self.aggregator.nonces = self._run, state.nonces()
        self.aggregator.memory = state.memory
        self._told("job_started", job=self.fl_ctx.get_job_id(), next_round=state.next_round, until=self.until)
        # What a job leaves in its run folder is what FLARE brings to the coordinator, finished or not.
        published = Path(self.get_run_dir()) / SERVER_FOLDER
        try:
            if not state.complete:
                self._rounds(state)
            if state.complete and not self.abort_signal.triggered:
                self.cancel_all_tasks()
                self._wait(self._send(TASK_FINISH, _FINISH_S, _ignore), len(self._agreed.sites), ())
                self._told("run_finished", counted=state.counted)
                if not state.counted:
                    self.panic("no round had enough good updates; the model is unchanged")
        finally:
            state.publish(published)
            self._told("job_ended", job=self.fl_ctx.get_job_id(), next_round=state.next_round)

    def _rounds(self, state: RunState) -> None:
        contract = self._agreed
        handshake = self._send(TASK_HANDSHAKE, contract.aggregation.start_timeout_s, self._hear)
        self._wait(handshake, contract.min_clients, self._agreeing)
        if len(self._agreeing) < contract.min_clients:
            if not self.abort_signal.triggered:
                self.panic(
                    f"{len(self._agreeing)} sites are ready, min_clients is {contract.min_clients}; not with us: "
                    f"{ {s: self._outside.get(s, 'away') for s in contract.sites if s not in self._agreeing} }"
                )
            return
        # A site that is not ready yet may still answer, and then takes part from the next round on.
        while state.next_round < min(self.until, contract.rounds) and not self.abort_signal.triggered:
            sites = self._wait_for_quorum()
            if self.abort_signal.triggered:
                return
            if len(sites) < contract.aggregation.quorum:
                self.panic(
                    f"round {state.next_round}: only {sites} are connected, the quorum is "
                    f"{contract.aggregation.quorum}; the run goes on with its next job"
                )
                return
            self._round(state, sites)

    def _connected(self) -> list[str]:
        """The agreeing sites that FLARE does not hold for dead."""
        return sorted(s for s in self._agreeing if not self.get_client_disconnect_time(s))

    def _wait_for_quorum(self) -> list[str]:
        """Sites for the next round: no round is begun, and nobody's budget spent, that cannot count."""
        deadline = time.monotonic() + self._agreed.aggregation.round_timeout_s
        while len(sites := self._connected()) < self._agreed.aggregation.quorum:
            if self.abort_signal.triggered or time.monotonic() > deadline:
                break
            time.sleep(self._task_check_period)
        return sites

    def _round(self, state: RunState, sites: list[str]) -> None:
        """One round: ask, wait, check, average, commit."""
        assert self._told is not None
        settings, number, started = self._agreed.aggregation, state.next_round, time.time()
        self.aggregator.reset_stats()
        self.aggregator.round = number
        self._told("round_opened", round=number, sites=sites)
        model = FLModel(
            params_type=ParamsType.FULL,
            params=dict(state.delta),
            current_round=number,
            total_rounds=self._agreed.rounds,
        )
        self.set_fl_context(model)
        # What `broadcast_model` does, but that we keep the task: another one may stand beside it.
        task = self._prepare_task(
            data=model,
            task_name=AppConstants.TASK_TRAIN,
            timeout=settings.round_timeout_s,
            callback=self.aggregator.accept_model,
        )
        self.broadcast(task, self.fl_ctx, targets=sites, min_responses=0)
        self._wait(task, settings.quorum, self.aggregator.accepted)
        if task.completion_status is None:
            self.cancel_task(task, completion_status=TaskCompletionStatus.OK)
        self.aggregator.close()
        if self.abort_signal.triggered:
            return
        good = sorted(self.aggregator.accepted)
        counted = len(good) >= settings.quorum
        delta, memory = state.delta, state.memory
        if counted:
            try:
                change = self.aggregator.aggregate_model().params
                delta = {name: value + change[name] for name, value in state.delta.items()}
                memory = self.aggregator.memory
            except UpdateError as error:  # each update was good; what the server's optimiser made of them is not
                counted = False
                self._told("not_applied", round=number, reason=error.reason)
                self.error(f"round {number}: not applied ({error.reason}): {error}")
        else:
            self.warning(f"round {number}: {len(good)} good updates, the quorum is {settings.quorum}; model unchanged")
        missing = {s: self.aggregator.refused.get(s, "deadline") for s in sites if s not in good}
        missing |= {s: self._outside.get(s, "away") for s in self._agreed.sites if s not in sites}
        metas = {s: self.aggregator.accepted[s].meta for s in good}
        seconds = round(time.time() - started, 3)
        state.commit(
            number,
            delta,
            memory,
            {
                "round": number,
                "counted": counted,
                "accepted": good,
                "missing": missing,
                "job": self._run,
                "nonces": {s: meta["nonce"] for s, meta in metas.items()},
                "claims": {s: meta["claim"] for s, meta in metas.items()},
                "declared": {s: meta["declared"] for s, meta in metas.items() if "declared" in meta},
                "seconds": seconds,
            },
        )
        self._told("round_closed", round=number, counted=counted, accepted=good, missing=missing, seconds=seconds)
        figures = {"accepted": len(good), "seconds": seconds, "global_norm": update_norm(delta)}
        for site, meta in metas.items():  # of a site's own figures, those that its policy declares
            loss = meta.get("declared", {}).get("train_loss")
            figures |= {} if loss is None else {f"train_loss/{site}": loss}
        track(self, figures, number, self.fl_ctx)

    def _send(self, name: str, timeout_s: int, heard: Callable[[ClientTask, FLContext], None]) -> Task:
        """Send a task of ours to every site of the contract that is in this job."""
        present = {client.name for client in self.engine.get_clients()}
        task = Task(name, data=Shareable(), timeout=timeout_s, result_received_cb=heard)
        if targets := sorted(present & set(self._agreed.sites)):
            self.broadcast(task, self.fl_ctx, targets=targets, min_responses=0)
        else:  # to FLARE, nobody would mean everybody
            task.completion_status = TaskCompletionStatus.OK
        return task

    def _wait(self, task: Task, needed: int, good: Collection[str]) -> None:
        """Wait for the end of ``task``: all have answered, its deadline, or ``grace_s`` after ``good`` were enough.

        FLARE counts error results as responses; we stop waiting early on good ones only. The task then still stands.
        """
        grace_s, enough = self._agreed.aggregation.grace_s, 0.0
        while task.completion_status is None and not self.abort_signal.triggered:
            if not enough and len(good) >= needed:
                enough = time.monotonic()
            if enough and grace_s is not None and time.monotonic() - enough >= grace_s:
                return
            time.sleep(self._task_check_period)

    def _hear(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        """One site's answer to the handshake."""
        assert self._told is not None
        site, result = client_task.client.name, client_task.result
        code = result.get_return_code()
        if code != ReturnCode.OK:
            reason, why = _failure(code), ""
        else:
            reason, why = disagreements(result.get(TASK_HANDSHAKE), self._agreed)
        if reason:
            self._outside[site] = reason
            self._told("site_refused", site=site, reason=reason, why=why)
            self.warning(f"{site} takes no part in this job ({reason}) {why}")
        else:
            self._agreeing.add(site)
            self._outside.pop(site, None)
            self._told("site_ready", site=site)
        client_task.result = None

    def _accept_train_result(
        self, client_name: str, result: Shareable, fl_ctx: FLContext, is_unknown_task: bool = False
    ) -> bool:
        """Note why a site sent no update; a refusal by policy says "policy" and no more."""
        if not is_unknown_task and result is not None and result.get_return_code() != ReturnCode.OK:
            self.aggregator.refuse(client_name, _failure(result.get_return_code()))
        accepted: bool = super()._accept_train_result(client_name, result, fl_ctx, is_unknown_task)
        return accepted

    def process_result_of_unknown_task(
        self, client: Client, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        """A late update: logged and dropped; the site's charge for it stands."""
        self.warning(f"a late result of {client.name} for {task_name} was dropped")
        if self._told is not None:
            self._told("late", site=client.name, task=task_name)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Note sites that are lost or back, and tell whoever asks FLARE for the job's stats how far the run is."""
        super().handle_event(event_type, fl_ctx)
        if event_type == InfoCollector.EVENT_TYPE_GET_STATS:
            collector = fl_ctx.get_prop(InfoCollector.CTX_KEY_STATS_COLLECTOR)
            if collector is not None and self._state is not None:
                collector.add_info(group_name=SERVER_FOLDER, info=self._stats(self._state))
        elif event_type == EventType.CLIENT_DISCONNECTED and self._told is not None:
            self._told("site_lost", site=fl_ctx.get_prop(FLContextKey.DISCONNECTED_CLIENT_NAME))
        elif event_type == EventType.CLIENT_RECONNECTED and self._told is not None:
            self._told("site_back", site=fl_ctx.get_prop(FLContextKey.RECONNECTED_CLIENT_NAME))

    def _stats(self, state: RunState) -> dict[str, Any]:
        keys = ("round", "counted", "accepted", "missing", "seconds")
        return {
            "run": self._run,
            "next_round": state.next_round,
            "rounds": self._agreed.rounds,
            "last": [{key: entry[key] for key in keys} for entry in state.rounds[-_TOLD_ROUNDS:]],
        }


def _failure(code: str) -> str:
    return "policy" if code == ReturnCode.TASK_UNSUPPORTED else "failed"


def _ignore(client_task: ClientTask, fl_ctx: FLContext) -> None:
    client_task.result = None
