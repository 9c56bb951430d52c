"""The server side in FLARE: controller, aggregator and safetensors persistor. The only file here that imports nvflare.

The server holds the shared parameters as the difference from the zero-shot start, so it needs no model, no tower and
no prompts; it starts at zero.
"""

import time
from pathlib import Path

import numpy as np
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey, make_model_learnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.workflows.model_controller import ModelController
from safetensors.numpy import load_file, save

from clinifed.aggregators import RULES
from clinifed.aggregators.ingress import check_update
from clinifed.contract import Contract
from clinifed.errors import UpdateError
from clinifed.files import append_line, write_atomic
from clinifed.messages import Update, job_key

__all__ = [
    "GLOBAL_FILE",
    "ROUNDS_FILE",
    "SERVER_FOLDER",
    "FederatedRounds",
    "SafetensorsPersistor",
    "SpecialtyAggregator",
]

SERVER_FOLDER = "clinifed"  # beneath the job's run folder on the server
GLOBAL_FILE = "global.safetensors"
ROUNDS_FILE = "rounds.jsonl"


class SafetensorsPersistor(ModelPersistor):
    """Keeps the global delta as safetensors; starts at zero.

    Args:
        contract: the federation's contract, :meth:`clinifed.contract.Contract.text`.
    """

    def __init__(self, contract: str) -> None:
        super().__init__()
        self.contract = contract

    def _path(self, fl_ctx: FLContext) -> Path:
        run = Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id()))
        folder = run / SERVER_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        return folder / GLOBAL_FILE

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        """The delta of an earlier round of this job, or zeros of the contract's shapes."""
        path = self._path(fl_ctx)
        if path.is_file():
            weights = load_file(path)
        else:
            shapes = Contract.read(self.contract).shapes
            weights = {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}
        return make_model_learnable(weights=weights, meta_props={})

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        """Write the delta atomically; a killed server leaves the round before."""
        weights = {k: np.ascontiguousarray(v) for k, v in sorted(model[ModelLearnableKey.WEIGHTS].items())}
        write_atomic(self._path(fl_ctx), save(weights))


class SpecialtyAggregator(ModelAggregator):
    """Checks every update whole, then averages by specialty under the contract's rule.

    Guarantees:
        - A refused update leaves no trace in the aggregate.
    """

    def __init__(self, contract: str) -> None:
        super().__init__()
        self.contract = contract
        self._agreed = Contract.read(contract)
        self.job = ""  # set by the controller, which knows it
        self.round = 0
        self.nonces: set[str] = set()  # of everything accepted in this job
        self.accepted: dict[str, Update] = {}
        self.refused: dict[str, str] = {}

    def reset_stats(self) -> None:
        """Forget the updates of the round before."""
        self.accepted, self.refused = {}, {}

    def accept_model(self, model: FLModel) -> None:
        """Stage one update, or refuse it with a named reason; never raises."""
        site = str(model.meta.get("client_name"))
        try:
            if model.params_type != ParamsType.DIFF:
                raise UpdateError("not_diff", f"{site} sent {model.params_type}, not a DIFF")
            # `client_name` and `props` are added by the server's own FLARE, `current_round` is checked as a field.
            meta = {k: v for k, v in model.meta.items() if k not in ("client_name", "props", "current_round")}
            update = Update(site, model.current_round, dict(model.params or {}), meta)
            check_update(update, self._agreed, self.round, site in self.accepted, self.job, self.nonces)
        except UpdateError as error:
            self.refused[site] = error.reason
            self.warning(f"update refused ({error.reason}): {error}")
            return
        self.accepted[site] = update
        self.nonces.add(update.meta["nonce"])

    def aggregate_model(self) -> FLModel:
        """The change of the global model in this round, as a DIFF."""
        weights = {name: site.weight for name, site in self._agreed.sites.items()}
        params = RULES[self._agreed.rule](list(self.accepted.values()), weights, self._agreed.shapes)
        return FLModel(params_type=ParamsType.DIFF, params=params, current_round=self.round)


class FederatedRounds(ModelController):
    """Rounds with a deadline and a quorum of good updates.

    Args:
        contract: the federation's contract, :meth:`clinifed.contract.Contract.text`.
        run: names this job besides FLARE's own name of it.
        aggregator: the :class:`SpecialtyAggregator` of the same contract.

    Guarantees:
        - A round with fewer good updates than the quorum changes nothing.
        - A round ends at its deadline, whoever is missing.
    """

    def __init__(self, contract: str, run: str, aggregator: SpecialtyAggregator) -> None:
        # A site that fails costs the round that site, not the job: we count good updates ourselves.
        super().__init__(
            persistor_id=AppConstants.DEFAULT_PERSISTOR_ID, ignore_result_error=True, task_check_period=0.1
        )
        self.contract = contract
        self._run = run  # under this name FLARE's job exporter finds it; `run` is the method below
        self.aggregator = aggregator

    def _accept_train_result(
        self, client_name: str, result: Shareable, fl_ctx: FLContext, is_unknown_task: bool = False
    ) -> bool:
        """Note why a site sent no update; a refusal by policy says "policy" and no more."""
        if not is_unknown_task and result is not None:
            code = result.get_return_code()
            if code != ReturnCode.OK:
                self.aggregator.refused[client_name] = "policy" if code == ReturnCode.TASK_UNSUPPORTED else "failed"
        accepted: bool = super()._accept_train_result(client_name, result, fl_ctx, is_unknown_task)
        return accepted

    def run(self) -> None:
        """The whole federation, round by round."""
        contract = Contract.read(self.contract)
        diary = Path(self.get_run_dir()) / SERVER_FOLDER / ROUNDS_FILE
        model = self.load_model()
        self.aggregator.job = job_key(self.fl_ctx.get_job_id(), self._run)
        lost = 0
        for number in range(contract.rounds):
            sites = sorted(set(self.sample_clients()) & set(contract.sites))
            if len(sites) < contract.min_clients:
                self.panic(f"{len(sites)} sites are connected, min_clients is {contract.min_clients}")
                return
            started = time.time()
            model.current_round, model.total_rounds = number, contract.rounds
            self.aggregator.reset_stats()
            self.aggregator.round = number
            self.broadcast_model(
                data=model,
                targets=sites,
                timeout=contract.round_timeout_s,
                blocking=False,
                callback=self.aggregator.accept_model,
            )
            while self.get_num_standing_tasks():
                if self.abort_signal.triggered:
                    return
                time.sleep(self._task_check_period)
            good = sorted(self.aggregator.accepted)
            counted = len(good) >= contract.min_updates
            if counted:
                change = self.aggregator.aggregate_model().params
                model.params = {name: value + change[name] for name, value in model.params.items()}
                self.save_model(model)
            else:
                lost += 1
                self.warning(
                    f"round {number}: {len(good)} good updates, {contract.min_updates} needed; model unchanged"
                )
            reasons = {s: self.aggregator.refused.get(s, "deadline") for s in sites if s not in good}
            metas = {s: self.aggregator.accepted[s].meta for s in good}
            append_line(
                diary,
                {
                    "round": number,
                    "counted": counted,
                    "accepted": good,
                    "missing": reasons,
                    "job": self.aggregator.job,
                    "claims": {s: meta["claim"] for s, meta in metas.items()},
                    "declared": {s: meta["declared"] for s, meta in metas.items() if "declared" in meta},
                    "seconds": round(time.time() - started, 3),
                },
            )
        if lost == contract.rounds:
            self.panic("no round had enough good updates; the model is unchanged")
