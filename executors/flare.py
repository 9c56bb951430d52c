"""The FLARE Executor of a hospital: task in, update out. The only file of this folder that imports nvflare."""

import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.fuel.utils import fobs

from clinifed.contract import Contract
from clinifed.errors import ClinifedError, PrivacyError
from clinifed.executors.trainer import SiteTrainer
from clinifed.files import append_line
from clinifed.policy import SitePolicy, find_policy

__all__ = ["SiteExecutor"]


class SiteExecutor(Executor):
    """Trains one site in each round of a job.

    Everything the site permits stands in its own policy file (``local/clinifed/<site>.yaml`` in its FLARE folder);
    the job brings the contract and no code.

    Args:
        contract: the federation's contract as plain data (see :class:`clinifed.contract.Contract`).

    Guarantees:
        - Errors leave as a return code only; their text stays in the site's log.
    """

    def __init__(self, contract: dict[str, Any]) -> None:
        super().__init__()
        self.contract = contract  # FLARE's job exporter reads constructor arguments back from attributes
        self._policy: SitePolicy | None = None
        self._trainer: SiteTrainer | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """One thread per process: simulated sites share the cores, and the steps are small."""
        if event_type == EventType.START_RUN:
            torch.set_num_threads(1)

    def _prepare(self, fl_ctx: FLContext) -> tuple[SitePolicy, SiteTrainer]:
        """Policy and trainer, made at the first task of this process (a simulator may start one per task)."""
        if self._policy is None or self._trainer is None:
            local = Path(fl_ctx.get_engine().get_workspace().get_site_config_dir())
            self._policy = find_policy(local, fl_ctx.get_identity_name())
            self._trainer = SiteTrainer(Contract.model_validate(self.contract), self._policy)
        return self._policy, self._trainer

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """One round; a failure costs the federation this site for this round, never the job."""
        if task_name != AppConstants.TASK_TRAIN:
            return make_reply(ReturnCode.TASK_UNKNOWN)
        try:
            started = time.perf_counter()
            policy, trainer = self._prepare(fl_ctx)
            prepared = time.perf_counter()
            received = FLModelUtils.from_shareable(shareable)
            delta = {name: torch.from_numpy(np.asarray(value)) for name, value in received.params.items()}
            update = trainer.train(fl_ctx.get_job_id(), int(received.current_round), delta)
            if abort_signal.triggered:
                return make_reply(ReturnCode.TASK_ABORTED)
            result = FLModelUtils.to_shareable(
                FLModel(
                    params_type=ParamsType.DIFF,
                    params=update.params,
                    current_round=update.round,
                    meta=dict(update.meta),
                )
            )
            append_line(
                policy.diary,
                {
                    "job": fl_ctx.get_job_id(),
                    "round": update.round,
                    "prepare_s": round(prepared - started, 4),
                    "compute_s": round(time.perf_counter() - prepared, 4),
                    "bytes_sent": len(fobs.dumps(result)),
                    "bytes_received": len(fobs.dumps(shareable)),
                    "epsilon_spent": update.meta.get("epsilon_claim", 0.0),
                },
            )
            return result
        except PrivacyError as error:
            self.log_error(fl_ctx, f"refused by policy: {error}", fire_event=False)
            return make_reply(ReturnCode.TASK_UNSUPPORTED)
        except ClinifedError as error:
            self.log_error(fl_ctx, str(error), fire_event=False)
            return make_reply(ReturnCode.EXECUTION_RESULT_ERROR)
        except Exception as error:
            # The text may quote data; its type and place are logged, and only locally.
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            self.log_error(fl_ctx, f"unexpected {type(error).__name__} at {where}", fire_event=False)
            return make_reply(ReturnCode.EXECUTION_EXCEPTION)
