"""From a contract to a charged release: the site's own checks, and the order in which things reach the disk."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from clinifed import __version__
from clinifed.contract import Contract
from clinifed.data.manifest import Manifest
from clinifed.errors import BudgetExceededError, PrivacyError
from clinifed.messages import SIGNED, Parameters, Update, release_sha256
from clinifed.policy import SitePolicy
from clinifed.privacy.account import JobAccount
from clinifed.privacy.accountant import budget_units, cost_units, epsilon_of
from clinifed.privacy.claims import make_claim
from clinifed.privacy.cohorts import Cohorts
from clinifed.privacy.ledger import Ledger
from clinifed.privacy.objectives import resolve_objective
from clinifed.privacy.outbox import Outbox
from clinifed.signing import read_signing_key, sign

__all__ = ["Releases", "check_contract"]


def check_contract(contract: Contract, policy: SitePolicy, coordinator: str, data_class: str) -> None:
    """Refuse what this site does not permit, before any image is read. Nothing of a policy can be overridden.

    Args:
        coordinator: who submitted the job, by FLARE's word.
        data_class: of the site's manifest: hospital, public or synthetic.

    Guarantees:
        - The cost is computed from the contract's mechanism here, never taken from a claim.
        - A contract that was not approved, or an unknown coordinator, is refused.

    Raises:
        PrivacyError: with every reason at once.
    """
    promise, name = contract.promise, policy.site
    problems = []
    if contract.sha256() not in policy.approved_contracts:
        problems.append(
            f"contract {contract.sha256()} is not among approved_contracts; read it, then add its hash to the policy"
        )
    if coordinator not in policy.coordinators:
        problems.append(f"coordinator {coordinator!r} is none of {sorted(policy.coordinators)}")
    if name not in contract.sites:
        raise PrivacyError(*problems, f"site {name} is not in the contract of {contract.federation}")
    if promise.mode == "off":
        if not policy.permit_privacy_off or data_class == "hospital":
            problems.append(
                f"the contract switches privacy off, but the data of {name} is marked {data_class!r} and its policy "
                f"says permit_privacy_off: {policy.permit_privacy_off}"
            )
    else:
        problems += _mechanism_problems(contract, policy)
    if problems:
        raise PrivacyError(*problems)


def _mechanism_problems(contract: Contract, policy: SitePolicy) -> list[str]:
    promise, name = contract.promise, policy.site
    problems = []
    cost = promise.releases * cost_units(promise.noise_multiplier)
    if cost > budget_units(policy.budget.epsilon, policy.budget.delta):
        problems.append(
            f"the contract costs epsilon {epsilon_of(cost, policy.budget.delta):.4f}, the policy of {name} permits "
            f"{policy.budget.epsilon:g} (delta {policy.budget.delta:g})"
        )
    if cost > budget_units(promise.epsilon, promise.delta):
        problems.append(
            f"the contract promises epsilon {promise.epsilon:g}, but its noise amounts to "
            f"{epsilon_of(cost, promise.delta):.4f} (delta {promise.delta:g})"
        )
    steps = (contract.rounds + promise.reserve_rounds) * contract.training.local_epochs
    if promise.releases != steps:
        problems.append(
            f"the contract says {promise.releases} releases, but {contract.rounds} rounds and {promise.reserve_rounds} "
            f"in reserve of {contract.training.local_epochs} local epochs are {steps}"
        )
    nominal = contract.sites[name].nominal_patients
    if nominal < policy.min_nominal_patients:
        problems.append(
            f"the contract names {nominal} nominal patients for {name}, the policy's least is "
            f"{policy.min_nominal_patients}"
        )
    resolve_objective(promise.objective)
    return problems


@dataclass
class Releases:
    """The releases of one site in one job: reserved, charged, kept, recorded, signed.

    Guarantees:
        - The whole job is reserved before this exists; a budget that does not pay refuses it.
        - Every release is charged before ``make`` is called, which draws its noise.
        - A release that was kept is returned as it was; nothing is drawn twice for one charge.
        - A charge that a crash lost is paid again only from the contract's reserve rounds.
    """

    contract: Contract
    policy: SitePolicy
    job: str

    def __post_init__(self) -> None:
        self.private = self.contract.promise.mode == "dp"
        self.key = read_signing_key(self.policy.signing_key)
        self.ledger = Ledger.of(self.policy)
        self.cohorts = Cohorts(self.policy.cohorts_folder, self.key)
        self.outbox = Outbox(self.policy.outbox_folder)

    @property
    def round_units(self) -> int:
        """What one round costs."""
        return self.contract.training.local_epochs * cost_units(self.contract.promise.noise_multiplier)

    def reserve(self, manifest: Manifest) -> None:
        """Set the whole job's cost aside, and record whose images it is for.

        Raises:
            BudgetExceededError: the site's budget does not pay for the job.
            LedgerError: the ledger is missing or damaged.
            PrivacyError: the patients are not those with whom the job began.
        """
        if not self.private:
            return
        promise = self.contract.promise
        patients = sorted({record.patient for record in manifest.records if record.split == "train"})
        cohort = {
            "name": self.policy.cohort,
            "patients_hmac": self.cohorts.keep(patients),
            "manifest_sha256": manifest.sha256,
        }
        self.ledger.reserve(
            self.job,
            promise.releases * cost_units(promise.noise_multiplier),
            self.contract.sha256(),
            cohort=cohort,
            releases=promise.releases,
            noise_multiplier=promise.noise_multiplier,
            clinifed_version=__version__,
        )
        jobs = self.ledger.account().jobs
        if self.job in jobs and jobs[self.job].cohort != cohort["patients_hmac"]:
            raise PrivacyError(
                f"site {self.policy.site}: the manifest has other patients than when job {self.job} began, and the "
                "ledger could not say who took part; restore the manifest, or let the job go on without this site"
            )
        self.outbox.clean(name for name, job in jobs.items() if name != self.job and job.finished)

    def release(self, round_number: int, make: Callable[[], tuple[Parameters, Mapping[str, Any]]]) -> Update:
        """The update of this round: the one that was kept, or a new one, charged before ``make`` draws its noise.

        Args:
            make: trains, and returns the change of the parameters and what the policy declares.

        Raises:
            PrivacyError: the contract has no such round.
            BudgetExceededError: the reservation does not pay for it (any more).
        """
        if not 0 <= round_number < self.contract.rounds:
            raise PrivacyError(f"round {round_number} was asked for, the contract has {self.contract.rounds}")
        kept = self.outbox.get(self.job, round_number)
        if kept is not None:
            return self._recorded(kept)
        nonce = secrets.token_hex(16)
        meta: dict[str, Any] = {"job": self.job, "nonce": nonce}
        site, promise = self.policy.site, self.contract.promise
        if self.private:
            self._refuse_second_charge(round_number)
            state = self.ledger.charge(
                self.job,
                round_number,
                self.round_units,
                nonce,
                releases=self.contract.training.local_epochs,
                noise_multiplier=promise.noise_multiplier,
                max_grad_norm=promise.max_grad_norm,
                nominal_patients=self.contract.sites[site].nominal_patients,
            )
            charged = self.ledger.account().jobs[self.job].charged
            meta["claim"] = make_claim(self.contract, site, "job", charged, promise.delta, state.head)
            meta["ledger_head"] = state.head
        else:
            meta["claim"] = make_claim(self.contract, site, "job")
        params, declared = make()
        if declared:
            meta["declared"] = dict(declared)
        meta["signature"] = sign(self.key, SIGNED, release_sha256(Update(site, round_number, params, meta)))
        update = Update(site, round_number, params, meta)
        self.outbox.put(self.job, update)
        return self._recorded(update)

    def _refuse_second_charge(self, round_number: int) -> None:
        """A round whose charge was lost is paid again only while the reserve lasts: no later round goes short."""
        mine = self.ledger.account().jobs.get(self.job, JobAccount())
        charged = {number for number, _ in mine.charges.values()}
        if round_number in charged and mine.lost() > self.contract.promise.reserve_rounds:
            raise BudgetExceededError(
                f"site {self.policy.site}: the charge of round {round_number} was lost in a crash, and the reserve of "
                f"{self.contract.promise.reserve_rounds} rounds is used up; this round is lost, later ones are paid"
            )

    def _recorded(self, update: Update) -> Update:
        """``update``, once the ledger holds its hash. Its charge is checked: a foreign file is never sent."""
        if self.private:
            nonce = update.meta["nonce"]
            digest = release_sha256(update)
            recorded = self.ledger.account().jobs[self.job].releases.get(nonce)
            if recorded is None:
                self.ledger.release(self.job, update.round, nonce, digest)
            elif recorded != digest:
                raise PrivacyError(f"round {update.round}: what was kept is not what the ledger says was released")
            if update.round == self.contract.rounds - 1:
                self.ledger.finish(self.job)
        return update

    def finish(self) -> None:
        """The job is over; what is left of its reservation returns to the budget."""
        if self.private:
            self.ledger.finish(self.job)
