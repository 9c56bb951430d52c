"""What a plan quotes: the nearest case of the study that is no larger, and never one that is."""

import json
from importlib.resources import files

import pytest

from clinifed.privacy.accountant import epsilon_of
from clinifed.privacy.expectations import STUDY_DELTA, expectation, study
from clinifed.privacy.plan import Group, make_plan

CELLS = study()["cells"]
AXES = {key: sorted({cell[key] for cell in CELLS}) for key in ("patients", "epsilon", "sites")}


def test_the_study_is_a_whole_grid_at_its_delta():
    assert study()["delta"] == STUDY_DELTA
    assert len(CELLS) == len(AXES["patients"]) * len(AXES["epsilon"]) * len(AXES["sites"]) == 36
    assert len({(c["patients"], c["epsilon"], c["sites"]) for c in CELLS}) == 36
    assert all(0 < c["balanced_accuracy"] < 1 and c["interval"] > 0 for c in CELLS)
    assert json.loads(files("clinifed.privacy").joinpath("expectations.json").read_text()) == study()


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: f"{c['patients']}-{c['epsilon']:g}-{c['sites']}")
def test_no_cell_of_more_patients_epsilon_or_sites_is_ever_quoted(cell):
    asked = cell["patients"], cell["epsilon"], cell["sites"]
    found = expectation(*asked)
    assert found is not None
    assert (found.patients, found.epsilon, found.sites, found.balanced_accuracy) == (*asked, cell["balanced_accuracy"])
    for axis, name in enumerate(AXES):
        less = list(asked)
        less[axis] = less[axis] * 0.99
        nearest = expectation(*less)
        assert nearest is None or getattr(nearest, name) < asked[axis]
        assert (nearest is None) == (asked[axis] == AXES[name][0])


def test_beyond_the_study_its_largest_case_is_quoted_and_nothing_is_promised_on_top():
    largest = expectation(10**9, 100.0, 10**6)
    assert largest is not None
    assert (largest.patients, largest.epsilon, largest.sites) == tuple(AXES[name][-1] for name in AXES)


def test_a_plan_quotes_by_patients_of_the_specialty_and_by_what_the_noise_amounts_to():
    groups = [Group(site, "radiology", 1000, 0.5, 260) for site in ("alder", "birch", "cedar")]
    plan = make_plan(3.0, 1e-5, rounds=20, groups=groups)
    found = plan.feasibility[0].expectation
    assert found is not None
    assert (found.patients, found.epsilon, found.sites) == (500, 3.0, 3)
    assert plan.to_dict()["feasibility"][0]["expectation"]["source"] == "synthetic embeddings study"
    smaller = make_plan(3.0, 1e-7, rounds=20, groups=groups)  # more noise: less than epsilon 3 at the study's delta
    assert epsilon_of(smaller.units, STUDY_DELTA) < 3
    assert smaller.feasibility[0].expectation.epsilon == 1.0
    reserved = make_plan(3.0, 1e-5, rounds=20, reserve_rounds=20, groups=groups)  # half of it is never spent
    assert reserved.feasibility[0].expectation.epsilon == 1.0


def test_what_is_smaller_than_the_study_and_trunks_get_no_expectation():
    plan = make_plan(1.0, 1e-5, rounds=20, groups=[Group("alder", "radiology", 99, 1.0, 260)])
    assert plan.feasibility[0].expectation is None
    trunk = make_plan(3.0, 1e-5, rounds=20, groups=[Group("alder", "trunk", 5000, 1.0, 260)])
    assert trunk.feasibility[0].expectation is None
