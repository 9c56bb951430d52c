"""The noise: standard normal, never the same twice, on the grid."""

import os

import numpy as np
import pytest
import torch
from scipy.special import ndtri
from scipy.stats import kstest

from clinifed.privacy import noise as module
from clinifed.privacy.noise import GRID, NoiseSource, to_grid
from clinifed.privacy.self_test import self_test

DRAWS = 60_000


def test_noise_is_standard_normal() -> None:
    noise = NoiseSource().standard_normal((DRAWS,)).numpy()
    assert noise.std() == pytest.approx(1.0, abs=0.02)
    assert kstest(noise, "norm").pvalue > 1e-6


def test_the_inverse_distribution_function_is_accurate_to_the_tails() -> None:
    below = np.logspace(-16, np.log10(0.5), 2000)
    for uniform in (below, 1 - below[below > 1e-15]):
        found = torch.special.ndtri(torch.from_numpy(uniform)).numpy()
        assert np.allclose(found, ndtri(uniform), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scale", [0.0, 0.9])
def test_the_ruler_notices_missing_and_scaled_noise(scale: float) -> None:
    noise = scale * NoiseSource().standard_normal((DRAWS,)).numpy()
    assert noise.std() != pytest.approx(1.0, abs=0.02)


def test_two_sources_are_never_equal() -> None:
    draws = [NoiseSource().standard_normal((8,)).numpy().tobytes() for _ in range(50)]
    assert len(set(draws)) == 50


def test_one_source_does_not_repeat_itself() -> None:
    source = NoiseSource()
    assert not torch.equal(source.standard_normal((100,)), source.standard_normal((100,)))


def test_shape_and_block_borders_hold() -> None:
    assert NoiseSource().standard_normal((3, 70_000)).shape == (3, 70_000)
    assert NoiseSource().standard_normal(()).shape == ()


@pytest.mark.parametrize("max_grad_norm", [0.5, 1.0, 3.0])
def test_values_lie_on_the_grid_and_move_less_than_a_step(max_grad_norm: float) -> None:
    values = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    rounded = to_grid(values, max_grad_norm)
    steps = rounded / (GRID * max_grad_norm)
    assert torch.allclose(steps, steps.round(), rtol=0, atol=1e-6)
    assert (rounded - values).abs().max() <= GRID * max_grad_norm / 2 * (1 + 1e-9)


def test_blocks_of_many_values_are_of_one_key_and_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[bytes] = []
    fresh = os.urandom
    monkeypatch.setattr(module.os, "urandom", lambda size: keys.append(fresh(size)) or keys[-1])
    drawn = NoiseSource().standard_normal((3, 1 << 18)).numpy()
    assert [len(key) for key in keys] == [32]
    assert np.abs(np.corrcoef(drawn) - np.eye(3)).max() < 0.01
    assert kstest(drawn.ravel(), "norm").pvalue > 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_noise_drawn_on_a_gpu_is_standard_normal_and_has_the_tails() -> None:
    device = torch.device("cuda")
    drawn = NoiseSource().standard_normal((3, 1 << 20), device)
    assert drawn.device.type == "cuda"
    assert kstest(drawn.cpu().numpy().ravel(), "norm").pvalue > 1e-6
    uniform = np.concatenate([np.logspace(-16, np.log10(0.5), 2000), 1 - np.logspace(-15, np.log10(0.5), 2000)])
    found = torch.special.ndtri(torch.from_numpy(uniform).to(device)).cpu().numpy()
    assert np.allclose(found, ndtri(uniform), rtol=1e-13, atol=1e-13)
    self_test(device)
