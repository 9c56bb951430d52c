"""Training at one site, without FLARE: (contract, policy) once, then (round, global delta) → Update."""

import logging
import time
from collections.abc import Mapping

from torch import Tensor

from clinifed.contract import Contract
from clinifed.data.manifest import Manifest, read_manifest
from clinifed.errors import ModelError, PrivacyError, UpdateError
from clinifed.executors.features import patient_tensors
from clinifed.messages import Parameters, Update, allowed_names
from clinifed.models.adapters import GlobalModel, TrainablePart, build_trainable
from clinifed.models.backbone import load_backbone
from clinifed.models.state import apply_delta
from clinifed.policy import SitePolicy
from clinifed.privacy.accountant import budget_units, cost_units
from clinifed.privacy.engine import Mechanism, PatientTensors, plain_step, private_step
from clinifed.privacy.ledger import Ledger
from clinifed.privacy.objectives import resolve_objective

__all__ = ["SiteTrainer", "check_contract", "local_steps"]

log = logging.getLogger(__name__)


def check_contract(contract: Contract, policy: SitePolicy, manifest: Manifest) -> None:
    """Refuse a contract this site does not permit, before any image is read.

    Raises:
        PrivacyError: with every reason at once.
    """
    problems = []
    promise = contract.promise
    if policy.site not in contract.sites:
        problems.append(f"site {policy.site} is not in the contract of {contract.federation}")
    if promise.mode == "off":
        if not policy.permit_privacy_off or manifest.data_class == "hospital":
            problems.append(
                f"the contract switches privacy off, but the data of {policy.site} is marked "
                f"{manifest.data_class!r} and its policy says permit_privacy_off: {policy.permit_privacy_off}"
            )
    else:
        cost = promise.releases * cost_units(promise.noise_multiplier)
        budget = budget_units(policy.budget.epsilon, policy.budget.delta)
        if cost > budget:
            problems.append(
                f"the contract costs {cost} units of budget, the policy of {policy.site} permits {budget} "
                f"(epsilon {policy.budget.epsilon:g}, delta {policy.budget.delta:g})"
            )
        if promise.releases != contract.rounds * contract.training.local_epochs:
            problems.append(
                f"the contract says {promise.releases} releases, but {contract.rounds} rounds of "
                f"{contract.training.local_epochs} local epochs are {contract.rounds * contract.training.local_epochs}"
            )
    if problems:
        raise PrivacyError(*problems)


def local_steps(
    part: TrainablePart, data: PatientTensors, contract: Contract, nominal_patients: int, steps: int
) -> None:
    """``steps`` full-batch steps on ``part``, in place: private ones, already charged, unless privacy is off."""
    promise, training = contract.promise, contract.training
    objective = resolve_objective(promise.objective)
    for _ in range(steps):
        if promise.mode == "off":
            plain_step(part, data, objective, training.learning_rate, training.batch_size)
        else:
            mechanism = Mechanism(promise.noise_multiplier, promise.max_grad_norm, nominal_patients)
            private_step(part, data, objective, mechanism, training.learning_rate, training.batch_size)


class SiteTrainer:
    """A site's part in one job. State that must outlive the process is on the site's disk only.

    Guarantees:
        - Every release is charged to the ledger before its noise is drawn.
        - What leaves is the noised change of the trunk and of the site's own heads, and nothing else.
        - A contract beyond the policy, or a budget that does not pay, is refused before any image is read.
    """

    def __init__(self, contract: Contract, policy: SitePolicy) -> None:
        self.contract, self.policy = contract, policy
        manifest = read_manifest(policy.manifest)
        check_contract(contract, policy, manifest)
        self.ledger = Ledger(policy.ledger, policy.site, policy.budget.epsilon, policy.budget.delta)
        state = self.ledger.state()
        if contract.promise.mode == "dp" and state.spent_units + self._cost() > state.budget_units:
            raise PrivacyError(f"site {policy.site}: the budget is exhausted at epsilon {state.epsilon_spent:.4f}")
        backbone = load_backbone(policy.model_ref or contract.base_model.ref)
        if backbone.sha256 != contract.base_model.sha256:
            raise ModelError(
                f"site {policy.site} holds base model {backbone.sha256}, the contract wants "
                f"{contract.base_model.sha256}; install the same weights"
            )
        site = contract.sites[policy.site]
        mine = {name: contract.specialties[name] for name in sorted(site.specialties)}
        training = contract.training
        self.part = build_trainable(backbone, mine, training.train, training.temperature)
        self.start = {name: t.clone() for name, t in self.part.state_dict().items()}
        model = GlobalModel(backbone, self.part).eval()
        self.data = patient_tensors(
            model, backbone, manifest, mine, split="train", batch_size=training.batch_size, cache=policy.cache
        )

    def _cost(self) -> int:
        """Budget units of one round."""
        return self.contract.training.local_epochs * cost_units(self.contract.promise.noise_multiplier)

    def train(self, job: str, round_number: int, delta: Mapping[str, Tensor]) -> Update:
        """One round from the global ``delta`` (name → float32 tensor); returns this site's change.

        Raises:
            BudgetExceededError: the site's budget does not pay for the round.
            UpdateError: the global delta does not fit.
        """
        names = allowed_names(delta, self.contract.sites[self.policy.site].specialties)
        if names != set(self.start):
            raise UpdateError("wrong_names", f"the server sent {sorted(delta)}, this site needs {sorted(self.start)}")
        began = apply_delta(self.start, {name: delta[name] for name in names})
        self.part.load_state_dict(began)
        started = time.perf_counter()
        contract, promise = self.contract, self.contract.promise
        meta: dict[str, str | float] = {"contract_sha256": contract.sha256()}
        if promise.mode == "dp":
            state = self.ledger.charge(
                self._cost(),
                job=job,
                round=round_number,
                contract=contract.sha256(),
                releases=contract.training.local_epochs,
                noise_multiplier=promise.noise_multiplier,
                max_grad_norm=promise.max_grad_norm,
                nominal_patients=contract.sites[self.policy.site].nominal_patients,
            )
            meta |= {"ledger_head": state.head, "epsilon_claim": state.epsilon_spent}
        nominal = contract.sites[self.policy.site].nominal_patients
        local_steps(self.part, self.data, contract, nominal, contract.training.local_epochs)
        params: Parameters = {n: (t - began[n]).numpy() for n, t in self.part.state_dict().items()}
        log.info("round %d: trained in %.2f s", round_number, time.perf_counter() - started)
        return Update(self.policy.site, round_number, params, meta)
