"""Which heads are worth deploying: one that lost to zero-shot on public validation images is exported as zero-shot."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clinifed.evaluation.metrics import multi_label_scores, patient_scores
from clinifed.export.deployed import DeployedModel
from clinifed.export.source import PublicImages
from clinifed.privacy.objectives import Objective

__all__ = ["HeadChoice", "choose_heads", "run_torch"]

_BATCH = 8  # images per run of torch; changes memory only


@dataclass(frozen=True)
class HeadChoice:
    """What the exported ``logits_<specialty>`` are, and why."""

    head: str  # trained | zero-shot
    reason: str
    patients: int = 0  # of the validation set, in this specialty
    trained: float | None = None  # balanced accuracy by patient
    zero_shot: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dict(vars(self))


@torch.no_grad()
def run_torch(
    model: DeployedModel, pixels: NDArray[np.float32]
) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
    """Embedding (N, D), logits and zero-shot logits {specialty: (N, K)} of ``pixels`` (N, 3, S, S): FP32, CPU."""
    parts = [model(torch.from_numpy(pixels[i : i + _BATCH])) for i in range(0, len(pixels), _BATCH)]
    logits, zero_shot = (
        {name: torch.cat([part[kind][name] for part in parts]).numpy() for name in model.specialties} for kind in (1, 2)
    )
    return torch.cat([part[0] for part in parts]).numpy(), logits, zero_shot


def choose_heads(
    logits: Mapping[str, NDArray[np.float32]],
    zero_shot: Mapping[str, NDArray[np.float32]],
    images: PublicImages,
    objective: Objective,
) -> dict[str, HeadChoice]:
    """Per specialty, the trained head, unless its balanced accuracy by patient is below zero-shot's.

    Args:
        logits: of the trained heads, {specialty: (N, K)}.
        zero_shot: of the base model, the same shapes.
        images: the N public validation images.
        objective: says how a decision is read of logits.
    """
    figures = patient_scores if objective.labels == "one" else multi_label_scores
    own = np.asarray(images.specialties)
    labels, patients = np.asarray(images.labels), np.unique(np.asarray(images.patients), return_inverse=True)[1]
    choices = {}
    for name in logits:
        rows = own == name
        if not rows.any():
            choices[name] = HeadChoice("trained", "the public validation set has no image of it: not compared")
            continue
        scores = [figures(kind[name][rows], patients[rows], labels[rows]) for kind in (logits, zero_shot)]
        trained, start = (score.balanced_accuracy for score in scores)
        lost = trained < start
        reason = f"{'below' if lost else 'not below'} zero-shot on the public validation set"
        choices[name] = HeadChoice("zero-shot" if lost else "trained", reason, scores[0].patients, trained, start)
    return choices
