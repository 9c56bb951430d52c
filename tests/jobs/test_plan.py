"""From a federation's YAML to its plan, and the tables that show it."""

from pathlib import Path

import pytest
from rich.console import Console

from clinifed.errors import ConfigError
from clinifed.jobs.plan import plan_federation, plan_tables
from clinifed.privacy.accountant import noise_multiplier_for
from clinifed.privacy.plan import make_plan

CONFIGS = Path(__file__).parents[2] / "simulator_configs"


def shown(plan) -> str:
    console = Console(width=160)
    with console.capture() as captured:
        for table in plan_tables(plan):
            console.print(table)
    return captured.get()


def test_the_plan_of_a_configuration_is_that_of_its_contract():
    plan = plan_federation(CONFIGS / "three_hospitals.yaml")
    assert plan.releases == 30  # 10 rounds of 3 local epochs
    assert plan.noise_multiplier == noise_multiplier_for(1.0, 1e-5, 30)
    assert len(plan.feasibility) == 9
    assert {row.parameters for row in plan.feasibility} == {2 * 64 + 2, 3 * 64 + 3}
    text = shown(plan)
    assert "30 = 10 rounds · 3 steps" in text
    assert "university" in text
    assert "may learn" in text


def test_the_smallest_federation_is_told_that_it_cannot_learn():
    plan = plan_federation(CONFIGS / "smoke.yaml")
    assert {row.verdict for row in plan.feasibility} == {"too small to learn anything at this epsilon"}


def test_overrides_and_the_trunk_reach_the_plan():
    overrides = ["training.train=projection", "privacy.reserve_rounds=1", "rounds=4"]
    plan = plan_federation(CONFIGS / "smoke.yaml", overrides)
    assert (plan.releases, plan.rounds, plan.reserve_rounds) == (5, 4, 1)
    assert [row.specialty for row in plan.feasibility].count("trunk") == 3
    assert "5 = (4 + 1 in reserve) rounds" in shown(plan)


def test_without_privacy_there_is_nothing_to_plan():
    with pytest.raises(ConfigError, match=r"smoke.yaml: privacy: off"):
        plan_federation(CONFIGS / "smoke.yaml", ["privacy=off", "aggregation.norm_bound=1"])


def test_other_accountants_have_a_table_of_their_own():
    text = shown(make_plan(1.0, 1e-5, 50, patients=500, cross_check=True))
    assert "26.3795" in text
    for accountant in ("closed form", "PLDAccountant", "PRVAccountant", "RDPAccountant"):
        assert accountant in text
