"""Checks of the budget: what is left of it, and whether this site can learn anything through the noise."""

from clinifed.jobs.data_checks_labels import patients_by_class
from clinifed.jobs.data_checks_share import Shared
from clinifed.jobs.data_checks_site import Finding, Level, SiteUnderCheck
from clinifed.privacy.accountant import epsilon_of
from clinifed.privacy.ledger import Ledger
from clinifed.privacy.plan import Feasibility, Group, make_plan, plan_of_contract

__all__ = ["budget_left", "outlook"]

_DIMENSIONS = 512  # of BiomedCLIP's embedding, where no model says
_HOPELESS = "too small to learn anything at this epsilon"


def outlook(site: SiteUnderCheck) -> Finding:
    """`clinifed privacy plan` for this site: by the public N₀, and by the patients that are really there."""
    contract = site.contract
    if contract is not None and contract.promise.mode == "off":
        return Finding("WARN", ("privacy is off; nobody is protected",), "only for public or synthetic data", Shared())
    public: list[Feasibility] = []
    says = []
    if contract is not None and site.name in contract.sites:
        agreed = contract.sites[site.name]
        public = [row for row in plan_of_contract(contract).feasibility if row.site == site.name]
        says += [f"{row.specialty}, with N₀ = {row.nominal_patients}: {row.verdict}" for row in public]
        epsilon, delta, nominal = contract.promise.epsilon, contract.promise.delta, agreed.nominal_patients
    elif site.policy is not None:
        epsilon, delta, nominal = site.policy.budget.epsilon, site.policy.budget.delta, None
    else:
        return Finding("WARN", ("neither contract nor policy: no epsilon to plan with",), "give a site's policy")
    support = {name: len(set().union(*who.values())) for name, who in patients_by_class(site).items()}
    there = len({r.patient for r in site.records if r.split == "train" and r.specialty in support})
    dimensions = _dimensions(site)
    groups = [
        Group(site.name or "site", name, nominal or there, count / (nominal or there), len(labels) * (dimensions + 1))
        for name, count in support.items()
        if count and (labels := site.vocabulary[name].labels)
    ]
    # Rounds cancel out of the ratio, so one says as much as any number of them.
    alone = make_plan(epsilon, delta, 1, groups=groups).feasibility if groups else ()
    says += [
        f"{row.specialty}, with the {support[row.specialty]} patients that are there, alone: noise over signal "
        f"{row.noise_to_signal:.2g} at epsilon {epsilon:g}"
        + (" (above 1: too small alone)" * (row.noise_to_signal > 1))
        for row in alone
    ]
    remedies = []
    if nominal is not None and there < nominal:
        remedies.append(f"{there} patients are fewer than N₀ = {nominal}, by which every sum is divided: lower it")
    fine = all(row.verdict == "may learn" for row in public) if public else all(r.noise_to_signal <= 1 for r in alone)
    lost = all(r.verdict == _HOPELESS for r in public) if public else all(r.noise_to_signal > 1 for r in alone)
    level: Level = "PASS" if fine and not remedies else "WARN"
    if lost:
        level = "FAIL" if public else "WARN"
        remedies.append("more patients, a larger epsilon, fewer parameters, or other sites to learn with")
    # By N₀ alone: a verdict on the true count would tell on which side of a limit it lies.
    words = tuple(f"{row.specialty}: {row.verdict}" for row in public)
    return Finding(level, tuple(says), "; ".join(remedies), Shared(words) if public and not remedies else None)


def _dimensions(site: SiteUnderCheck) -> int:
    contract = site.contract
    if contract is not None:
        for name, shape in contract.shapes.items():
            if name.startswith("heads.") and name.endswith(".weight"):
                return shape[1]
    return _DIMENSIONS


def budget_left(site: SiteUnderCheck) -> Finding:
    """The ledger as it stands, verified, and whether it pays for the contract."""
    if site.policy is None:
        return Finding("PASS", ("no policy, so no ledger is looked at",), "", Shared(("no ledger was looked at",)))
    state = Ledger.of(site.policy).state()
    left = state.budget_units - state.spent_units - state.reserved_units
    room = epsilon_of(left, state.delta) if left > 0 else 0.0
    says = (
        f"epsilon {state.epsilon_spent:.4f} of {state.epsilon_budget:g} spent per patient, room for {room:.4f} on its "
        f"own (delta {state.delta:g}); {state.records} records",
    )
    wanted = site.epsilon_asked
    if left <= 0 or wanted > room * (1 + 1e-9):
        remedy = "nothing may run until the budget grows: `clinifed privacy ledger increase`, by a second person"
        return Finding("FAIL", says, remedy, Shared(("the budget does not pay for it",)))
    return Finding("PASS", says, "", Shared(("the budget pays for it",) if wanted else ("there is room",)))
