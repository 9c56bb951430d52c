"""Scanners and cameras: how the same scene looks different from site to site.

A device is one draw per (site, specialty); ``strength`` says how far it may lie from the atlas device, which
changes nothing. All constants were chosen so that a model trained near the atlas keeps part, not all, of its
zero-shot accuracy under :data:`STRENGTH`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clinifed.data.phantoms import SIZE_PX, smooth_noise

__all__ = ["STRENGTH", "Device", "draw_device", "photograph", "quantise"]

Floats = NDArray[np.float32]

# How far the sites' devices lie from the atlas, per specialty.
STRENGTH: Mapping[str, float] = {"radiology": 0.6, "dermatology": 0.55, "emergency": 0.95, "cardiology": 0.75}

_AXIS = np.linspace(-1, 1, SIZE_PX, dtype=np.float32)
_TEXTURE_GRIDS = (12, 24, 50)  # structures of about 13, 7 and 3 px


@dataclass(frozen=True)
class Device:
    """One scanner or camera. Intensities are shares of full scale; the defaults are the atlas device."""

    gain: float = 1.0
    offset: float = 0.0
    gamma: float = 1.0
    noise: float = 0.0  # standard deviation, white
    blur_px: float = 0.0  # standard deviation of a Gaussian
    cast: tuple[float, float, float] = (1.0, 1.0, 1.0)  # gain per channel; colour only
    vignette: float = 0.0  # loss of brightness at the middle of an edge
    banding: float = 0.0  # amplitude of horizontal stripes
    banding_rad: float = 30.0  # phase of the stripes from the middle to the lower edge, radians
    texture: float = 0.0  # standard deviation of smooth noise
    texture_grid: int = 24  # its independent values along an axis


def draw_device(rng: np.random.Generator, strength: float) -> Device:
    """Draw a device; ``strength`` 0 is the atlas device, about 1 a markedly different one."""
    normal = rng.standard_normal
    return Device(
        gain=float(np.exp(strength * 0.28 * normal())),
        offset=float(strength * 0.09 * normal()),
        gamma=float(np.exp(strength * 0.40 * normal())),
        noise=float(strength * abs(0.05 + 0.03 * normal())),
        blur_px=float(strength * abs(0.5 + 0.5 * normal())),
        cast=(
            float(np.exp(strength * 0.14 * normal())),
            float(np.exp(strength * 0.14 * normal())),
            float(np.exp(strength * 0.14 * normal())),
        ),
        vignette=float(strength * abs(0.25 + 0.25 * normal())),
        banding=float(strength * abs(0.03 + 0.03 * normal())),
        banding_rad=float(rng.uniform(15, 70)),
        texture=float(strength * abs(0.05 + 0.04 * normal())),
        texture_grid=int(rng.choice(_TEXTURE_GRIDS)),
    )


def photograph(rng: np.random.Generator, scenes: Floats, device: Device) -> Floats:
    """Pass scenes through a device.

    Args:
        rng: draws the noise, texture and stripe phase of each image.
        scenes: float32 in [0, 1], (B, S, S) grey or (B, S, S, 3) colour.
        device: the device.

    Returns:
        A new array of the same shape, float32 in [0, 1].
    """
    count, colour = len(scenes), scenes.ndim == 4
    planes: NDArray[Any] = np.moveaxis(scenes, -1, 1) if colour else scenes[:, None]  # (B, C, S, S)
    if device.blur_px > 0.05:  # narrower Gaussians do not reach the neighbouring pixel
        spread = _gaussian(device.blur_px)
        planes = spread @ planes @ spread.T
    image: NDArray[Any] = np.power(np.clip(planes, 0, 1), np.float32(device.gamma)) * np.float32(device.gain)
    image += np.float32(device.offset)
    if colour:
        image *= np.asarray(device.cast, np.float32)[:, None, None]
    image *= 1 - np.float32(device.vignette) * (_AXIS[:, None] ** 2 + _AXIS**2)
    phase = rng.uniform(0, 2 * np.pi, (count, 1, 1, 1)).astype(np.float32)
    image += np.float32(device.banding) * np.sin(np.float32(device.banding_rad) * _AXIS[:, None] + phase)
    if device.texture:
        image += np.float32(device.texture) * smooth_noise(rng, count, device.texture_grid)[:, None]
    if device.noise:
        image += np.float32(device.noise) * rng.standard_normal(image.shape, np.float32)
    np.clip(image, 0, 1, out=image)
    return np.ascontiguousarray(np.moveaxis(image, 1, -1)) if colour else image[:, 0]


def quantise(images: Floats, bits: int) -> NDArray[np.uint16]:
    """Round float32 in [0, 1] to integers 0 … 2**bits - 1; ``bits`` is 1 to 16, the shape stays."""
    levels: NDArray[np.uint16] = np.rint(images * np.float32(2**bits - 1)).astype(np.uint16)
    return levels


def _gaussian(sigma_px: float) -> Floats:
    """(S, S) matrix that blurs along an axis; rows sum to 1, so edges do not darken."""
    at = np.arange(SIZE_PX)
    rows = np.exp(-0.5 * ((at[:, None] - at) / sigma_px) ** 2)
    return np.asarray(rows / rows.sum(axis=1, keepdims=True), np.float32)
