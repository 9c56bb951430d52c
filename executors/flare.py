"""The FLARE Executor of a hospital: task in, update out. The training itself is in a process of its own."""

import time
from collections.abc import Callable
from functools import cached_property

import numpy as np
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FilterKey, FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.logging.constants import is_log_streaming_allowed
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.fuel.utils import fobs
from nvflare.lighter.utils import verify_folder_signature_and_get_signers
from nvflare.private.privacy_manager import PrivacyService
from safetensors.numpy import save

from clinifed import __version__
from clinifed.contract import Contract
from clinifed.errors import ClinifedError, FederationError, PrivacyError
from clinifed.executors.filters import ReleaseFilter, policy_of, to_shareable
from clinifed.executors.frames import Frame
from clinifed.executors.process import TrainerGoneError, TrainerProcess
from clinifed.files import append_line
from clinifed.messages import TASK_FINISH, TASK_HANDSHAKE, Update
from clinifed.policy import SitePolicy
from clinifed.privacy.ledger import Ledger
from clinifed.privacy.outbox import Outbox, unpack

__all__ = ["SIMULATOR", "SiteExecutor"]

SIMULATOR = "simulator"  # the coordinator of jobs in FLARE's simulator, where nobody submits them


class SiteExecutor(Executor):
    """Trains one site in each round of a job.

    Everything the site permits stands in its own policy file (``local/clinifed/<site>.yaml`` in its FLARE folder);
    the job brings the contract and no code.

    Args:
        contract: the federation's contract, :meth:`clinifed.contract.Contract.text`.
        run: the run's name: what the ledger calls the job. A run may take several FLARE jobs.

    Guarantees:
        - Errors leave as a return code only; their text stays in the site's log.
        - Without the site's release filter in FLARE's privacy scope, or with filters that a job brings, nothing runs.
        - A trainer that is killed costs the site that round at most, and never a second release for one charge.
    """

    def __init__(self, contract: str, run: str) -> None:
        super().__init__()
        self.contract = contract  # FLARE's job exporter reads constructor arguments back from attributes
        self.run = run
        self._trainer: TrainerProcess | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Start the trainer with the job, so that its imports overlap with FLARE's; end it with the job."""
        if event_type == EventType.START_RUN:
            try:
                self._start(fl_ctx)
            except ClinifedError as error:  # told again, as a return code, when a task comes
                self.log_error(fl_ctx, f"not started: {error}", fire_event=False)
        elif event_type == EventType.END_RUN and self._trainer is not None:
            self._trainer.stop()  # the run may go on in another job: its reservation stays until the server ends it

    @cached_property
    def _agreed(self) -> Contract:
        """The contract, read once. Raises ConfigError."""
        return Contract.read(self.contract)

    def _start(self, fl_ctx: FLContext) -> tuple[SitePolicy, TrainerProcess]:
        """The site's policy, and its running trainer; a policy that was changed counts from this moment on."""
        policy = policy_of(fl_ctx)
        if self._trainer is not None and not (self._trainer.alive and self._trainer.policy == policy):
            self._trainer.stop()
        if self._trainer is None or not self._trainer.alive:
            self._trainer = TrainerProcess(self._agreed, policy, self.run, _coordinator(fl_ctx))
        return policy, self._trainer

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """One round; a failure costs the federation this site for this round, never the job."""
        tasks = {
            AppConstants.TASK_TRAIN: self._round,
            TASK_HANDSHAKE: self._handshake,
            TASK_FINISH: self._finish,
        }
        if task_name not in tasks:
            return make_reply(ReturnCode.TASK_UNKNOWN)
        try:
            _refuse_open_door(fl_ctx)
            return tasks[task_name](shareable, fl_ctx, abort_signal)
        except PrivacyError as error:
            self.log_error(fl_ctx, f"refused by policy: {error}", fire_event=False)
            return make_reply(ReturnCode.TASK_UNSUPPORTED)
        except ClinifedError as error:
            self.log_error(fl_ctx, str(error), fire_event=False)
            return make_reply(ReturnCode.TASK_ABORTED if abort_signal.triggered else ReturnCode.EXECUTION_RESULT_ERROR)
        except Exception as error:
            # The text may quote data; its type is logged, and only locally.
            self.log_error(fl_ctx, f"unexpected {type(error).__name__}", fire_event=False)
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)

    def _round(self, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        started = time.perf_counter()
        received = FLModelUtils.from_shareable(shareable)
        delta = save({name: np.ascontiguousarray(value) for name, value in received.params.items()})
        update = self._train(int(received.current_round), delta, fl_ctx, abort_signal)
        result = to_shareable(update, pack=self._agreed.aggregation.update_dtype == "bfloat16")
        append_line(
            policy_of(fl_ctx).diary,
            {
                "job": self.run,
                "round": update.round,
                "compute_s": round(time.perf_counter() - started, 4),
                "bytes_sent": len(fobs.dumps(result)),
                "bytes_received": len(fobs.dumps(shareable)),
                "claim": update.meta["claim"],
            },
        )
        return result

    def _handshake(self, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """What this site holds. The trainer gets ready meanwhile: policy, reservation, images."""
        timeout_s = float(self._agreed.aggregation.start_timeout_s)
        frame = self._ask(lambda child, stopped: child.hello(stopped, timeout_s), fl_ctx, abort_signal)
        reply = make_reply(ReturnCode.OK)
        reply[TASK_HANDSHAKE] = {
            "contract_sha256": self._agreed.sha256(),
            "clinifed_version": __version__,
            "base_model_sha256": frame.header["base_model_sha256"],
        }
        return reply

    def _finish(self, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """The run is over: what is left of its reservation returns to the budget."""
        policy = policy_of(fl_ctx)
        if self._agreed.promise.mode == "dp":
            Ledger.of(policy).finish(self.run)
        else:
            Outbox(policy.outbox_folder).clean([self.run])  # no ledger tells the next run that this one is over
        return make_reply(ReturnCode.OK)

    def _train(self, number: int, delta: bytes, fl_ctx: FLContext, abort_signal: Signal) -> Update:
        """One round in the trainer."""
        timeout_s = float(self._agreed.aggregation.round_timeout_s)
        frame = self._ask(lambda child, stopped: child.train(number, delta, stopped, timeout_s), fl_ctx, abort_signal)
        return unpack(frame.body)

    def _ask(
        self, question: Callable[[TrainerProcess, Callable[[], bool]], Frame], fl_ctx: FLContext, abort_signal: Signal
    ) -> Frame:
        """The trainer's answer. If it was killed, a new one goes on from what is on the disk, once.

        Raises:
            PrivacyError: it refused.
            FederationError: it failed, or was killed twice.
        """
        for last in (False, True):
            try:
                policy, trainer = self._start(fl_ctx)
                frame = question(trainer, lambda: bool(abort_signal.triggered))
                break
            except TrainerGoneError as error:
                if abort_signal.triggered or last:
                    raise
                self.log_warning(fl_ctx, f"{error}; starting another", fire_event=False)
        if kind := frame.header.get("failed"):
            problems = [f"{p} (more in {policy.log})" for p in frame.header["problems"]]
            raise PrivacyError(*problems) if kind == "policy" else FederationError(*problems)
        return frame


def _coordinator(fl_ctx: FLContext) -> str:
    """Who submitted the job: whose signature it bears, and not the server's word alone, which may be anything.

    Raises:
        PrivacyError: the job is not signed by one whom the federation's root made a person with a role.
    """
    if fl_ctx.get_prop(FLContextKey.SIMULATE_MODE, False):
        return SIMULATOR
    meta = fl_ctx.get_prop(FLContextKey.JOB_META, {})
    said = str(meta.get(JobMetaKey.SUBMITTER_NAME.value, ""))
    workspace = fl_ctx.get_engine().get_workspace()
    root = workspace.get_file_path_in_startup("rootCA.pem")
    verified, signers = verify_folder_signature_and_get_signers(workspace.get_app_dir(fl_ctx.get_job_id()), root)
    # The certificates of sites and of the server have no role; one of them could sign for anybody otherwise.
    if not verified or not signers or any(name != said or not role for name, _, role in signers):
        raise PrivacyError(
            f"the job is said to be of {said!r}, but is signed by {[name for name, _, _ in signers] or 'nobody'}; "
            "jobs are submitted, and so signed, with a coordinator's kit"
        )
    return said


def _refuse_open_door(fl_ctx: FLContext) -> None:
    """Raise PrivacyError unless the site's release filter stands, last, on the way out, and no log goes past it."""
    if fl_ctx.get_prop(FLContextKey.SIMULATE_MODE, False) and fl_ctx.get_prop(FLContextKey.SCOPE_OBJECT) is None:
        # FLARE's simulator reads a site's privacy.json, but does not hand the scope on; elsewhere FLARE does.
        fl_ctx.set_prop(FLContextKey.SCOPE_OBJECT, PrivacyService.get_scope(None), private=True, sticky=False)
    scope = fl_ctx.get_prop(FLContextKey.SCOPE_OBJECT)
    filters = scope.task_result_filters.get(FilterKey.OUT, []) if scope is not None else []
    if not filters or not isinstance(filters[-1], ReleaseFilter):
        raise PrivacyError(
            f"{fl_ctx.get_identity_name()}: the site's privacy scope has no {ReleaseFilter.__name__} as its last "
            "result filter; see that local/privacy.json is the one that came with the site's kit"
        )
    if is_log_streaming_allowed(fl_ctx):  # FLARE's default: it then sends the site's log to the server, unfiltered
        raise PrivacyError(
            f"{fl_ctx.get_identity_name()}: FLARE streams this site's log to the server; set allow_log_streaming to "
            "false in local/resources.json"
        )
    runner = fl_ctx.get_prop(FLContextKey.RUNNER)
    if runner is not None and (runner.task_result_filters or runner.task_data_filters):
        raise PrivacyError("the job brings filters of its own, which would come after the site's; it may not")
