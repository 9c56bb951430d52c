"""Settings of the aggregation that cannot mean what they say: found before a run, with key, value and remedy."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from clinifed.aggregators import RULES, rule_problems
from clinifed.messages import Update

from .rounds import SHAPES, SITES, TRUNK, one_round, sent, settings

FIVE_ALIKE = dict.fromkeys(("alder", "birch", "cedar", "dogwood", "elm"), ("radiology",))
TEN_ALIKE = {f"site-{number}": ("radiology",) for number in range(10)}
ROBUST = [name for name, rule in RULES.items() if rule.min_sites > 1]


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_with_sites_enough_and_default_settings_has_no_problem(rule):
    assert rule_problems(settings(rule, quorum=RULES[rule].min_sites), FIVE_ALIKE) == []


@pytest.mark.parametrize("rule", RULES)
def test_with_no_problem_every_parameter_can_change(rule):
    """And with one, a head does stand still: what is said is what happens."""
    own = {specialty for mine in SITES.values() for specialty in mine}
    change, _ = one_round(sent(1), settings(rule))
    still = {name.split(".")[1] for name in SHAPES if name != TRUNK and not change[name].any()} & own
    lines = rule_problems(settings(rule, quorum=RULES[rule].min_sites), SITES)
    assert {specialty for specialty in own if any(repr(specialty) in line for line in lines)} == still
    assert bool(still) == (rule in ROBUST)


@pytest.mark.parametrize(
    ("written", "near"),
    [("fedadm", "'fedadam'"), ("FedAvg", "'fedavg'"), ("trimmed_mean", "'trimmed-mean'"), ("krum", "fedavg, fedavgm")],
)
def test_an_unknown_rule_gets_the_nearest_valid_name(written, near):
    (problem,) = rule_problems(settings(written), FIVE_ALIKE)
    assert problem.startswith(f"aggregation.rule: {written!r} is not a rule")
    assert near in problem


@pytest.mark.parametrize("rule", ROBUST)
def test_too_few_sites_are_refused_in_total_or_in_a_specialty(rule):
    four = dict(list(FIVE_ALIKE.items())[:4])
    (total,) = rule_problems(settings(rule), four)
    assert total.startswith(f"aggregation.rule: {rule!r} needs 5 sites, here are 4; add sites")
    (one,) = rule_problems(settings(rule, quorum=5), {**FIVE_ALIKE, "fir": ("emergency",)})
    assert one.startswith(f"aggregation.rule: {rule!r} needs 5 sites for each head, 'emergency' has 1 (fir)")
    assert "fedavg" in one


@pytest.mark.parametrize("rule", ROBUST)
def test_with_no_problem_a_round_that_has_its_quorum_has_sites_enough_for_the_rule(rule):
    (problem,) = rule_problems(settings(rule, quorum=4), FIVE_ALIKE)
    assert problem.startswith("aggregation.quorum: 4 is less than the 5 sites")
    assert "raise it to 5" in problem


@pytest.mark.parametrize("rule", RULES)
def test_weights_without_effect_are_refused(rule):
    how = settings(rule, weights="nominal_patients", quorum=RULES[rule].min_sites)
    problems = rule_problems(how, FIVE_ALIKE)
    assert [p.startswith("aggregation.weights: 'nominal_patients' has no effect") for p in problems] == (
        [] if RULES[rule].weighted else [True]
    )


CHANGED = {
    "server_learning_rate": 0.5,
    "momentum": 0.5,
    "second_momentum": 0.9,
    "adaptivity": 0.1,
    "trim": 0.3,
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("key", CHANGED)
def test_with_no_problem_no_setting_is_without_effect(rule, key):
    plain, changed = settings(rule, quorum=5), settings(rule, quorum=5, **{key: CHANGED[key]})
    problems = rule_problems(changed, FIVE_ALIKE)

    def run(how):
        memory, changes = {}, []
        for number in range(2):  # the betas act on what is remembered
            updates = [Update(f"site-{i}", 0, {TRUNK: sent(100 * number + i)[0].params[TRUNK]}) for i in range(10)]
            change, memory = one_round(updates, how, memory, dict.fromkeys(TEN_ALIKE, 1.0))
            changes.append(change[TRUNK].tobytes())
        return changes

    if run(plain) != run(changed):
        assert problems == []
    else:
        (problem,) = problems
        assert problem.startswith(f"aggregation.{key}: {CHANGED[key]} has no effect under rule {rule!r}")
        assert "choose a rule that reads it" in problem


@hypothesis(max_examples=80, deadline=None)
@given(trim=st.integers(1, 49), quorum=st.integers(5, 10), heads=st.integers(1, 10), answers=st.integers(5, 10))
def test_with_no_problem_no_number_of_answers_stops_the_rule(trim, quorum, heads, answers):
    how = settings("trimmed-mean", trim=trim / 100, quorum=quorum, min_sites_per_head=heads)
    if answers >= quorum and not rule_problems(how, TEN_ALIKE):
        updates = [replace(update, site=f"site-{i}") for i, update in enumerate(sent(1, ["alder"] * answers))]
        change, _ = one_round(updates, how, {}, dict.fromkeys(TEN_ALIKE, 1.0))
        assert change[TRUNK].any()


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if "server_learning_rate" in rule.settings])
def test_a_setting_that_is_not_finite_is_refused(rule):
    for key in ("server_learning_rate", *(["adaptivity"] if "adaptivity" in RULES[rule].settings else [])):
        (problem,) = rule_problems(settings(rule, **{key: float("inf")}), FIVE_ALIKE)
        assert problem.startswith(f"aggregation.{key}: inf is not a finite number")


def test_a_trim_that_cuts_nobody_is_refused():
    (problem,) = rule_problems(settings("trimmed-mean", trim=0.19, quorum=5), FIVE_ALIKE)
    assert problem.startswith("aggregation.trim: 0.19 cuts nobody of 5 sites")
    assert "raise it to 0.2" in problem


@pytest.mark.parametrize(("quorum", "heads"), [(5, 1), (5, 10), (10, 1), (10, 5)])
def test_a_trim_is_judged_by_the_fewest_sites_that_may_count(quorum, heads):
    """Ten sites, but trunk or head may count with five."""
    how = settings("trimmed-mean", trim=0.1, quorum=quorum, min_sites_per_head=heads)
    (problem,) = rule_problems(how, TEN_ALIKE)
    assert "cuts nobody of 5 sites" in problem
    assert rule_problems(settings("trimmed-mean", trim=0.1, quorum=10, min_sites_per_head=10), TEN_ALIKE) == []


def test_a_trim_that_leaves_nobody_is_refused():
    how = settings("trimmed-mean", quorum=6, min_sites_per_head=6).model_copy(update={"trim": 0.5})
    (problem,) = rule_problems(how, TEN_ALIKE)
    assert problem == "aggregation.trim: 0.5 leaves nobody of 6 sites; lower it below 0.5"


@pytest.mark.parametrize("rule", RULES)
def test_a_head_that_could_never_be_released_is_refused(rule):
    how = settings(rule, min_sites_per_head=6, quorum=RULES[rule].min_sites)
    sites = {**FIVE_ALIKE, "fir": ("radiology",)}
    assert rule_problems(how, sites) == []
    (problem,) = rule_problems(how, FIVE_ALIKE)
    assert problem.startswith("aggregation.min_sites_per_head: 6 is more than the 5 sites of 'radiology' (alder, birch")
    assert "lower it" in problem


def test_every_problem_is_told_at_once():
    how = settings("trimmed-mean", weights="nominal_patients", momentum=0.1, trim=0.05, min_sites_per_head=7)
    keys = [line.split(":")[0].removeprefix("aggregation.") for line in rule_problems(how, SITES)]
    assert keys == ["rule", "quorum", *["min_sites_per_head"] * 3, "weights", "momentum", "trim"]
    assert len(rule_problems(settings("krum", min_sites_per_head=7), SITES)) == 4
