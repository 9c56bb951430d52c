"""The aggregation rules: each parameter over the sites that sent it, in any order of arrival, by contract weights."""

from itertools import permutations

import numpy as np
import pytest

from clinifed.aggregators import RULES
from clinifed.messages import specialty_of

WEIGHTS = {"alder": 1.0, "birch": 2.0, "cedar": 3.0}

all_rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@all_rules
def test_the_order_of_arrival_changes_no_bit(rule, contract, updates):
    results = [rule(list(order), WEIGHTS, contract.shapes) for order in permutations(updates.values())]
    for other in results[1:]:
        assert all(results[0][name].tobytes() == other[name].tobytes() for name in contract.shapes)


@all_rules
def test_equal_updates_average_to_themselves(rule, contract, updates):
    same = {name: np.full(shape, 0.25, dtype=np.float32) for name, shape in contract.shapes.items()}
    for update in updates.values():
        update.params.update({name: same[name] for name in update.params})
    mean = rule(list(updates.values()), WEIGHTS, contract.shapes)
    assert all(np.array_equal(mean[name], same[name]) for name in contract.shapes)


@all_rules
def test_a_head_nobody_sent_changes_by_zero(rule, contract, updates):
    mean = rule([updates["alder"], updates["birch"]], WEIGHTS, contract.shapes)
    assert not mean["heads.emergency.weight"].any()
    assert mean["heads.radiology.weight"].any()


@all_rules
def test_no_update_at_all_changes_nothing(rule, contract):
    assert not any(value.any() for value in rule([], WEIGHTS, contract.shapes).values())


def test_fedavg_equals_a_plain_reference(contract, updates):
    mean = RULES["fedavg"](list(updates.values()), WEIGHTS, contract.shapes)
    for name in contract.shapes:
        declared = [s for s in WEIGHTS if specialty_of(name) in (None, *contract.sites[s].specialties)]
        expected = np.average(
            [updates[s].params[name] for s in declared], axis=0, weights=[WEIGHTS[s] for s in declared]
        )
        assert np.allclose(mean[name], expected, atol=1e-6)
        assert mean[name].dtype == np.float32
