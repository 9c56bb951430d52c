"""The FLARE aggregator: stages every update of a round, checked whole, and averages by specialty."""

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator

from clinifed.aggregators.ingress import check_update
from clinifed.aggregators.rules import aggregate
from clinifed.contract import Contract
from clinifed.errors import UpdateError
from clinifed.messages import Parameters, Update, unpacked

__all__ = ["SpecialtyAggregator"]


class SpecialtyAggregator(ModelAggregator):
    """Checks every update whole, then averages by specialty under the contract's rule.

    Args:
        contract: the federation's contract, :meth:`clinifed.contract.Contract.text`.

    Guarantees:
        - A refused update leaves no trace in the aggregate.
        - A site counts once in a round, whatever it sends.
    """

    def __init__(self, contract: str) -> None:
        super().__init__()
        self.contract = contract
        self._agreed = Contract.read(contract)
        self.job = ""  # set by the controller, which knows it
        self.round = 0
        self.nonces: set[str] = set()  # of everything accepted in this run
        self.memory: dict[str, NDArray[np.float32]] = {}  # of the server's optimiser
        self.told: Callable[..., None] = lambda kind, **what: None  # the controller's event log
        self.accepted: dict[str, Update] = {}
        self.refused: dict[str, str] = {}
        self._lock, self._open = threading.Lock(), True  # FLARE's threads bring updates while the controller waits

    def reset_stats(self) -> None:
        """Forget the updates of the round before, and take those of the next."""
        with self._lock:
            self.accepted, self.refused, self._open = {}, {}, True

    def close(self) -> None:
        """Take no more updates in this round; what is being checked at this moment is waited for."""
        with self._lock:
            self._open = False

    def accept_model(self, model: FLModel) -> bool:
        """Stage one update, or refuse it with a named reason; never raises. Returns whether it was taken."""
        with self._lock:
            return self._accept(model, str(model.meta.get("client_name")))

    def _accept(self, model: FLModel, site: str) -> bool:
        if not self._open:
            self.told("late", round=self.round, site=site)
            return False
        try:
            if model.params_type != ParamsType.DIFF:
                raise UpdateError("not_diff", f"{site} sent {model.params_type}, not a DIFF")
            # `client_name` and `props` are added by the server's own FLARE, `current_round` is checked as a field.
            meta = {k: v for k, v in model.meta.items() if k not in ("client_name", "props", "current_round")}
            params = dict(model.params or {})
            if self._agreed.aggregation.update_dtype == "bfloat16":
                params = unpacked(params)
            update = Update(site, model.current_round, params, meta)
            check_update(update, self._agreed, self.round, site in self.accepted, self.job, self.nonces)
        except UpdateError as error:
            self.refuse(site, error.reason, str(error))
            return False
        except Exception as error:  # what a site sends may be anything; the round goes on without it
            self.refuse(site, "malformed", type(error).__name__)
            return False
        self.accepted[site] = update
        self.refused.pop(site, None)
        self.nonces.add(update.meta["nonce"])
        self.told("accepted", round=self.round, site=site)
        return True

    def refuse(self, site: str, reason: str, why: str = "") -> None:
        """Note that ``site`` has no update in this round, and why. One that was accepted stays."""
        if site not in self.accepted:
            self.refused[site] = reason
        self.told("refused", round=self.round, site=site, reason=reason)
        self.warning(f"round {self.round}: no update of {site} ({reason}) {why}")

    def aggregate_model(self) -> FLModel:
        """The change of the global model in this round, as a DIFF; what the rule remembers is in ``memory``."""
        weights = {name: site.weight for name, site in self._agreed.sites.items()}
        updates = [self.accepted[site] for site in sorted(self.accepted)]
        change: Parameters
        change, self.memory = aggregate(updates, weights, self._agreed.shapes, self._agreed.aggregation, self.memory)
        return FLModel(params_type=ParamsType.DIFF, params=change, current_round=self.round)
