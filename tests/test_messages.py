"""The norm of an update, and the ball onto which a site projects it: never longer than the server takes."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clinifed.messages import (
    Update,
    allowed_names,
    packed,
    projected,
    release_sha256,
    rounded,
    specialty_of,
    unpacked,
    update_norm,
)

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
ARRAYS = st.lists(st.lists(FLOATS, min_size=1, max_size=6), min_size=1, max_size=3)
BOUNDS = st.floats(min_value=5e-324, max_value=1e308, allow_nan=False, allow_subnormal=True)
LEAST = float(np.finfo(np.float32).smallest_subnormal)


def named(arrays) -> dict[str, np.ndarray]:
    return {f"heads.a.{number}": np.array(array, np.float32) for number, array in enumerate(arrays)}


def arrived(params):
    """As the server has it: each array from bytes of its own."""
    return {n: np.frombuffer(params[n].tobytes(), np.float32).reshape(params[n].shape) for n in reversed(params)}


@settings(max_examples=400, deadline=None)
@given(arrays=ARRAYS, bound=BOUNDS)
@example(arrays=[[LEAST]], bound=LEAST / 2)
@example(arrays=[[LEAST] * 6] * 3, bound=LEAST * 3)
@example(arrays=[[3.4028234663852886e38] * 6], bound=1e-45)
@example(arrays=[[3.4028234663852886e38] * 6], bound=3.4028234663852886e38)
@example(arrays=[[1e-38] * 6], bound=1e-38)
@example(arrays=[[0.0]], bound=5e-324)
def test_the_norm_of_what_is_projected_is_at_most_the_bound(arrays, bound):
    params = named(arrays)
    sent = projected(params, bound)
    assert update_norm(arrived(sent)) <= bound
    assert {n: (v.shape, v.dtype) for n, v in sent.items()} == {n: (v.shape, v.dtype) for n, v in params.items()}


@settings(max_examples=400, deadline=None)
@given(arrays=ARRAYS, bound=BOUNDS)
@example(arrays=[[LEAST] * 6] * 3, bound=LEAST * 3)
@example(arrays=[[1.5e-39] * 6], bound=3.7e-39)
@example(arrays=[[1.00390624] * 6], bound=1.00390624 * 6**0.5)
@example(arrays=[[3.4028234663852886e38] * 6], bound=3.4028234663852886e38)
def test_the_norm_of_what_is_rounded_is_at_most_the_bound_and_packing_loses_nothing(arrays, bound):
    params = named(arrays)
    sent = rounded(params, bound)
    assert update_norm(sent) <= bound
    bits = packed(sent)
    assert all(value.dtype == np.uint16 for value in bits.values())
    assert {n: (v.shape, v.tobytes()) for n, v in unpacked(bits).items()} == {
        n: (v.shape, v.tobytes()) for n, v in sent.items()
    }


def test_rounding_is_to_the_nearest_of_eight_bits():
    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    sent = rounded({"a": values}, 1e9)["a"]
    assert 2**-9 < np.abs(sent / values - 1).max() <= 2**-8
    assert abs((sent - values).mean()) < 1e-4


def test_what_is_no_array_of_sixteen_bits_stays_as_it_came():
    strange = {"a": None, "b": np.ones(2, np.float32), "c": np.ones(2, np.int32)}
    assert all(unpacked(strange)[name] is value for name, value in strange.items())


@settings(max_examples=200, deadline=None)
@given(arrays=ARRAYS)
def test_within_the_ball_everything_stays_as_it_is(arrays):
    params = named(arrays)
    norm = update_norm(params)
    for bound in (max(norm, 5e-324), norm * 2 + 1):
        sent = projected(params, bound)
        assert {n: v.tobytes() for n, v in sent.items()} == {n: v.tobytes() for n, v in params.items()}


@settings(max_examples=200, deadline=None)
@given(
    arrays=st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=6), min_size=1),
    share=st.floats(0.01, 0.99),
)
def test_outside_of_the_ball_the_direction_stays_and_hardly_more_than_needed_is_cut(arrays, share):
    params = named(arrays)
    norm = update_norm(params)
    if norm < 1e-3:
        return
    sent = projected(params, share * norm)
    assert update_norm(sent) == pytest.approx(share * norm, rel=1e-5)
    for name, value in params.items():
        assert np.allclose(sent[name], share * value, rtol=1e-4, atol=1e-30)


def test_projecting_changes_nothing_of_what_it_is_given():
    params = {"heads.a.weight": np.full(4, 2, np.float32)}
    projected(params, 1.0)
    assert params["heads.a.weight"].tolist() == [2, 2, 2, 2]


def test_the_norm_is_over_all_arrays_together_in_float64():
    assert update_norm({}) == 0
    assert update_norm({"a": np.full((2, 2), 3, np.float32), "b": np.array([8], np.float32)}) == 10.0
    largest = np.finfo(np.float32).max
    assert update_norm({"a": np.full(4, largest, np.float32)}) == pytest.approx(2 * float(largest))
    assert update_norm({"a": np.full(1, LEAST, np.float32)}) == LEAST


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_norm_that_is_none_is_not_below_any_bound(value):
    norm = update_norm({"a": np.array([value, 1], np.float32)})
    assert not norm <= 1e308
    assert math.isnan(norm) or math.isinf(norm)


def test_a_site_sends_the_trunk_and_its_own_heads():
    names = ["trunk.projection.weight", "heads.radiology.bias", "heads.emergency.bias"]
    assert allowed_names(names, ["radiology"]) == {"trunk.projection.weight", "heads.radiology.bias"}
    assert [specialty_of(name) for name in names] == [None, "radiology", "emergency"]


CHANGES = {
    "site": lambda u: Update("birch", u.round, u.params, u.meta),
    "round": lambda u: Update(u.site, 1, u.params, u.meta),
    "a value": lambda u: Update(u.site, u.round, {"heads.a.bias": np.array([1, 3], np.float32)}, u.meta),
    "a shape": lambda u: Update(u.site, u.round, {"heads.a.bias": np.array([[1, 2]], np.float32)}, u.meta),
    "a name": lambda u: Update(u.site, u.round, {"heads.b.bias": u.params["heads.a.bias"]}, u.meta),
    "metadata": lambda u: Update(u.site, u.round, u.params, {"nonce": "1"}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_release_has_another_hash_and_its_signature_is_no_part_of_it(change):
    update = Update("alder", 0, {"heads.a.bias": np.array([1, 2], np.float32)}, {"nonce": "0"})
    assert release_sha256(change(update)) != release_sha256(update)
    signed = Update("alder", 0, update.params, {"nonce": "0", "signature": "s"})
    assert release_sha256(signed) == release_sha256(update)
