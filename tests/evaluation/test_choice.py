"""One of several models by a small held-out set: the default, unless another is better beyond chance."""

import numpy as np
import pytest
from scipy.special import expit, softmax

from clinifed.errors import DataError
from clinifed.evaluation.choice import choose, patient_logits
from clinifed.evaluation.intervals import paired_differences
from clinifed.evaluation.metrics import multi_label_scores, patient_scores

PATIENTS = 60
LABEL = np.arange(PATIENTS) % 2


def right_for(share: float, seed: int = 0) -> np.ndarray:
    """Logits that are right for that share of patients."""
    rng = np.random.default_rng(seed)
    right = rng.permutation(PATIENTS) < round(share * PATIENTS)
    decision = np.where(right, LABEL, 1 - LABEL)
    return 4.0 * np.eye(2)[decision] + rng.normal(0, 0.1, (PATIENTS, 2))


def chosen(candidates, **options):
    return choose(candidates, "global", np.arange(PATIENTS), LABEL, **options)


def test_the_default_stays_where_none_is_better_beyond_chance():
    found = chosen({"global": right_for(0.70), "local-only": right_for(0.75, 1), "in-house": right_for(0.6, 2)})
    assert found.chosen == "global"
    assert found.differences["local-only"].covers_zero
    assert found.patients == PATIENTS
    assert "none is better" in found.reason


def test_the_best_of_those_that_are_better_beyond_chance_is_chosen():
    found = chosen({"global": right_for(0.5), "local-only": right_for(0.8, 1), "in-house": right_for(0.95, 2)})
    assert found.chosen == "in-house"


def test_a_single_patient_decides_nothing():
    one = np.zeros(4, dtype=np.int64)
    label = np.array([0, 1, 0, 1])
    wrong, right = 4.0 * np.eye(2)[1 - label], 4.0 * np.eye(2)[label]
    assert choose({"global": wrong, "in-house": right}, "global", one, label).chosen == "global"


def test_many_variants_win_by_luck_less_often_than_one_would():
    """The level of variants is Bonferroni's: a lead that would do for one is not enough for the best of many."""
    lead = {"global": right_for(0.6), "in-house": right_for(0.78, 1)}
    single = chosen(lead).differences["in-house"]
    many = {**lead, **{f"v{i}": right_for(0.6, i + 2) for i in range(9)}}
    strict = chosen(many, variants=("in-house", *(f"v{i}" for i in range(9)))).differences["in-house"]
    assert strict.low < single.low
    assert strict.difference == single.difference


@pytest.mark.parametrize("seed", range(8))
def test_the_chosen_one_is_not_worse_than_the_named_one_beyond_its_interval(seed):
    rng = np.random.default_rng(seed)
    names = ("zero-shot", "global", "local-only", "in-house")
    candidates = {name: right_for(float(rng.uniform(0.4, 1)), seed * 10 + i) for i, name in enumerate(names)}
    found = chosen(candidates, variants=("in-house",), never_worse_than="local-only")
    picked, local = candidates[found.chosen], candidates["local-only"]
    lead = paired_differences(picked, local, LABEL, list(range(PATIENTS)))["balanced_accuracy"]
    assert lead.low <= 0


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_patients_row_says_what_the_mean_over_the_patients_images_says(multi_label):
    rng = np.random.default_rng(3)
    logits, patient = rng.normal(0, 2, (200, 3)), rng.integers(0, 40, 200)
    label = rng.integers(0, 8 if multi_label else 3, 40)[patient]
    rows, whose, truth = patient_logits(logits, patient, label, multi_label=multi_label)
    assert len(rows) == len(np.unique(patient))
    squash = expit if multi_label else lambda z: softmax(z, axis=1)
    mean = np.stack([squash(logits)[patient == p].mean(axis=0) for p in whose])
    assert squash(rows) == pytest.approx(mean, abs=1e-9)
    figures = multi_label_scores if multi_label else patient_scores
    said = paired_differences(rows, rows, truth, multi_label=multi_label, replicates=10)["balanced_accuracy"]
    assert said.reference == pytest.approx(figures(logits, patient, label).balanced_accuracy)


def test_an_unknown_name_or_an_empty_set_is_refused():
    with pytest.raises(DataError, match="no candidate"):
        chosen({"global": right_for(0.5)}, variants=("absent",))
    empty = np.zeros((0, 2)), np.zeros(0, dtype=np.int64)
    with pytest.raises(DataError, match="no held-out image"):
        choose({"global": empty[0]}, "global", empty[1], empty[1])
