"""Embeddings drawn as a locked image tower would give them, for figures that need more patients than phantoms can be.

Four classes in unequal shares on a unit sphere of 512 dimensions. An embedding is one direction that all images share,
what its class adds, what its patient, its image and its site's scanner add to every class alike, and is then scaled to
norm 1. What adds to every class alike is not equally strong in all directions: its variance falls with rank j as
j^-``decay``, and classes differ mostly where it is strong, as anatomy, sex and exposure outweigh disease in a real
tower. Prompts lie partly along the class and partly elsewhere, so that zero-shot classification helps and is not all.

The constants of :class:`World` were set once, with seeds 900 to 902, by two figures of the validation set alone,
without noise: zero-shot half-way between chance and what a classifier fitted to all pooled patients reaches (balanced
accuracy .56 and .92). No run with noise had been made then.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from clinifed.privacy.patients import PatientTensors

LABELS = ("normal", "common", "uncommon", "rare")
SPECIALTY = "study"


@dataclass(frozen=True)
class World:
    """What all hospitals have in common. Lengths are relative to the shared direction, which is 1."""

    dim: int = 512
    shares: tuple[float, ...] = (0.55, 0.25, 0.13, 0.07)  # of the classes
    nuisance: float = 0.55  # length of what does not depend on the class
    decay: float = 0.9
    own: float = 0.75  # share of its variance that is the patient's; the rest is the image's
    scanner: float = 0.25  # length of a site's shift
    signal: float = 0.22  # length of what a class adds
    aligned: float = 2.0  # how strongly classes prefer the directions in which nuisance is strong: its variance to this
    prompt: float = 0.7  # cosine between what a prompt adds and what its class adds
    prevalence: float = 0.3  # standard deviation of a class's log share between sites


class Draw:
    """One world: its directions and prompts, and patients from it.

    Args:
        seed: of everything.
    """

    def __init__(self, seed: int, world: World | None = None) -> None:
        self.world = w = world or World()
        self._dice = dice = np.random.default_rng([seed, 1])
        variance = np.arange(1, w.dim + 1, dtype=np.float64) ** -w.decay
        self._std = np.sqrt(variance / variance.sum())  # along the axes; the axes are turned below
        turn = np.linalg.qr(dice.normal(size=(w.dim, w.dim)))[0]
        self._turn = turn.astype(np.float32)
        self._shared = _unit(dice.normal(size=w.dim))
        self._classes = _unit(dice.normal(size=(len(w.shares), w.dim)) * self._std**w.aligned) * w.signal
        elsewhere = dice.normal(size=self._classes.shape) * self._std**w.aligned
        elsewhere -= np.outer(elsewhere @ self._shared, self._shared)  # or one class would be said of every image
        elsewhere = _unit(elsewhere) * w.signal
        mixed = w.prompt * self._classes + np.sqrt(1 - w.prompt**2) * elsewhere
        other = _unit(dice.normal(size=w.dim))  # texts lie apart from images, all of them alike
        self.prompts = torch.from_numpy((_unit(other + mixed) @ turn.T).astype(np.float32))  # (K, D)

    def patients(self, count: int, seed: int, *, sites: int = 1, balanced: bool = False) -> PatientTensors:
        """``count`` patients of 1 to 3 images, on ``sites`` scanners in turn.

        Args:
            seed: of these patients and scanners.
            balanced: classes in equal shares, as public sets have them; else in the world's, jittered.
        """
        w, dice = self.world, np.random.default_rng([seed, 2, count])
        k = len(w.shares)
        shares = np.full(k, 1 / k) if balanced else np.array(w.shares) * np.exp(dice.normal(0, w.prevalence, k))
        label = dice.choice(k, size=count, p=shares / shares.sum())
        scanner = self._nuisance(dice, sites) * (w.scanner / w.nuisance)
        of_patient = self._classes[label] + scanner[np.arange(count) % sites]
        of_patient = of_patient + np.sqrt(w.own) * self._nuisance(dice, count) + self._shared
        images = dice.choice((1, 2, 3), size=count, p=(0.4, 0.35, 0.25))
        patient = np.repeat(np.arange(count), images)
        rows = of_patient[patient] + np.sqrt(1 - w.own) * self._nuisance(dice, len(patient))
        features = torch.from_numpy(_unit(rows).astype(np.float32)) @ torch.from_numpy(self._turn).T
        return PatientTensors(
            features.contiguous(),
            torch.from_numpy(patient),
            torch.zeros(len(patient), dtype=torch.int64),
            torch.from_numpy(label[patient]),
        )

    def _nuisance(self, dice: np.random.Generator, count: int) -> NDArray[np.float32]:
        drawn = dice.standard_normal(size=(count, self.world.dim), dtype=np.float32)
        return drawn * (self._std * self.world.nuisance).astype(np.float32)


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)
