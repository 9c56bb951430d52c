"""Federated averaging against a plain reference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from clinifed.aggregators.fedavg import weighted_mean

from .rounds import SHAPES, SITES, WEIGHTS, one_round, sent, settings


def plain_mean(updates, name):
    """By the definition, number by number, in Python's own floats."""
    mine = [u for u in updates if name in u.params]
    mean = np.zeros(SHAPES[name])
    for position in np.ndindex(SHAPES[name]):
        top = sum(WEIGHTS[u.site] * float(u.params[name][position]) for u in mine)
        mean[position] = top / sum(WEIGHTS[u.site] for u in mine) if mine else 0.0
    return mean


@pytest.mark.parametrize("number", range(len(SITES) + 1))
def test_fedavg_equals_a_plain_reference(number):
    updates = sent(3, list(SITES)[:number])
    change, memory = one_round(updates, settings("fedavg"))
    for name in SHAPES:
        assert np.allclose(change[name], plain_mean(updates, name), rtol=1e-6, atol=1e-9)
    assert memory == {}


@hypothesis(max_examples=60, deadline=None)
@given(
    value=st.floats(width=32, allow_nan=False, allow_infinity=False),
    weights=st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=10),
)
def test_equal_arrays_average_to_themselves_to_the_last_bit(value, weights):
    arrays = [np.full(2, value, np.float32)] * len(weights)
    assert np.array_equal(weighted_mean(arrays, weights, settings("fedavg")).astype(np.float32), arrays[0])


def test_the_sum_is_in_float64():
    """In float32 the small one would be lost beside the large ones."""
    arrays = [np.array([v], np.float32) for v in (2.0**30, 1.0, -(2.0**30))]
    assert weighted_mean(arrays, [1.0, 1.0, 1.0], settings("fedavg")) == [1 / 3]
