"""The heads among which a hospital chooses its own, for one specialty, on embeddings of the global model.

Trained on the hospital's patients without noise, by the engine's plain step and its pull (a regulariser):
w ← w − η∇L(w), then w ← w − s·(w − w₀), whose fixed point minimises L(w) + s / (2η(1 − s))·‖w − w₀‖².
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clinifed.jobs.baselines import one_thread
from clinifed.models.adapters import TrainablePart
from clinifed.privacy.engine import PatientTensors, plain_step, pull_towards
from clinifed.privacy.objectives import Objective

__all__ = ["GLOBAL", "LOCAL_ONLY", "VARIANTS", "ZERO_SHOT", "Head", "Recipe", "candidates", "logits"]

ZERO_SHOT, GLOBAL, LOCAL_ONLY = "zero-shot", "global", "local-only"
_PULLS = (0.3, 0.1, 0.03, 0.01, 0.003)  # s: from a head that hardly moves to one that hardly remembers
_MIXTURES = (0.25, 0.5, 0.75)  # of the local-only head in the global one
VARIANTS = (*(f"in-house, pull {s:g}" for s in _PULLS), *(f"global with {a:.0%} local-only" for a in _MIXTURES))

# η = 1/L: the Hessian of softmax cross-entropy in (W, b) is at most ½·(‖x‖² + 1) = 1 for an embedding of norm 1
# (Böhning 1992), that of sigmoid losses ¼·(‖x‖² + 1), so that no step overshoots, whatever the data.
_RATE = 1.0
_MOST_STEPS = 300  # (1 − 0.003)^300 = 0.4: even the weakest pull has acted
_BATCH = 1 << 16  # embeddings per physical batch: a kilobyte or two each


@dataclass(frozen=True)
class Head:
    """One linear head."""

    weight: Tensor  # (K, D) float32
    bias: Tensor  # (K,) float32

    def mixed(self, other: "Head", share: float) -> "Head":
        """(1 − ``share``) of this head and ``share`` of ``other``."""
        return Head(torch.lerp(self.weight, other.weight, share), torch.lerp(self.bias, other.bias, share))


@dataclass(frozen=True)
class Recipe:
    """How a site trains alone, as in the federation's own comparison: its steps, from zero-shot, without noise."""

    objective: Objective
    learning_rate: float
    steps: int
    pull: float  # towards zero-shot


def candidates(zero_shot: Head, common: Head, data: PatientTensors, recipe: Recipe) -> dict[str, Head]:
    """Every head that may be chosen, by name.

    Args:
        zero_shot: τ·prompts, on the global model's embedding.
        common: the global head.
        data: the hospital's training patients of this specialty: embeddings (R, D) of norm 1.
        recipe: of the local-only head.

    Raises:
        DataError: there are no patients, or the loss is not finite.
    """
    with one_thread():
        local = _trained(zero_shot, data, recipe.objective, recipe.learning_rate, recipe.steps, recipe.pull)
        pulled = [_trained(common, data, recipe.objective, _RATE, _steps(s), s) for s in _PULLS]
    mixed = [common.mixed(local, share) for share in _MIXTURES]
    named = {ZERO_SHOT: zero_shot, GLOBAL: common, LOCAL_ONLY: local}
    return named | dict(zip(VARIANTS, [*pulled, *mixed], strict=True))


def _steps(pull: float) -> int:
    """Until a pull has taken back all but e⁻⁵ of a first step, (1 − s)^(5/s); it converges at least so fast."""
    return min(_MOST_STEPS, math.ceil(5 / pull))


def _trained(start: Head, data: PatientTensors, objective: Objective, rate: float, steps: int, pull: float) -> Head:
    """``steps`` plain steps from ``start``, each followed by a pull back towards it."""
    labels, width = start.weight.shape
    part = TrainablePart(nn.ModuleDict({"own": nn.Linear(width, labels)}))
    anchor = {"heads.own.weight": start.weight, "heads.own.bias": start.bias}
    part.load_shared(anchor)
    for _ in range(steps):
        plain_step(part, data, objective, rate, _BATCH)
        if pull:
            pull_towards(part, anchor, pull)
    state = part.shared()
    return Head(state["heads.own.weight"], state["heads.own.bias"])


@torch.no_grad()
def logits(head: Head, data: PatientTensors) -> NDArray[np.float64]:
    """(R, K) of ``head`` on embeddings."""
    found: NDArray[np.float64] = (data.features @ head.weight.T + head.bias).double().numpy()
    return found
