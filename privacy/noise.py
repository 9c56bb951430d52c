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

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

__all__ = ["GRID", "NoiseSource", "to_grid"]

GRID = 2.0**-20  # of the clip C: a million times finer than the noise at σ ≥ 1, far coarser than float64's gaps
_DRAWS = 4
_BLOCK = 1 << 16  # values per pass: keeps the float64 working set near 2 MiB
_GPU_BLOCK = 1 << 20  # on a GPU, where a pass costs what its launches cost
_BITS = (1 << 52) - 1
_CPU = torch.device("cpu")


class NoiseSource:
    """Standard normal noise for one release. Make a new one for each; it has no seed and no state to save.

    Guarantees:
        - Two sources are never equal: each is keyed by 32 fresh bytes of the operating system.
        - No argument, configuration or checkpoint can fix what it draws.
    """

    def __init__(self) -> None:
        cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16)))
        self._stream, self._zeros = cipher.encryptor(), b""

    def _uniform(self, count: int, device: torch.device) -> Tensor:
        """``count`` uniforms on the open interval (0, 1): odd multiples of 2^-53, so never 0 and never 1."""
        # The cipher wants room for a block less one byte more; page-locked memory is what a GPU reads without a copy.
        raw = torch.empty(8 * count + 15, dtype=torch.uint8, pin_memory=device.type == "cuda")
        if len(self._zeros) < 8 * count:
            self._zeros = bytes(8 * count)  # for new room the system takes as long as the cipher
        self._stream.update_into(memoryview(self._zeros)[: 8 * count], raw.numpy().data)
        bits = raw[: 8 * count].view(torch.int64).to(device)
        return (bits >> 12).bitwise_and_(_BITS).double().add_(0.5).mul_(2.0**-52)

    def standard_normal(self, shape: tuple[int, ...], device: torch.device = _CPU) -> Tensor:
        """Independent N(0, 1) draws, float64, of ``shape``, on ``device``; the randomness is the CPU's everywhere."""
        out = torch.empty(math.prod(shape), dtype=torch.float64, device=device)
        for part in out.split(_GPU_BLOCK if device.type == "cuda" else _BLOCK):
            # torch's, which uses all cores; it is within 1e-15 of scipy's.
            draws = torch.special.ndtri(self._uniform(_DRAWS * len(part), device)).view(_DRAWS, len(part))
            torch.sum(draws, dim=0, out=part).div_(math.sqrt(_DRAWS))
        return out.view(shape)


def to_grid(values: Tensor, max_grad_norm: float) -> Tensor:
    """``values`` rounded to multiples of GRID · C: post-processing, applied after the noise was added."""
    step = GRID * max_grad_norm
    return (values / step).round_().mul_(step)
