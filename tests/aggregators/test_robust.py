"""Median and trimmed mean: against plain references, and against sites that do not mean well."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from clinifed.aggregators import RULES
from clinifed.aggregators.robust import cut_at_each_end, median, trimmed_mean
from clinifed.errors import ConfigError

from .rounds import FIVE, FULL, SHAPES, SITES, TRUNK, TWO, one_round, sent, settings

ROBUST = [name for name, rule in RULES.items() if rule.min_sites > 1]
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def plain_median(numbers):
    ordered = sorted(numbers)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def plain_trimmed_mean(numbers, cut=1):
    left = list(numbers)
    for _ in range(cut):
        left.remove(max(left))
        left.remove(min(left))
    return sum(left) / len(left)


@pytest.mark.parametrize(("rule", "reference"), [("median", plain_median), ("trimmed-mean", plain_trimmed_mean)])
@pytest.mark.parametrize("sites", [5, 6])
def test_a_robust_rule_equals_a_plain_reference(rule, reference, sites):
    updates = sent(5, list(SITES)[:sites])
    change, memory = one_round(updates, settings(rule))
    assert memory == {}
    for name in (TRUNK, FULL, FIVE):
        for position in np.ndindex(SHAPES[name]):
            expected = reference([float(u.params[name][position]) for u in updates if name in u.params])
            assert change[name][position] == pytest.approx(expected, rel=1e-5, abs=1e-8)
    assert not change[TWO].any()


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_trim_cuts_that_many_at_each_end(cut):
    values = np.random.default_rng(cut).normal(size=(10, 3)).astype(np.float32)
    got = trimmed_mean(list(values), [1.0] * 10, settings("trimmed-mean", trim=cut / 10))
    expected = [plain_trimmed_mean([float(v) for v in column], cut) for column in values.T]
    assert np.allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize("hostile", SITES)
def test_a_site_at_minus_a_hundred_times_its_update_drags_no_coordinate_out_of_the_honest_range(rule, hostile):
    updates = sent(6, scale=1.0)
    attacker = next(u for u in updates if u.site == hostile)
    honest = [u for u in updates if u is not attacker]
    attacker.params.update({name: value * np.float32(-100) for name, value in attacker.params.items()})
    change, _ = one_round(updates, settings(rule))
    mean, _ = one_round(updates, settings("fedavg"))
    names = [name for name in (TRUNK, FULL, FIVE) if sum(name in u.params for u in updates) > 4]
    for name in names:
        values = np.stack([u.params[name] for u in honest if name in u.params])
        assert (values.min(axis=0) <= change[name]).all()
        assert (change[name] <= values.max(axis=0)).all()
        if name in attacker.params:  # it is the rule that holds, and not a weak attack
            assert ((mean[name] < values.min(axis=0)) | (mean[name] > values.max(axis=0))).any()


@hypothesis(max_examples=80, deadline=None)
@given(honest=st.lists(FINITE, min_size=3, max_size=7), data=st.data())
def test_a_hostile_minority_leaves_the_median_in_the_honest_range(honest, data):
    hostile = data.draw(st.lists(FINITE, min_size=0, max_size=len(honest) - 1))
    mixed = data.draw(st.permutations([*honest, *hostile]))
    got = median([np.array(v, np.float32) for v in mixed], [1.0] * len(mixed), settings("median"))
    assert min(honest) <= got.astype(np.float32) <= max(honest)


@hypothesis(max_examples=80, deadline=None)
@given(sites=st.integers(5, 11), trim=st.sampled_from([0.2, 0.3, 0.4, 0.45]), data=st.data())
def test_no_more_hostile_sites_than_are_cut_leave_the_trimmed_mean_in_the_honest_range(sites, trim, data):
    number = data.draw(st.integers(0, cut_at_each_end(trim, sites)))
    hostile = data.draw(st.lists(FINITE, min_size=number, max_size=number))
    honest = data.draw(st.lists(FINITE, min_size=sites - number, max_size=sites - number))
    mixed = [np.array(v, np.float32) for v in data.draw(st.permutations([*honest, *hostile]))]
    got = trimmed_mean(mixed, [1.0] * sites, settings("trimmed-mean", trim=trim))
    assert min(honest) <= got.astype(np.float32) <= max(honest)


def test_a_share_is_taken_as_it_is_written():
    assert [cut_at_each_end(0.2, sites) for sites in (5, 9, 10, 14, 15)] == [1, 1, 2, 2, 3]
    assert int(0.29 * 100) == 28  # what floats make of it
    assert cut_at_each_end(0.29, 100) == 29


@pytest.mark.parametrize(
    ("trim", "sites", "said"), [(0.1, 9, r"cuts nobody of 9.*raise it to 0\.12"), (0.5, 6, "leaves nobody of 6")]
)
def test_a_trim_that_cuts_nobody_or_leaves_nobody_is_refused(trim, sites, said):
    with pytest.raises(ConfigError, match=said):
        cut_at_each_end(trim, sites)
    how = settings("trimmed-mean").model_copy(update={"trim": trim})
    with pytest.raises(ConfigError, match=r"aggregation\.trim"):
        trimmed_mean([np.zeros(1, np.float32)] * sites, [1.0] * sites, how)


@pytest.mark.parametrize("trim", [t / 100 for t in range(1, 50)])
def test_the_trim_that_the_message_names_is_enough(trim):
    for sites in range(5, 40):
        try:
            cut_at_each_end(trim, sites)
        except ConfigError as error:
            named = float(str(error).split("raise it to ")[1].split()[0])
            assert cut_at_each_end(named, sites) == 1
            assert trim < named
