"""Auditing in one run (Steinke, Nasr & Jagielski 2023, arXiv 2305.08846): canaries, guesses, and what they prove.

Canaries are fake patients, each in or out by a fair coin. Who sees the releases guesses which are in; more right
guesses than (ε, δ) permits prove that ε is larger than claimed. 500 canaries can prove no more than about ε = 4.6:
this finds noise that is missing or far too small, and does not measure a few percent.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom
from torch import Tensor, nn

from clinifed.privacy.engine import Mechanism, PatientTensors, private_step
from clinifed.privacy.objectives import OBJECTIVES

__all__ = ["canary_scores", "epsilon_lower_bound", "epsilon_proved", "p_value"]

_LOUDNESS = 100.0  # of a canary's gradient, in C: it stays at the clip whatever the steps do to the head
_STEP = 1e-6  # how far all releases together may move a logit, roughly; so the gradients of all steps are alike
_SHARES = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0)  # of the canaries that are guessed; one bound each, the best one counts
_LARGEST = 50.0  # epsilon beyond which nobody asks


class _Canaries(nn.Module):
    """One linear head without bias over one-hot features: each canary owns its column and touches no other."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.head = nn.Linear(count, 2, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {"canary": self.head(features)}


def canary_scores(
    noise_multiplier: float, releases: int, canaries: int, max_grad_norm: float, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """What ``releases`` real steps show of each canary (canaries,), and whether it was in (canaries,).

    Args:
        seed: of the coins alone. Noise has no seed.

    Returns:
        Scores around −½ for a canary that is out and +½ for one that is in, both with variance σ²/releases.
    """
    included = np.random.default_rng(seed).random(canaries) < 0.5
    inside = torch.from_numpy(np.flatnonzero(included))
    module, count = _Canaries(canaries), len(inside)
    # At zero weights the gradient of class 0 is (½ − 1, ½)·feature: its norm is feature/√2, and clipped it is C.
    features = torch.zeros(count, canaries)
    features[torch.arange(count), inside] = _LOUDNESS * max_grad_norm
    data = PatientTensors(features, torch.arange(count), *(torch.zeros(count, dtype=torch.int64) for _ in range(2)))
    reach = (noise_multiplier * releases**0.5 + releases) * max_grad_norm  # noise and signal of all releases
    learning_rate = _STEP / (_LOUDNESS * max_grad_norm * reach)
    mechanism = Mechanism(noise_multiplier, max_grad_norm, 1)
    for _ in range(releases):
        private_step(module, data, OBJECTIVES["cross-entropy"], mechanism, learning_rate, 4096)
    moved = module.head.weight.detach().double().numpy() / learning_rate
    return (moved[0] - moved[1]) / 2**0.5 / (releases * max_grad_norm) - 0.5, included


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """How likely (ε, δ)-DP lets an attacker be right so often: theorem 5.2 of the paper, β + 2mδα.

    Args:
        canaries: m, each in or out by a fair coin.
        guesses: how many of them the attacker guessed; about the rest it said nothing.
        correct: how many guesses were right.

    Under pure ε-DP each guess is right with probability e^ε/(e^ε + 1) at most, as in randomised response, so the
    number of right guesses W is at most binomial: β = P[W ≥ correct]. δ adds α = max over i of P[correct − i ≤ W <
    correct]/i.
    """
    rate = 1 / (1 + np.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, rate))
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, rate))  # of the last 1, 2, … below correct
    shift = float(np.max(below / np.arange(1, correct + 1), initial=0.0))
    return min(1.0, tail + 2 * canaries * delta * shift)


def epsilon_lower_bound(canaries: int, guesses: int, correct: int, delta: float, significance: float) -> float:
    """The largest ε, to 1e-4, that so many right guesses rule out at ``significance``; 0 where they rule out none."""

    def ruled_out(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon, delta) < significance

    if not ruled_out(0.0):
        return 0.0
    low, high = 0.0, _LARGEST
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if ruled_out(middle) else (low, middle)
    return low


def epsilon_proved(
    scores: NDArray[np.float64], included: NDArray[np.bool_], delta: float, confidence: float = 0.95
) -> dict[str, Any]:
    """The best bound over a few numbers of guesses: in where the score is above 0, the surest ones first.

    Args:
        confidence: of the result; each number of guesses gets its share of the error (Bonferroni).

    Returns:
        ``lower_bound`` (ε), and the ``guesses`` and ``correct`` that it rests on.
    """
    canaries = len(scores)
    right = ((scores > 0) == included)[np.argsort(-np.abs(scores), kind="stable")]
    best: dict[str, Any] = {"lower_bound": 0.0, "guesses": 0, "correct": 0}
    for share in _SHARES:
        guesses = max(1, int(share * canaries))
        correct = int(right[:guesses].sum())
        bound = epsilon_lower_bound(canaries, guesses, correct, delta, (1 - confidence) / len(_SHARES))
        if bound > best["lower_bound"]:
            best = {"lower_bound": bound, "guesses": guesses, "correct": correct}
    return best
