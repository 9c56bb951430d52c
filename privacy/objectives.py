"""Losses that are sums over images against fixed prompts. Anything else may not run under differential privacy.

Clipping bounds what one patient changes only if the patient's gradient depends on that patient alone. A contrastive
loss over the batch puts every patient into every other patient's denominator: removing one patient moves the clipped
sum by up to twice the batch size times C, and Opacus cannot notice. So only the functions of ``OBJECTIVES`` run.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from clinifed.errors import PrivacyError

__all__ = ["OBJECTIVES", "Objective", "cross_entropy", "resolve_objective"]

# (logits {specialty: (B, K)}, specialty index (B,), label index (B,)) → loss per image (B,)
Objective = Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]


def cross_entropy(logits: Mapping[str, Tensor], specialty: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of each image against the head of its own specialty.

    Args:
        logits: {specialty: (B, K)} float32; every head on every image.
        specialty: (B,) int64, the position of the image's specialty among the sorted names.
        label: (B,) int64 in [0, K).

    Returns:
        (B,) float32, ≥ 0.

    Guarantees:
        - The loss of an image depends on that image, its label and the parameters alone.
        - A head gets a zero gradient from images of other specialties.
    """
    total = torch.zeros(len(label))
    for index, name in enumerate(sorted(logits)):
        mine = specialty == index
        # Rows of other specialties are computed and multiplied by zero: Opacus needs one gradient row per image.
        loss = functional.cross_entropy(logits[name], torch.where(mine, label, 0), reduction="none")
        total = total + torch.where(mine, loss, 0.0)
    return total


OBJECTIVES: dict[str, Objective] = {"cross-entropy": cross_entropy}

_BATCH_LOSSES = ("contrastive", "infonce", "clip", "siglip", "in-batch")


def resolve_objective(name: str) -> Objective:
    """The objective registered as ``name``.

    Raises:
        PrivacyError: it is not registered; for losses over the batch, with the reason.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    why = ""
    if any(word in name.lower() for word in _BATCH_LOSSES):
        why = (
            ": a loss over the batch puts every patient into every other patient's gradient, so that clipping "
            "bounds nothing and epsilon would be wrong"
        )
    raise PrivacyError(f"privacy.objective {name!r} cannot run{why}; use one of {sorted(OBJECTIVES)}")
