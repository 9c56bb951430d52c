"""The noise: standard normal, never the same twice, on the grid."""

import os

import numpy as np
import pytest
import torch
from scipy.special import ndtri
from scipy.stats import kstest

from clinifed.privacy import noise as module
from clinifed.privacy.noise import GRID, NoiseSource, to_grid

DRAWS = 60_000


def test_noise_is_standard_normal() -> None:
    noise = NoiseSource().standard_normal((DRAWS,))
    assert noise.std() == pytest.approx(1.0, abs=0.02)
    assert kstest(noise, "norm").pvalue > 1e-6


def test_the_inverse_distribution_function_is_accurate_to_the_tails() -> None:
    below = np.logspace(-16, np.log10(0.5), 2000)
    for uniform in (below, 1 - below[below > 1e-15]):
        found = torch.special.ndtri(torch.from_numpy(uniform)).numpy()
        assert np.allclose(found, ndtri(uniform), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scale", [0.0, 0.9])
def test_the_ruler_notices_missing_and_scaled_noise(scale: float) -> None:
    noise = scale * NoiseSource().standard_normal((DRAWS,))
    assert noise.std() != pytest.approx(1.0, abs=0.02)


def test_two_sources_are_never_equal() -> None:
    draws = [NoiseSource().standard_normal((8,)).tobytes() for _ in range(50)]
    assert len(set(draws)) == 50


def test_one_source_does_not_repeat_itself() -> None:
    source = NoiseSource()
    assert not np.array_equal(source.standard_normal((100,)), source.standard_normal((100,)))


def test_shape_and_block_borders_hold() -> None:
    assert NoiseSource().standard_normal((3, 70_000)).shape == (3, 70_000)
    assert NoiseSource().standard_normal(()).shape == ()


@pytest.mark.parametrize("max_grad_norm", [0.5, 1.0, 3.0])
def test_values_lie_on_the_grid_and_move_less_than_a_step(max_grad_norm: float) -> None:
    values = np.linspace(-5, 5, 1001)
    rounded = to_grid(values, max_grad_norm)
    steps = rounded / (GRID * max_grad_norm)
    assert np.allclose(steps, np.rint(steps), atol=1e-6)
    assert np.abs(rounded - values).max() <= GRID * max_grad_norm / 2 * (1 + 1e-9)


def test_blocks_of_many_values_are_of_one_key_and_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[bytes] = []
    fresh = os.urandom
    monkeypatch.setattr(module.os, "urandom", lambda size: keys.append(fresh(size)) or keys[-1])
    drawn = NoiseSource().standard_normal((3, 1 << 18))
    assert [len(key) for key in keys] == [32]
    assert np.abs(np.corrcoef(drawn) - np.eye(3)).max() < 0.01
    assert kstest(drawn.ravel(), "norm").pvalue > 1e-6
