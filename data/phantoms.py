"""Drawn patients: simple pictures of four specialties, with labels that a small model can learn.

A patient is a few latent numbers (label, severity, side, anatomy); an image is a rendering of them with its
own pose. Neighbouring labels overlap, so no classifier reaches 100 %. This is a test object for the machinery
and says nothing about medicine. Devices, which make sites differ, are in :mod:`clinifed.data.devices`.

Shapes: N patients, B images, S = :data:`SIZE_PX`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clinifed.errors import DataError

__all__ = [
    "COLOUR",
    "LABELS",
    "SIZE_PX",
    "Patients",
    "draw_patients",
    "render",
    "smooth_noise",
]

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
_Grid = NDArray[Any]  # float32 throughout, which numpy's types lose in arithmetic

SIZE_PX = 160  # the input size of timm's test_vit, so that nothing is resampled on the way to the tiny model

# The labels that can be drawn, in the order of their integer codes; pathology has no phantom.
LABELS: Mapping[str, tuple[str, ...]] = {
    "radiology": ("normal", "abnormal"),
    "dermatology": ("benign", "malignant"),
    "emergency": ("superficial", "partial", "deep"),
    "cardiology": ("normal", "dilated"),
}
COLOUR = frozenset({"dermatology", "emergency"})  # drawn in RGB; the others are grey

_ANATOMY = 8  # independent standard normals per patient: sizes, positions, tone, phases
# Severity of a finding: chosen so that about one patient in twenty hardly shows it.
_SEVERITY_MEAN, _SEVERITY_STD, _SEVERITY_RANGE = 0.86, 0.31, (0.15, 1.6)
_AXIS = np.linspace(-1, 1, SIZE_PX, dtype=np.float32)
_Y, _X = _AXIS[:, None], _AXIS[None, :]


@dataclass(frozen=True)
class Patients:
    """N patients of one specialty; what stays the same in all images of a patient."""

    specialty: str
    label: Integers  # (N,) int64, index into LABELS[specialty]
    severity: Floats  # (N,) float32, how pronounced the label's finding is, 0.15 to 1.6
    side: Floats  # (N,) float32, -1 (left in the picture) or +1
    anatomy: Floats  # (N, 8) float32, standard normal

    def __len__(self) -> int:
        return len(self.label)


def draw_patients(rng: np.random.Generator, specialty: str, label: Integers) -> Patients:
    """Draw one patient for every entry of ``label``, an int64 array (N,).

    Raises:
        DataError: the specialty has no phantom, or a label is outside its range.
    """
    if specialty not in LABELS:
        raise DataError(f"there is no phantom for specialty {specialty!r}; choose from {sorted(LABELS)}")
    if label.size and not 0 <= label.min() <= label.max() < len(LABELS[specialty]):
        raise DataError(f"labels of {specialty} are 0 to {len(LABELS[specialty]) - 1}, got {np.unique(label)}")
    count = len(label)
    severity = _SEVERITY_MEAN + _SEVERITY_STD * rng.standard_normal(count, np.float32)
    side = np.where(rng.random(count) < 0.5, -1, 1).astype(np.float32)
    anatomy = rng.standard_normal((count, _ANATOMY), np.float32)
    return Patients(specialty, label.astype(np.int64), np.clip(severity, *_SEVERITY_RANGE), side, anatomy)


def render(rng: np.random.Generator, patients: Patients, owner: Integers) -> Floats:
    """Draw one scene for every entry of ``owner``, an int64 array (B,) of indices into ``patients``.

    Returns:
        float32 in [0, 1], (B, S, S) grey or (B, S, S, 3) for :data:`COLOUR`, before any device.
    """
    scene = _SCENES[patients.specialty](rng, _Pose.draw(rng, patients, owner))
    return np.clip(scene, 0, 1).astype(np.float32, copy=False)


@cache
def _interpolation(grid: int) -> Floats:
    """(S, grid) linear interpolation; rows have length 1, so that interpolated noise keeps unit variance."""
    at = np.linspace(0, grid - 1, SIZE_PX)
    rows = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(grid)))
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def smooth_noise(rng: np.random.Generator, count: int, grid: int) -> Floats:
    """(count, S, S) float32 standard normal noise with ``grid`` independent values along each axis."""
    spread = _interpolation(grid)
    noise: NDArray[Any] = spread @ rng.standard_normal((count, grid, grid), np.float32) @ spread.T
    return noise


@dataclass(frozen=True)
class _Pose:
    """B images: the latents of their patients, shaped (B, 1, 1), and coordinates jittered per image."""

    label: _Grid
    severity: _Grid
    side: _Grid
    anatomy: _Grid  # (8, B, 1, 1)
    x: _Grid  # (B, 1, S), about -1 to 1
    y: _Grid  # (B, S, 1)

    @classmethod
    def draw(cls, rng: np.random.Generator, patients: Patients, owner: Integers) -> "_Pose":
        jitter = rng.standard_normal((3, len(owner), 1, 1), np.float32)
        zoom = 1 + 0.03 * jitter[2]
        return cls(
            label=patients.label[owner, None, None].astype(np.float32),
            severity=patients.severity[owner, None, None],
            side=patients.side[owner, None, None],
            anatomy=patients.anatomy[owner].T[:, :, None, None],
            x=(_X + 0.03 * jitter[0]) * zoom,
            y=(_Y + 0.03 * jitter[1]) * zoom,
        )


def _inside(q: _Grid, sharpness: float) -> _Grid:
    """Soft indicator of q < 1, from 1 (inside) to 0; larger ``sharpness`` makes a harder edge."""
    soft: _Grid = 1 / (1 + np.exp(np.clip(np.float32(sharpness) * (q - 1), -30, 30)))
    return soft


def _chest(rng: np.random.Generator, p: _Pose) -> _Grid:
    """Lungs, heart, ribs; ``abnormal`` adds a soft opacity in the lung of the patient's side."""
    a, x, y = p.anatomy, p.x, p.y
    width, height, gap = 0.33 + 0.02 * a[0], 0.62 + 0.03 * a[1], 0.42 + 0.015 * a[2]
    left, right = (_inside(((x - s * gap) / width) ** 2 + ((y + 0.05) / height) ** 2, 6) for s in (-1, 1))
    lungs = left + right
    body = _inside((x / 1.0) ** 4 + (y / 1.25) ** 4, 8)
    heart = _inside(((x - 0.12) / (0.26 + 0.02 * a[3])) ** 2 + ((y - 0.28) / 0.30) ** 2, 5)
    ribs = np.sin((11 + 0.4 * a[4]) * (y + 0.35 * np.abs(x) ** 1.5) + a[5])
    vessels = smooth_noise(rng, len(x), 20)
    scene: _Grid = body * (0.58 - 0.33 * lungs * (1 - 0.8 * heart) + 0.12 * heart + 0.035 * ribs)
    scene += lungs * 0.025 * vessels
    centre_x, centre_y = p.side * (0.42 + 0.05 * np.tanh(a[6])), 0.05 + 0.28 * np.tanh(a[7])
    opacity = np.exp(-(((x - centre_x) / 0.25) ** 2 + ((y - centre_y) / 0.25) ** 2))
    scene += (p.label == 1) * 0.36 * p.severity * opacity * (0.3 + 0.7 * lungs)
    return scene


def _heart(rng: np.random.Generator, p: _Pose) -> _Grid:
    """An ultrasound fan with a ring of wall around a dark cavity, which is larger when ``dilated``."""
    a, x, y = p.anatomy, p.x, p.y
    dilated = (p.label == 1) * p.severity
    cavity, wall = 0.30 + 0.018 * a[0] + 0.130 * dilated, 0.13 + 0.01 * a[1] - 0.03 * dilated
    dx, dy = x - 0.06 * p.side - 0.03 * a[2], (y - 0.12 - 0.03 * a[3]) / (1.12 + 0.05 * a[4])
    radius = np.sqrt(dx**2 + dy**2)
    ring = np.exp(-(((radius - cavity - wall / 2) / (0.55 * wall)) ** 2))
    tissue = 0.30 * _inside(radius / (cavity + wall), -14)
    depth = np.sqrt(x**2 + (y + 1.05) ** 2)
    fan = _inside(np.abs(x) / (0.78 * (y + 1.05) + 0.02), 14) * _inside(depth / 1.95, 40)
    speckle = 0.75 + 0.18 * smooth_noise(rng, len(x), 60) + 0.12 * smooth_noise(rng, len(x), 24)
    scene: _Grid = fan * (0.04 + (tissue + 0.55 * ring) * speckle)
    return scene


def _skin(rng: np.random.Generator, p: _Pose) -> _Grid:
    """(B, S, S, 3) bare skin; the first anatomy number is its tone, from dark (negative) to light."""
    light, dark = np.array([0.90, 0.74, 0.65], np.float32), np.array([0.62, 0.45, 0.36], np.float32)
    tone = _inside(1 - 0.8 * p.anatomy[0], 1.5)[..., None]
    texture = 0.012 * smooth_noise(rng, len(p.x), 50) + 0.02 * smooth_noise(rng, len(p.x), 6)
    return tone * light + (1 - tone) * dark + texture[..., None]


def _lesion(rng: np.random.Generator, p: _Pose) -> _Grid:
    """A pigmented spot; ``malignant`` is more irregular, more variegated and darker, by severity."""
    a = p.anatomy
    malignancy = np.where(p.label == 1, p.severity, 0.18 * p.severity)
    angle, radius = np.arctan2(p.y, p.x), np.sqrt(p.x**2 + p.y**2)
    waves = sum(np.sin(k * angle + 3 * a[k]) for k in (2, 3, 5, 7)) + 0.6 * np.sin(9 * angle + a[1])
    edge = (0.46 + 0.05 * a[4]) * (1 + (0.03 + 0.10 * malignancy) * waves / 1.2)
    spot = _inside(radius / edge, 14)[..., None]
    mottle = (0.10 + 0.45 * malignancy) * (0.6 * smooth_noise(rng, len(p.x), 9) + 0.4 * smooth_noise(rng, len(p.x), 22))
    pigment = np.array([0.50, 0.33, 0.24], np.float32) * (1 - 0.12 * malignancy[..., None])
    hue = np.array([0.10, 0.13, 0.16], np.float32)
    return (1 - spot) * _skin(rng, p) + spot * (pigment + hue * mottle[..., None])


def _burn(rng: np.random.Generator, p: _Pose) -> _Grid:
    """A burn whose depth runs on from red (superficial) over blisters (partial) to mottled eschar (deep)."""
    a, count = p.anatomy, len(p.x)
    # Severity shifts the depth by up to about ±0.5, half the distance to the next label.
    depth = np.clip(p.label + 0.75 * (p.severity - _SEVERITY_MEAN), -0.4, 2.4)[..., None]
    outline = 0.18 * smooth_noise(rng, count, 5)
    patch = _inside(((p.x / (0.66 + 0.05 * a[1])) ** 2 + (p.y / (0.60 + 0.05 * a[2])) ** 2) + outline, 7)[..., None]
    red = np.array([0.80, 0.36, 0.32], np.float32) + 0.02 * smooth_noise(rng, count, 12)[..., None]
    blister = _inside(2.1 - smooth_noise(rng, count, 16), 7)[..., None]
    wet = (1 - blister) * np.array([0.76, 0.40, 0.38], np.float32) + blister * np.array([0.95, 0.82, 0.70], np.float32)
    mottle = _inside(1 - smooth_noise(rng, count, 11), 3)[..., None]
    eschar = mottle * np.array([0.86, 0.80, 0.68], np.float32) + (1 - mottle) * np.array([0.30, 0.20, 0.15], np.float32)
    share = [np.clip(1 - np.abs(depth - k), 0, 1) for k in range(3)]
    share[0], share[2] = np.where(depth < 0, 1, share[0]), np.where(depth > 2, 1, share[2])
    wound = share[0] * red + share[1] * wet + share[2] * eschar
    scene: _Grid = (1 - patch) * _skin(rng, p) + patch * wound
    return scene


_SCENES: Mapping[str, Callable[[np.random.Generator, _Pose], _Grid]] = {
    "radiology": _chest,
    "dermatology": _lesion,
    "emergency": _burn,
    "cardiology": _heart,
}
