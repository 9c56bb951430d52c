"""What a trainable part says of patients: its logits, and their figures by specialty."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from clinifed.evaluation.metrics import Scores, multi_label_scores, patient_scores
from clinifed.models.adapters import TrainablePart
from clinifed.privacy.objectives import OBJECTIVES, Objective
from clinifed.privacy.patients import PatientTensors, physical_batches, rows_per_batch

__all__ = ["embedded", "logits_of", "score_part", "scores_of"]

_BATCH = 32  # images of many tokens per forward pass; changes memory only


@torch.no_grad()
def embedded(part: TrainablePart, data: PatientTensors, batch_size: int) -> PatientTensors:
    """The same patients with the global model's embeddings (R, D) for features, whatever its trunk reads."""
    batches = physical_batches(data.patient, batch_size)
    embedding = torch.cat([part.embed(data.features[rows].to(part.device)).cpu() for rows in batches])
    return PatientTensors(embedding, data.patient, data.specialty, data.label)


@torch.inference_mode()
def logits_of(part: TrainablePart, data: PatientTensors, names: list[str]) -> dict[str, NDArray[np.float64]]:
    """Logits of ``part`` on the images of each of its specialties that are in ``data``, in their order.

    Args:
        data: features; ``specialty`` counts ``names``, sorted.

    Returns:
        specialty → (R, K) of its R images; a specialty without any is left out.
    """
    found: dict[str, list[NDArray[np.float64]]] = {}
    for rows in physical_batches(data.patient, rows_per_batch(data, _BATCH)):
        for name, logits in part(data.features[rows].to(part.device)).items():
            mine = data.specialty[rows] == names.index(name) if name in names else None
            if mine is not None and mine.any():
                found.setdefault(name, []).append(logits.cpu()[mine].double().numpy())
    return {name: np.concatenate(found[name]) for name in sorted(found)}


def score_part(
    part: TrainablePart,
    public: PatientTensors,
    names: list[str],
    objective: Objective = OBJECTIVES["cross-entropy"],
) -> dict[str, Scores]:
    """Scores of ``part`` on public patients, for each of its specialties.

    Args:
        public: features; ``specialty`` counts ``names``, sorted.
        objective: whose labels ``public`` holds.
    """
    return scores_of(logits_of(part, public, names), public, names, objective)


def scores_of(
    logits: Mapping[str, NDArray[np.float64]], public: PatientTensors, names: list[str], objective: Objective
) -> dict[str, Scores]:
    """Scores of logits that :func:`logits_of` gave."""
    figures = patient_scores if objective.labels == "one" else multi_label_scores
    scores = {}
    for name, mine in logits.items():
        rows = public.specialty == names.index(name)
        scores[name] = figures(mine, public.patient[rows].numpy(), public.label[rows].numpy())
    return scores
