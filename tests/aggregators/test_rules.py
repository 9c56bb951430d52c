"""Aggregation rules: what holds for every entry of the registry, and where it says that it does not."""

import tracemalloc
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from clinifed.aggregators import RULES, aggregate
from clinifed.errors import ConfigError, FederationError, UpdateError
from clinifed.messages import Update, specialty_of

from .rounds import FIVE, FULL, NONE, SHAPES, SITES, TRUNK, TWO, WEIGHTS, bits, equal, one_round, sent, settings

all_rules = pytest.mark.parametrize("rule", RULES)
remembering = pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.memory])
weighted = pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.weighted])


def same(one, other) -> bool:
    return all(np.allclose(one[name], other[name], rtol=1e-5, atol=1e-7) for name in SHAPES)


@all_rules
def test_every_shared_parameter_gets_a_change_of_its_shape_in_float32(rule):
    change, memory = one_round(sent(1), settings(rule))
    assert {name: value.shape for name, value in change.items()} == SHAPES
    assert all(isinstance(v, np.ndarray) and v.dtype == np.float32 for v in [*change.values(), *memory.values()])
    stepped = [name for name, value in change.items() if value.any()]
    assert set(memory) == {f"{slot}.{name}" for slot in RULES[rule].memory for name in stepped}
    assert TRUNK in stepped


@all_rules
def test_the_order_of_arrival_changes_no_bit(rule):
    how = settings(rule)
    first = one_round(sent(1), how)
    expected = bits(first) + bits(one_round(sent(2), how, first[1]))
    for order in list(permutations(range(len(SITES))))[::37]:
        turned = one_round([sent(1)[i] for i in order], how)
        assert bits(turned) + bits(one_round([sent(2)[i] for i in order], how, turned[1])) == expected


@all_rules
def test_each_parameter_is_combined_over_exactly_the_sites_that_sent_it(rule):
    """A site that did not send a parameter has no say in it, whatever it sends beside and however it weighs."""
    how = settings(rule)
    plain, _ = one_round(sent(1), how)
    heavier = {site: weight * (50 if site == "fir" else 1) for site, weight in WEIGHTS.items()}  # sends no dermatology
    loud, _ = one_round(sent(1), how, weights=heavier)
    assert loud[FIVE].tobytes() == plain[FIVE].tobytes()
    others, _ = one_round([update for update in sent(1) if update.site != "fir"], how)
    assert others[FIVE].tobytes() == plain[FIVE].tobytes()
    assert others[FULL].tobytes() != plain[FULL].tobytes()


@all_rules
def test_equal_updates_come_out_as_they_are_where_the_rule_says_so(rule):
    how, memory, kept = settings(rule), {}, []
    for _ in range(2):
        change, memory = one_round(equal(0.3), how, memory)
        kept += [np.array_equal(change[name], np.full(SHAPES[name], 0.3, np.float32)) for name in (TRUNK, FULL, FIVE)]
    assert all(kept) == RULES[rule].keeps_equal


@all_rules
def test_the_change_is_linear_in_the_updates_where_the_rule_says_so(rule):
    def add(one: Update, other: Update) -> Update:
        return replace(one, params={n: 2 * v - 3 * other.params[n] for n, v in one.params.items()})

    how = settings(rule)
    left, right = one_round(sent(1), how)[0], one_round(sent(2), how)[0]
    both, _ = one_round([add(*pair) for pair in zip(sent(1), sent(2), strict=True)], how)
    assert same(both, {n: 2 * left[n] - 3 * right[n] for n in SHAPES}) == RULES[rule].linear


@all_rules
def test_only_the_ratio_of_weights_counts(rule):
    how = settings(rule)
    scaled = {site: 7e3 * weight for site, weight in WEIGHTS.items()}
    assert same(one_round(sent(1), how)[0], one_round(sent(1), how, weights=scaled)[0])


@all_rules
def test_weights_are_read_where_the_rule_says_so(rule):
    how = settings(rule)
    flat = dict.fromkeys(WEIGHTS, 1.0)
    differ = bits(one_round(sent(1), how)) != bits(one_round(sent(1), how, weights=flat))
    assert differ == RULES[rule].weighted


@weighted
def test_a_weight_of_two_counts_as_two_sites(rule):
    how, flat = settings(rule), dict.fromkeys(WEIGHTS, 1.0)
    twins = [*sent(1), replace(sent(1)[2], site="twin")]
    expected, _ = one_round(twins, how, weights={**flat, "twin": 1.0})
    assert same(one_round(sent(1), how, weights={**flat, twins[2].site: 2.0})[0], expected)


@all_rules
@hypothesis(max_examples=40, deadline=None)
@given(data=st.data())
def test_no_combination_leaves_the_range_of_what_was_sent(rule, data):
    number = data.draw(st.integers(5, 8))
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    values = np.array([data.draw(st.lists(finite, min_size=2, max_size=2)) for _ in range(number)], np.float32)
    weights = data.draw(st.lists(st.floats(0.125, 1e4), min_size=number, max_size=number))
    combined = RULES[rule].combine(list(values), weights, settings(rule)).astype(np.float32)
    assert (values.min(axis=0) <= combined).all()
    assert (combined <= values.max(axis=0)).all()


@all_rules
def test_a_parameter_nobody_sent_changes_by_zero_and_its_memory_stays(rule):
    how = settings(rule)
    _, memory = one_round(sent(1), how)
    change, after = one_round(sent(2, ("alder", "cedar", "dogwood", "elm")), how, memory)
    assert not change[NONE].any()
    assert not change[TWO].any()
    for slot in RULES[rule].memory:
        assert after[f"{slot}.{TWO}"].tobytes() == memory[f"{slot}.{TWO}"].tobytes()
        assert after[f"{slot}.{FULL}"].tobytes() != memory[f"{slot}.{FULL}"].tobytes()


@all_rules
def test_no_update_at_all_changes_nothing_and_the_memory_stays(rule):
    _, memory = one_round(sent(1), settings(rule))
    change, after = one_round([], settings(rule), memory)
    assert list(change) == list(SHAPES)
    assert not any(value.any() for value in change.values())
    assert bits(({}, after)) == bits(({}, memory))


@all_rules
def test_a_head_that_fewer_than_min_sites_per_head_sent_changes_by_zero_and_its_memory_stays(rule):
    _, memory = one_round(sent(1), settings(rule))
    change, after = one_round(sent(2), settings(rule, min_sites_per_head=6), memory)
    assert not change[FIVE].any()
    for name in (FULL, TRUNK):  # six sites sent the one, and the trunk is no head
        assert change[name].any()
    for slot in RULES[rule].memory:
        assert after[f"{slot}.{FIVE}"].tobytes() == memory[f"{slot}.{FIVE}"].tobytes()
    alone, _ = one_round(sent(2, list(SITES)[: RULES[rule].min_sites]), settings(rule, min_sites_per_head=6))
    assert alone[TRUNK].any()
    assert not any(value.any() for name, value in alone.items() if specialty_of(name))


@all_rules
def test_a_parameter_that_fewer_than_the_rules_min_sites_sent_changes_by_zero(rule):
    needed = RULES[rule].min_sites
    for number in range(len(SITES) + 1):
        change, _ = one_round(sent(1, list(SITES)[:number]), settings(rule))
        assert change[TRUNK].any() == change[FULL].any() == (number >= needed)


@all_rules
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(rule, value):
    updates = sent(1)
    for broken, name in ((updates[1], FULL), (updates[4], TRUNK)):
        broken.params[name][-1, -1] = value
    with pytest.raises(UpdateError, match=r"birch: heads\.radiology\.weight(.|\n)*elm: trunk") as caught:
        one_round(updates, settings(rule))
    assert caught.value.reason == "not_finite"
    assert len(caught.value.problems) == 2


@remembering
def test_what_the_server_optimiser_would_make_infinite_is_refused(rule):
    largest, how = float(np.finfo(np.float32).max), settings(rule)
    with pytest.raises(UpdateError, match=f"{TRUNK}: {rule} over alder, birch") as caught:
        one_round(equal(largest), how, one_round(equal(largest), how)[1])  # momentum needs two, a square one
    assert caught.value.reason == "not_finite"
    with pytest.raises(UpdateError, match="server_learning_rate"):
        one_round(equal(1e3), settings(rule, server_learning_rate=float("inf")))


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if not rule.memory])
def test_the_largest_float32_is_no_reason_to_refuse_where_nothing_is_remembered(rule):
    largest = float(np.finfo(np.float32).max)
    assert (one_round(equal(largest), settings(rule))[0][TRUNK] == np.float32(largest)).all()


@all_rules
def test_memory_of_unknown_names_is_refused(rule):
    _, memory = one_round(sent(1), settings(rule))
    for stranger in ("momentum.heads.cardiology.bias", "third_momentum." + TRUNK, TRUNK):
        with pytest.raises(FederationError, match=f"'{stranger}' is not remembered by rule '{rule}'"):
            one_round(sent(2), settings(rule), {**memory, stranger: np.zeros((3, 4), np.float32)})


@all_rules
def test_memory_of_another_rule_is_refused(rule):
    for other in RULES:
        _, memory = one_round(sent(1), settings(other))
        if memory and RULES[other].memory != RULES[rule].memory:
            with pytest.raises(FederationError, match="the server optimiser's memory"):
                one_round(sent(2), settings(rule), memory)


@remembering
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda v: v.astype(np.float64), "float64"),
        (lambda v: v[:1], r"\(1, 4\)"),
        (lambda v: v * np.float32("nan"), "NaN"),
    ],
)
def test_memory_that_is_not_whole_is_refused(rule, spoil, said):
    _, memory = one_round(sent(1), settings(rule))
    for slot in RULES[rule].memory:
        key = f"{slot}.{TRUNK}"
        with pytest.raises(FederationError, match=said):
            one_round(sent(2), settings(rule), {**memory, key: spoil(memory[key])})
        rest = {name: value for name, value in memory.items() if name != key}
        if len(RULES[rule].memory) > 1:
            with pytest.raises(FederationError, match=f"stands without {key}"):
                one_round(sent(2), settings(rule), rest)


@all_rules
def test_a_memory_that_was_saved_and_read_back_continues_to_the_same_bits(rule, tmp_path):
    how, kept, read = settings(rule), {}, {}
    for number in range(4):
        at_once = one_round(sent(number), how, kept)
        resumed = one_round(sent(number), how, read)
        assert bits(at_once) == bits(resumed)
        kept = at_once[1]
        save_file(resumed[1], tmp_path / f"{number}.safetensors")
        read = load_file(tmp_path / f"{number}.safetensors")
    assert bool(read) == bool(RULES[rule].memory)


@all_rules
def test_what_is_given_is_not_changed(rule):
    how, updates = settings(rule), sent(2)
    _, memory = one_round(sent(1), how)
    before = bits((memory, {})), [bits((update.params, {})) for update in updates]
    one_round(updates, how, memory)
    assert (bits((memory, {})), [bits((update.params, {})) for update in updates]) == before
    for value in [*memory.values(), *(value for update in updates for value in update.params.values())]:
        value.flags.writeable = False
    one_round(updates, how, memory)


@all_rules
def test_one_parameter_at_a_time_is_held_in_float64(rule):
    number, size, sites = 40, 20_000, ("alder", "birch", "cedar", "dogwood", "elm", "fir")
    shapes = {f"trunk.{i}": (size,) for i in range(number)}
    ones = np.ones(size, np.float32)
    updates = [Update(site, 0, dict.fromkeys(shapes, ones)) for site in sites]
    tracemalloc.start()
    try:
        aggregate(updates, WEIGHTS, shapes, settings(rule), {})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    returned = number * size * 4 * (1 + len(RULES[rule].memory))
    assert returned <= peak < returned + 10 * size * 8  # all parameters in float64 would be 40 of these


HOSTILE = {
    "duplicate": lambda u: [*u, u[3]],
    "unknown_site": lambda u: [*u, replace(u[3], site="mallory")],
    "wrong_names": lambda u: [*u[:-1], replace(u[-1], params={**u[-1].params, "extra": np.zeros(1, np.float32)})],
    "wrong_dtype": lambda u: [*u[:-1], replace(u[-1], params={TRUNK: u[-1].params[TRUNK].astype(np.float64)})],
    "wrong_shape": lambda u: [*u[:-1], replace(u[-1], params={TRUNK: np.zeros((1, 1), np.float32)})],
}


@all_rules
@pytest.mark.parametrize("reason", HOSTILE)
def test_updates_that_cannot_be_combined_are_refused_with_their_reason(rule, reason):
    with pytest.raises(UpdateError) as caught:
        one_round(HOSTILE[reason](sent(1)), settings(rule))
    assert caught.value.reason == reason


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'fedadam'"):
        one_round(sent(1), settings("fedadm"))
