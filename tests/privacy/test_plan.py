"""The plan: one sigma for all releases, never above the budget, and an outlook that agrees with what was measured."""

import json
from collections.abc import Callable

import pytest

from clinifed.config import Aggregation, Specialty, Training
from clinifed.contract import BaseModelRef, Contract, ContractSite, Promise
from clinifed.errors import ConfigError, PrivacyError
from clinifed.privacy.accountant import budget_units, noise_multiplier_for
from clinifed.privacy.plan import Group, Plan, make_plan, plan_of_contract

DELTA = 1e-5
TWO, THREE = 2 * 64 + 2, 3 * 64 + 3  # parameters of a head on 64 dimensions
NO, ALONE_NO, YES = (
    "too small to learn anything at this epsilon",
    "too small alone, may learn with the others",
    "may learn",
)
Build = Callable[..., Contract]


@pytest.fixture
def contract() -> Build:
    """Two hospitals, two heads on 64 dimensions; keyword arguments change the promise or the contract."""

    def build(promise: dict[str, object] | None = None, **changes: object) -> Contract:
        labels = {"normal": ("a normal image",), "abnormal": ("an abnormal image",)}
        agreed = {
            "federation": "unit",
            "clinifed_version": "0",
            "base_model": BaseModelRef(ref="tiny", sha256="0" * 64),
            "specialties": {name: Specialty(labels=labels) for name in ("cardiology", "radiology")},
            "training": Training(local_epochs=2),
            "promise": Promise(
                **{
                    "mode": "dp",
                    "epsilon": 1.0,
                    "delta": DELTA,
                    "noise_multiplier": noise_multiplier_for(1.0, DELTA, 12),
                    "max_grad_norm": 1.0,
                    "reserve_rounds": 1,
                    "releases": 12,
                    "objective": "cross-entropy",
                    **(promise or {}),
                }
            ),
            "rounds": 5,
            "min_clients": 2,
            "max_clients": 2,
            "aggregation": Aggregation(quorum=2, round_timeout_s=60),
            "sites": {
                "alder": ContractSite(
                    specialties=("cardiology", "radiology"), nominal_patients=200, weight=1.0, norm_bound=1
                ),
                "birch": ContractSite(specialties=("radiology",), nominal_patients=100, weight=1.0, norm_bound=1),
            },
            "shapes": {
                "heads.cardiology.weight": (2, 64),
                "heads.cardiology.bias": (2,),
                "heads.radiology.weight": (2, 64),
                "heads.radiology.bias": (2,),
            },
            **changes,
        }
        return Contract.model_validate(agreed)

    return build


def test_fifty_rounds_at_epsilon_1_have_the_published_sigma() -> None:
    said = make_plan(epsilon=1, delta=DELTA, rounds=50).to_dict()
    assert said["noise_multiplier"] == pytest.approx(26.38, abs=0.005)
    assert said["releases"] == 50
    assert isinstance(said["epsilon"], float)
    assert 1 - 1e-6 < said["epsilon"] <= 1.0
    assert (said["unit"], said["relation"]) == ("patient", "add_remove")
    assert json.loads(json.dumps(said, allow_nan=False))["feasibility"] == []


@pytest.mark.parametrize("epsilon", [0.01, 0.3, 1.0, 3.0, 8.0, 50.0])
@pytest.mark.parametrize(("rounds", "steps", "reserve"), [(1, 1, 0), (7, 3, 0), (50, 2, 5)])
def test_all_releases_with_the_reserve_stay_within_what_was_asked(
    epsilon: float, rounds: int, steps: int, reserve: int
) -> None:
    plan = make_plan(epsilon, DELTA, rounds, steps, reserve)
    assert plan.releases == (rounds + reserve) * steps
    assert plan.units == plan.releases * plan.units_per_release <= budget_units(epsilon, DELTA)
    assert plan.epsilon <= epsilon
    assert plan.epsilon == pytest.approx(epsilon, abs=1e-6)
    assert (plan.epsilon_without_crash < plan.epsilon) == (reserve > 0)


def test_a_crashed_round_loses_a_fiftieth_of_the_squared_budget() -> None:
    assert make_plan(1.0, DELTA, 50).epsilon_per_crash == pytest.approx(0.011, abs=5e-4)
    reserved = make_plan(1.0, DELTA, 50, reserve_rounds=5)
    assert reserved.epsilon_without_crash + 5 * reserved.epsilon_per_crash == pytest.approx(reserved.epsilon, abs=1e-3)


def test_the_noise_is_what_the_closed_form_says_for_500_patients() -> None:
    # Noise of the run-averaged gradient per coordinate: .00747 at 500 patients, epsilon 1, whatever the rounds.
    for rounds in (20, 50, 300):
        row = make_plan(1.0, DELTA, rounds, patients=500, parameters=1).feasibility[0]
        assert row.noise_to_signal == pytest.approx(0.00747, rel=2e-3)
    assert make_plan(1.0, DELTA, 50, patients=500).feasibility[0].parameters == 1026
    assert make_plan(1.0, DELTA, 50, patients=500, parameters=2048).feasibility[0].noise_to_signal == pytest.approx(
        0.34, abs=0.005
    )


@pytest.mark.parametrize(
    ("epsilon", "patients", "parameters", "verdict"),
    [
        (1.0, 25, THREE, NO),  # federated .643, below the zero-shot .665
        (1.0, 25, TWO, ALONE_NO),  # alone .581, federated .626; zero-shot .611
        (3.0, 25, TWO, YES),  # federated .629
        (3.0, 50, THREE, YES),  # alone .687, federated .736; zero-shot .665
        (1.0, 100, TWO, YES),  # alone .627, federated .636
    ],
)
def test_the_verdicts_agree_with_what_was_measured_at_four_sites(
    epsilon: float, patients: int, parameters: int, verdict: str
) -> None:
    groups = [Group(f"s{i}", "any", 4 * patients, 0.25, parameters) for i in range(4)]
    row = make_plan(epsilon, DELTA, 20, groups=groups).feasibility[0]
    assert row.verdict == verdict
    assert row.estimated_patients == patients
    assert row.federated_noise_to_signal == pytest.approx(row.noise_to_signal / 2)  # √4 equal sites


def test_a_tiny_site_makes_an_average_with_equal_weights_noisier() -> None:
    def plan(small: float, large: float) -> Plan:
        sizes = (("small", 10, small), ("large", 200, large))
        return make_plan(1.0, DELTA, 20, groups=[Group(n, "any", p, 1.0, TWO, w) for n, p, w in sizes])

    equal, weighted = plan(1.0, 1.0), plan(10.0, 200.0)
    assert [w.split(",")[0] for w in equal.warnings] == ["site large"]
    assert "nominal_patients" in equal.warnings[0]
    assert weighted.feasibility[1].federated_noise_to_signal < equal.feasibility[1].federated_noise_to_signal


def test_a_contract_gives_a_row_for_every_site_and_specialty(contract: Build) -> None:
    plan = plan_of_contract(contract())
    assert (plan.releases, plan.rounds, plan.local_steps, plan.reserve_rounds) == (12, 5, 2, 1)
    rows = {(r.site, r.specialty): r for r in plan.feasibility}
    assert list(rows) == [("alder", "cardiology"), ("alder", "radiology"), ("birch", "radiology")]
    assert {r.parameters for r in plan.feasibility} == {TWO}
    assert [r.estimated_patients for r in plan.feasibility] == [100, 100, 100]
    assert [r.sites for r in plan.feasibility] == [1, 2, 2]


def test_a_projection_that_trains_has_a_row_of_all_patients(contract: Build) -> None:
    shapes = {"trunk.projection.weight": (64, 64), "heads.radiology.weight": (2, 64), "heads.radiology.bias": (2,)}
    birch = ContractSite(specialties=("radiology",), nominal_patients=100, weight=1.0, norm_bound=1)
    sites = {"birch": birch, "alder": birch}
    rows = {r.specialty: r for r in plan_of_contract(contract(shapes=shapes, sites=sites)).feasibility}
    assert {name: r.parameters for name, r in rows.items()} == {"trunk": 4096, "radiology": TWO}
    assert rows["trunk"].estimated_patients == 100


def test_a_delta_too_large_for_a_site_is_a_warning_with_both_numbers(contract: Build) -> None:
    sigma = noise_multiplier_for(1.0, 9e-4, 12)
    plan = plan_of_contract(contract({"delta": 9e-4, "noise_multiplier": sigma}))
    assert [w for w in plan.warnings if "delta" in w] == [
        "site alder: delta 0.0009 is above 1/(10·200) = 0.0005; lower privacy.delta"
    ]


def test_a_contract_whose_sigma_or_releases_are_wrong_is_refused(contract: Build) -> None:
    with pytest.raises(PrivacyError, match="too small for epsilon 1"):
        plan_of_contract(contract({"noise_multiplier": noise_multiplier_for(1.0, DELTA, 2)}))
    with pytest.raises(PrivacyError, match=r"releases is 5, but \(5 rounds \+ 1 in reserve\) · 2 local epochs are 12"):
        plan_of_contract(contract({"releases": 5}))
    with pytest.raises(ConfigError, match="privacy: off"):
        plan_of_contract(contract({"mode": "off", "noise_multiplier": 0.0}))


def test_more_noise_than_needed_is_reported_as_it_is(contract: Build) -> None:
    plan = plan_of_contract(contract({"noise_multiplier": 50.0}))
    assert plan.noise_multiplier == 50.0
    assert plan.epsilon < 0.5


def test_other_accountants_are_asked_only_where_wished() -> None:
    assert make_plan(1.0, DELTA, 50).cross_checks is None
    said = make_plan(1.0, DELTA, 50, cross_check=True).to_dict()["cross_checks"]
    assert said["pld"]["epsilon"] == pytest.approx(1.0, rel=1e-4)
    assert set(said["prv"]) == {"accountant", "version", "epsilon", "reason"}


def test_every_wrong_value_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        make_plan(0, 1, 0, local_steps=0, reserve_rounds=-1, patients=0, parameters=0, max_grad_norm=float("nan"))
    assert [p.split("=")[0] for p in refused.value.problems] == [
        "epsilon",
        "delta",
        "rounds",
        "local_steps",
        "reserve_rounds",
        "patients",
        "parameters",
        "max_grad_norm",
    ]
    assert refused.value.problems[0] == "epsilon=0: give a number above 0 and below 1000"
