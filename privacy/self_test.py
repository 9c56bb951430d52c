"""The noise self-test that starts every real job: without data, on the installed mechanism."""

from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr
from torch import nn

from clinifed.errors import PrivacyError
from clinifed.privacy.engine import Mechanism, PatientDPOptimizer

__all__ = ["self_test"]

_TEST_DRAWS = 1 << 16
_CPU = torch.device("cpu")


def self_test(device: torch.device = _CPU) -> None:
    """Refuse to go on unless the installed noise is N(0, σ²C²) and fresh in every release. Sees no data.

    Two releases of n = 65 536 zeros through the real ``add_noise``, each tested for

    - mean: |m|·√n < 6; chance of a false alarm 2·Φ(−6) = 2.0e-9;
    - deviation: |s − 1| < 0.02, which is 7.2 of its own deviations 1/√(2n); 5e-13;
    - distribution: √n·sup|F̂ − Φ| < 2.9; at most 2·exp(−2·2.9²) = 9.9e-8 (Dvoretzky, Kiefer & Wolfowitz 1956 with
      Massart's constant, 1990);

    and both together for correlation: |r|·√n < 6; 2.0e-9. In all 2·(2.0e-9 + 5e-13 + 9.9e-8) + 2.0e-9 = 2.1e-7.

    Args:
        device: where releases are made.

    Guarantees:
        - Noise that is missing, or scaled by less than 0.97 or more than 1.03, is noticed.
        - A source that repeats itself is noticed.
        - A sound source is refused with a probability below 1e-6.

    Raises:
        PrivacyError: with everything that is wrong.
    """
    mechanism = Mechanism(2.0, 0.5, 1)  # any numbers, but not all 1: a forgotten factor would hide
    releases = [_noise_of_a_release(mechanism, device) for _ in range(2)]
    root, problems = sqrt(_TEST_DRAWS), []
    for noise in releases:
        mean, deviation = float(noise.mean()), float(noise.std())
        if not abs(mean) * root < 6:
            problems.append(f"the noise has mean {mean:.4f} of its deviation")
        if not abs(deviation - 1) < 0.02:
            problems.append(f"the noise has {deviation:.4f} of the deviation that is claimed")
        below = ndtr(np.sort(noise))
        steps = np.arange(_TEST_DRAWS + 1) / _TEST_DRAWS
        distance = float(max((steps[1:] - below).max(), (below - steps[:-1]).max()))
        if not distance * root < 2.9:
            problems.append(f"the noise is not normal: its distribution is off by {distance:.4f}")
    if not problems and not abs(float(np.corrcoef(releases[0], releases[1])[0, 1])) * root < 6:
        problems.append("two releases have related noise: their difference shows the patients")
    if problems:
        raise PrivacyError(
            *(f"noise self-test: {p}; nothing may be released, reinstall clinifed" for p in dict.fromkeys(problems))
        )


def _noise_of_a_release(mechanism: Mechanism, device: torch.device) -> NDArray[np.float64]:
    """What ``add_noise`` adds to a sum of zeros, (65 536,), in claimed standard deviations."""
    parameter = nn.Parameter(torch.zeros(_TEST_DRAWS, device=device))
    optimizer = PatientDPOptimizer(torch.optim.SGD([parameter], lr=1.0), mechanism)
    parameter.summed_grad = torch.zeros(_TEST_DRAWS, device=device)  # type: ignore[attr-defined]
    optimizer.add_noise()
    assert parameter.grad is not None
    noise: NDArray[np.float64] = parameter.grad.double().cpu().numpy()
    return noise / (mechanism.noise_multiplier * mechanism.max_grad_norm)
