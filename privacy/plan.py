"""Before a run: the noise it needs, what it costs, and whether anybody can learn through that noise.

Everything here is arithmetic on public numbers; no patient is looked at. The run's averaged gradient of one head has
noise of L2 norm σ·C·√d / (N₀·√steps), against a signal of at most C times the share of patients of that specialty
(a patient's gradient is clipped to C, and the sum is divided by N₀). Their ratio decides what can be learned; rounds
cancel out, since σ grows with √releases, so patients and parameters remain.

The thresholds were measured on synthetic phantoms (64-dimensional embedding, heads of d = 130 and 195, 4 sites, 20
releases, delta 1e-5, epsilon 1 to 8, 25 to 150 patients per site and specialty, two draws of 5 seeds), by balanced
accuracy. Federated, the one head with a ratio above 1 ended below its zero-shot start, and all of .85 and less above
it. Alone, five of six heads with a ratio above 1 ended below it, those of .6 to .85 between .05 below and .03 above,
those of .5 and less at it or above. So above 1 nothing is to be expected, and below 1 is no promise.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf, prod, sqrt
from typing import Any, Literal

from clinifed.contract import Contract
from clinifed.errors import ConfigError, PrivacyError
from clinifed.messages import TRUNK, specialty_of
from clinifed.privacy.accountant import budget_units, cost_units, epsilon_of, noise_multiplier_for
from clinifed.privacy.claims import TRUST_MODEL
from clinifed.privacy.crosscheck import CrossCheck, agree, cross_checks
from clinifed.privacy.expectations import STUDY_DELTA, Expectation, expectation

__all__ = ["TWO_LABEL_HEAD", "Feasibility", "Group", "Plan", "Verdict", "make_plan", "plan_of_contract"]

TWO_LABEL_HEAD = 2 * 512 + 2  # d: weight and bias of two labels on BiomedCLIP's 512 dimensions
_ANY = "any"  # site and specialty of a plan without a contract
_DELTA_SHARE = 10  # delta above 1/(10·N₀) would let a mechanism publish a patient in one of ten runs outright

Verdict = Literal[
    "may learn", "too small alone, may learn with the others", "too small to learn anything at this epsilon"
]


@dataclass(frozen=True)
class Group:
    """The patients of one site who train one part of the model; public numbers."""

    site: str
    specialty: str  # or "trunk": the part that all specialties train
    nominal_patients: int  # N₀ of the site
    share: float  # of N₀ who have this specialty, in (0, 1]
    parameters: int  # d, the trained parameters of the part
    weight: float = 1.0  # of the site in the average


@dataclass(frozen=True)
class Feasibility:
    """What a group can hope for."""

    site: str
    specialty: str
    nominal_patients: int
    estimated_patients: float  # of this specialty, were all specialties of the site equally common
    parameters: int
    noise_to_signal: float  # the site alone
    sites: int  # how many train this part
    federated_noise_to_signal: float  # the average over those sites
    verdict: Verdict
    expectation: Expectation | None  # by a study of heads; None of a trunk, and where all its cases are larger


@dataclass(frozen=True)
class Plan:
    """The privacy of a run that has not begun, and its outlook."""

    noise_multiplier: float  # σ, calibrated once for all releases
    releases: int  # (rounds + reserve rounds) · local steps
    epsilon: float  # what all releases add up to; never above ``epsilon_asked``
    epsilon_asked: float
    delta: float
    rounds: int
    local_steps: int
    reserve_rounds: int
    max_grad_norm: float  # C
    units_per_release: int  # of 1e-12 of μ²
    units: int  # of all releases
    epsilon_without_crash: float  # the rounds alone, no reserve used
    epsilon_per_crash: float  # what one round whose charge a crash lost adds to that
    feasibility: tuple[Feasibility, ...]
    cross_checks: Mapping[str, CrossCheck] | None  # None: not asked for
    warnings: tuple[str, ...]
    unit: str = "patient"
    relation: str = "add_remove"
    trust_model: str = TRUST_MODEL

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for JSON."""
        return asdict(self)


def _refuse(**limits: tuple[float | None, float, float]) -> None:
    """Raise ConfigError for every value that is not in its open range."""
    problems = [
        f"{name}={value!r}: give a number above {low:g}" + ("" if high == inf else f" and below {high:g}")
        for name, (value, low, high) in limits.items()
        if value is not None and not low < value < high
    ]
    if problems:
        raise ConfigError(*problems)


def make_plan(
    epsilon: float,
    delta: float,
    rounds: int,
    local_steps: int = 1,
    reserve_rounds: int = 0,
    patients: int | None = None,
    parameters: int = TWO_LABEL_HEAD,
    max_grad_norm: float = 1.0,
    groups: Sequence[Group] = (),
    noise_multiplier: float | None = None,
    cross_check: bool = False,
) -> Plan:
    """Plan a run: sigma is calibrated once, for ``(rounds + reserve_rounds) · local_steps`` releases.

    Args:
        epsilon: per patient and site, for the whole run.
        local_steps: full-batch steps of a round; each is a release.
        reserve_rounds: paid for, used only where a crash lost a charge.
        patients: N₀ of a site with one head of ``parameters`` parameters, where no ``groups`` are known.
        noise_multiplier: the sigma that is agreed already; default: the smallest that fits.
        cross_check: also ask other accountants (some seconds).

    Guarantees:
        - ``plan.epsilon ≤ epsilon``, and all releases together cost no more units than (epsilon, delta) holds.

    Raises:
        ConfigError: with every value that is out of range.
        PrivacyError: ``noise_multiplier`` is too small, or another accountant disagrees.
    """
    _refuse(
        epsilon=(epsilon, 0, 1000),
        delta=(delta, 0, 1),
        rounds=(rounds, 0, inf),
        local_steps=(local_steps, 0, inf),
        reserve_rounds=(reserve_rounds, -1, inf),
        patients=(patients, 0, inf),
        parameters=(parameters, 0, inf),
        max_grad_norm=(max_grad_norm, 0, inf),
    )
    releases = (rounds + reserve_rounds) * local_steps
    needed = noise_multiplier_for(epsilon, delta, releases)
    sigma = needed if noise_multiplier is None else noise_multiplier
    unit = cost_units(sigma)
    if releases * unit > budget_units(epsilon, delta):
        raise PrivacyError(
            f"noise_multiplier={sigma!r} is too small for epsilon {epsilon:g}, delta {delta:g} over {releases} "
            f"releases; they need {needed:.6g}"
        )
    checks = cross_checks(sigma, releases, delta) if cross_check else None
    if checks is not None:
        agree(checks)
    if patients is not None:
        groups = [*groups, Group(_ANY, _ANY, patients, 1.0, parameters)]
    studied = epsilon_of(rounds * local_steps * unit, STUDY_DELTA)
    rows = _feasibility(sigma, rounds * local_steps, groups, studied)
    alone = epsilon_of(rounds * local_steps * unit, delta)
    return Plan(
        noise_multiplier=sigma,
        releases=releases,
        epsilon=min(float(epsilon), epsilon_of(releases * unit, delta)),  # in units it fits; the root is good to 1e-12
        epsilon_asked=float(epsilon),
        delta=delta,
        rounds=rounds,
        local_steps=local_steps,
        reserve_rounds=reserve_rounds,
        max_grad_norm=max_grad_norm,
        units_per_release=unit,
        units=releases * unit,
        epsilon_without_crash=min(float(epsilon), alone),
        epsilon_per_crash=epsilon_of((rounds + 1) * local_steps * unit, delta) - alone,
        feasibility=rows,
        cross_checks=checks,
        warnings=tuple(_warnings(delta, rows)),
    )


def plan_of_contract(contract: Contract, cross_check: bool = False) -> Plan:
    """The plan of an agreed run, with the contract's own sigma.

    Raises:
        ConfigError: privacy is off.
        PrivacyError: the contract's releases are not its rounds' and steps', or its sigma does not pay for them.
    """
    promise, steps = contract.promise, contract.training.local_epochs
    if promise.mode == "off":
        raise ConfigError("privacy: off has no budget to plan; plan a federation whose privacy.mode is dp")
    plan = make_plan(
        promise.epsilon,
        promise.delta,
        contract.rounds,
        steps,
        promise.reserve_rounds,
        max_grad_norm=promise.max_grad_norm,
        groups=_groups(contract),
        noise_multiplier=promise.noise_multiplier,
        cross_check=cross_check,
    )
    if promise.releases != plan.releases:
        raise PrivacyError(
            f"contract: promise.releases is {promise.releases}, but ({contract.rounds} rounds + "
            f"{promise.reserve_rounds} in reserve) · {steps} local epochs are {plan.releases}; make the contract anew"
        )
    return plan


def _groups(contract: Contract) -> list[Group]:
    """Every site with each of its heads, and with the trunk where that trains."""
    sizes: dict[str, int] = defaultdict(int)
    for name, shape in contract.shapes.items():
        sizes[specialty_of(name) or TRUNK.rstrip(".")] += prod(shape)
    groups = []
    for name, site in contract.sites.items():
        shares = {specialty: 1 / len(site.specialties) for specialty in site.specialties}
        parts = {TRUNK.rstrip("."): 1.0, **shares}
        groups += [
            Group(name, part, site.nominal_patients, share, sizes[part], site.weight)
            for part, share in parts.items()
            if part in sizes
        ]
    return groups


def _feasibility(sigma: float, steps: int, groups: Sequence[Group], studied: float) -> tuple[Feasibility, ...]:
    """Noise over signal of each group, alone and averaged; C cancels out. Reserve rounds are not steps taken.

    Args:
        studied: the epsilon that these steps amount to at the study's delta.
    """
    noise = {id(g): sigma * sqrt(g.parameters) / (g.nominal_patients * sqrt(steps)) for g in groups}
    together: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        together[group.specialty].append(group)
    federated = {
        # Equal sites: the ratio of one divided by √S.
        specialty: sqrt(sum((g.weight * noise[id(g)]) ** 2 for g in members)) / sum(g.weight * g.share for g in members)
        for specialty, members in together.items()
    }
    rows = []
    for g in groups:
        own, shared = noise[id(g)] / g.share, federated[g.specialty]
        verdict: Verdict = "too small to learn anything at this epsilon"
        if min(own, shared) <= 1:
            verdict = "may learn" if own <= 1 else "too small alone, may learn with the others"
        rows.append(
            Feasibility(
                site=g.site,
                specialty=g.specialty,
                nominal_patients=g.nominal_patients,
                estimated_patients=g.nominal_patients * g.share,
                parameters=g.parameters,
                noise_to_signal=own,
                sites=len(together[g.specialty]),
                federated_noise_to_signal=shared,
                verdict=verdict,
                expectation=None
                if g.specialty == TRUNK.rstrip(".")
                else expectation(g.nominal_patients * g.share, studied, len(together[g.specialty])),
            )
        )
    return tuple(rows)


def _warnings(delta: float, rows: Sequence[Feasibility]) -> list[str]:
    sizes = {row.site: row.nominal_patients for row in rows}
    found = [
        f"site {site}: delta {delta:g} is above 1/({_DELTA_SHARE}·{count}) = {1 / (_DELTA_SHARE * count):.3g}; "
        "lower privacy.delta"
        for site, count in sizes.items()
        if delta * _DELTA_SHARE * count > 1
    ]
    return found + [
        f"site {row.site}, {row.specialty}: the average over {row.sites} sites is noisier "
        f"({row.federated_noise_to_signal:.2g}) than this site alone ({row.noise_to_signal:.2g}); set "
        "aggregation.weights: nominal_patients, or leave out the smallest sites"
        for row in rows
        if row.sites > 1 and row.federated_noise_to_signal > row.noise_to_signal
    ]
