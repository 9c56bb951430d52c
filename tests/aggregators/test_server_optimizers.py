"""Server optimisers against plain references over several rounds, with sites that come and go."""

import math

import numpy as np
import pytest

from clinifed.aggregators.server_optimizers import adam, momentum

from .rounds import SHAPES, SITES, TRUNK, bits, one_round, sent, settings
from .test_fedavg import plain_mean

PRESENT = [list(SITES), ["alder", "fir"], list(SITES)[:4], ["birch"], ["alder"], list(SITES)]  # by round


def plain_fedavgm(deltas, eta, beta):
    """One number's changes; None where nobody sent it."""
    m, changes = 0.0, []
    for delta in deltas:
        if delta is not None:
            m = beta * m + delta
        changes.append(0.0 if delta is None else eta * m)
    return changes


def plain_fedadam(deltas, eta, beta1, beta2, tau):
    m, v, changes = 0.0, tau * tau, []
    for delta in deltas:
        if delta is not None:
            m = beta1 * m + (1 - beta1) * delta
            v = beta2 * v + (1 - beta2) * delta * delta
        changes.append(0.0 if delta is None else eta * m / (math.sqrt(v) + tau))
    return changes


@pytest.mark.parametrize(
    ("how", "reference", "numbers"),
    [
        (settings("fedavgm"), plain_fedavgm, (1.0, 0.9)),
        (settings("fedavgm", server_learning_rate=0.3, momentum=0.5), plain_fedavgm, (0.3, 0.5)),
        (settings("fedadam"), plain_fedadam, (1.0, 0.9, 0.99, 1e-3)),
        (
            settings("fedadam", server_learning_rate=0.02, momentum=0.4, second_momentum=0.8, adaptivity=0.1),
            plain_fedadam,
            (0.02, 0.4, 0.8, 0.1),
        ),
    ],
)
def test_a_server_optimiser_equals_a_plain_reference_over_rounds(how, reference, numbers):
    rounds = [sent(number, sites) for number, sites in enumerate(PRESENT)]
    memory, changes = {}, []
    for updates in rounds:
        change, memory = one_round(updates, how, memory)
        changes.append(change)
    for name in SHAPES:
        means = [plain_mean(u, name) if any(name in each.params for each in u) else None for u in rounds]
        for position in np.ndindex(SHAPES[name]):
            expected = reference([None if mean is None else mean[position] for mean in means], *numbers)
            assert np.allclose([change[name][position] for change in changes], expected, rtol=1e-4, atol=1e-7)


def test_fedadam_by_hand():
    """Δ = 0.01 at the defaults: m = 0.001, v = 0.99e-6 + 0.01e-4 = 1.99e-6, m / (√v + 0.001) = 0.41482."""
    change, memory = adam(np.array([0.01]), {}, settings("fedadam"))
    assert change[0] == pytest.approx(0.41482, abs=1e-5)
    assert memory["momentum"][0] == pytest.approx(0.001)
    assert memory["second_momentum"][0] == pytest.approx(1.99e-6)


def test_fedadam_does_not_move_what_never_had_an_update():
    memory: dict[str, np.ndarray] = {}
    for _ in range(3):
        change, new = adam(np.zeros(2), memory, settings("fedadam"))
        assert not change.any()
        memory = {slot: value.astype(np.float32) for slot, value in new.items()}


def test_fedavgm_without_momentum_is_the_mean():
    how, memory = settings("fedavgm", momentum=0.0), {}
    for number in range(2):
        change, memory = one_round(sent(number), how, memory)
        assert bits((change, {})) == bits((one_round(sent(number), settings("fedavg"))[0], {}))


def test_momentum_remembers_the_sum_and_not_the_step():
    """η may change between jobs without a change of what is remembered."""
    for eta in (0.1, 1.0):
        _, memory = momentum(np.array([2.0]), {"momentum": np.array([1.0], np.float32)}, settings("fedavgm"))
        change, other = momentum(
            np.array([2.0]),
            {"momentum": np.array([1.0], np.float32)},
            settings("fedavgm", server_learning_rate=eta),
        )
        assert other["momentum"] == memory["momentum"] == [2.9]
        assert change == [eta * 2.9]


def test_a_round_without_the_trunk_lets_no_momentum_coast():
    _, memory = one_round(sent(1), settings("fedavgm"))
    change, after = one_round([], settings("fedavgm"), memory)
    assert not change[TRUNK].any()
    assert after["momentum." + TRUNK].tobytes() == memory["momentum." + TRUNK].tobytes()
