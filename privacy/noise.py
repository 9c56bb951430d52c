"""Gaussian noise from the operating system's randomness, keyed anew for every release and never reconstructed.

``os.urandom`` keys AES-256 in counter mode; its stream becomes uniforms on (0, 1), these become normals through the
inverse distribution function in float64, four of them are added and halved, and whoever adds the result to a sum
rounds to a fixed grid.

What this covers: a seed cannot be guessed, configured, stored or replayed; adding four draws (Holohan & Braghin,
arXiv 2107.10138) and rounding to a grid blunt the attacks on the gaps of floating-point Gaussians (Mironov 2012;
Jin et al., arXiv 2112.05307). What it does not: this is not an exact discrete sampler, and its running time is not
constant.
"""

import math
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

__all__ = ["GRID", "NoiseSource", "to_grid"]

GRID = 2.0**-20  # of the clip C: a million times finer than the noise at σ ≥ 1, far coarser than float64's gaps
_DRAWS = 4
_BLOCK = 1 << 16  # values per pass: keeps the float64 working set near 2 MiB


class NoiseSource:
    """Standard normal noise for one release. Make a new one for each; it has no seed and no state to save.

    Guarantees:
        - Two sources are never equal: each is keyed by 32 fresh bytes of the operating system.
        - No argument, configuration or checkpoint can fix what it draws.
    """

    def __init__(self) -> None:
        cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16)))
        self._stream = cipher.encryptor()

    def _uniform(self, count: int) -> NDArray[np.float64]:
        """``count`` uniforms on the open interval (0, 1): odd multiples of 2^-53, so never 0 and never 1."""
        raw = np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8")
        values = (raw >> np.uint64(12)).astype(np.float64)
        values += 0.5
        values *= 2.0**-52
        return values

    def standard_normal(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Independent N(0, 1) draws, float64, of ``shape``."""
        out = np.empty(math.prod(shape), dtype=np.float64)
        for start in range(0, len(out), _BLOCK):
            size = min(_BLOCK, len(out) - start)
            # torch's, which uses all cores; it is within 1e-15 of scipy's.
            draws = torch.special.ndtri(torch.from_numpy(self._uniform(_DRAWS * size))).view(_DRAWS, size)
            out[start : start + size] = draws.sum(dim=0).numpy() / math.sqrt(_DRAWS)
        return out.reshape(shape)


def to_grid(values: NDArray[np.float64], max_grad_norm: float) -> NDArray[np.float64]:
    """``values`` rounded to multiples of GRID · C: post-processing, applied after the noise was added."""
    step = GRID * max_grad_norm
    rounded: NDArray[np.float64] = np.rint(values / step) * step
    return rounded
