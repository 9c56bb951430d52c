"""Losses that are sums over images against fixed prompts. Anything else may not run under differential privacy.

Clipping bounds what one patient changes only if the patient's gradient depends on that patient alone. A contrastive
loss over the batch puts every patient into every other patient's denominator: removing one patient moves the clipped
sum by up to twice the batch size times C, and Opacus cannot notice. So only the objectives of ``OBJECTIVES`` run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from clinifed.config import MAX_LABELS, SEPARATOR
from clinifed.errors import PrivacyError

__all__ = [
    "OBJECTIVES",
    "Objective",
    "cross_entropy",
    "encode_labels",
    "label_counts",
    "label_matrix",
    "multi_label_bce",
    "resolve_objective",
    "siglip_public_negatives",
]

Loss = Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """A loss per image, and what its labels are.

    Called with logits {specialty: (B, K)} float32, the specialty (B,) int64 as a position among the sorted names, and
    the label (B,) int64; returns (B,) float32.
    """

    loss: Loss
    labels: Literal["one", "many"]  # the label is a class index, or a bit set: bit k is set where label k holds

    def __call__(self, logits: Mapping[str, Tensor], specialty: Tensor, label: Tensor) -> Tensor:
        """Loss of each image, (B,) float32."""
        return self.loss(logits, specialty, label)


def _own_head(
    logits: Mapping[str, Tensor], specialty: Tensor, label: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """``loss`` (logits (B, K), label (B,)) → (B,) of each image on the head of its own specialty."""
    total = torch.zeros(len(label), device=label.device)
    for index, name in enumerate(sorted(logits)):
        mine = specialty == index
        # Rows of other specialties are computed and multiplied by zero: Opacus needs one gradient row per image.
        total = total + torch.where(mine, loss(logits[name], torch.where(mine, label, 0)), 0.0)
    return total


def cross_entropy(logits: Mapping[str, Tensor], specialty: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of each image against the head of its own specialty: exactly one label holds.

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
    return _own_head(logits, specialty, label, lambda z, y: functional.cross_entropy(z, y, reduction="none"))


def multi_label_bce(logits: Mapping[str, Tensor], specialty: Tensor, label: Tensor) -> Tensor:
    """Binary cross-entropy, summed over the K labels of the image's own specialty: any number of them holds.

    Args:
        logits, specialty: as in :func:`cross_entropy`.
        label: (B,) int64, bit k set where label k holds; 0 where none does.

    Returns:
        (B,) float32, ≥ 0.

    Guarantees:
        - As :func:`cross_entropy`.
    """

    def loss(z: Tensor, bits: Tensor) -> Tensor:
        held = label_matrix(bits, z.shape[1]).to(z.dtype)
        return functional.binary_cross_entropy_with_logits(z, held, reduction="none").sum(dim=1)

    return _own_head(logits, specialty, label, loss)


def siglip_public_negatives(logits: Mapping[str, Tensor], specialty: Tensor, label: Tensor) -> Tensor:
    """Sigmoid loss of Zhai et al. 2023 (arXiv 2303.15343), with public prompts as the only negatives.

    −log σ(z) for the prompt of the image's own label, −log σ(−z) for every other prompt of its specialty. The paper
    takes the texts of the other images of the batch as negatives: those are other patients' data, and are not used.

    Args:
        logits, specialty, label: as in :func:`cross_entropy`.

    Returns:
        (B,) float32, ≥ 0.

    Guarantees:
        - As :func:`cross_entropy`.
    """

    def loss(z: Tensor, own: Tensor) -> Tensor:
        sign = 2.0 * functional.one_hot(own, z.shape[1]) - 1.0
        return -functional.logsigmoid(sign * z).sum(dim=1)

    return _own_head(logits, specialty, label, loss)


OBJECTIVES: dict[str, Objective] = {
    "cross-entropy": Objective(cross_entropy, "one"),
    "multi-label-bce": Objective(multi_label_bce, "many"),
    "siglip-public-negatives": Objective(siglip_public_negatives, "one"),
}

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


def encode_labels(objective: Objective, labels: Sequence[str], text: str) -> int:
    """``text`` of a manifest as the objective reads it: a class index, or a bit set of names joined by ``|``.

    Args:
        labels: the K names of the specialty, in the order of the logits.
        text: one name; for labels "many" any number of them, and none of them holds where it is blank.

    Raises:
        KeyError: a name that is not among ``labels``.
        PrivacyError: more labels than a bit set holds.
    """
    position = {name: index for index, name in enumerate(labels)}
    if objective.labels == "one":
        return position[text]
    if len(labels) > MAX_LABELS:
        raise PrivacyError(f"{len(labels)} labels: one specialty holds at most {MAX_LABELS} of them; split it")
    held = {position[name] for name in text.split(SEPARATOR)} if text.strip() else set()
    return sum(1 << index for index in held)


def label_matrix(label: Tensor, count: int) -> Tensor:
    """Bit sets (B,) int64 → (B, ``count``) bool: whether label k holds."""
    return (label.unsqueeze(1) >> torch.arange(count, device=label.device)) & 1 == 1


def label_counts(objective: Objective, label: Tensor, count: int) -> list[int]:
    """How many of ``label`` (B,) hold each of ``count`` labels."""
    if objective.labels == "one":
        return [int(n) for n in torch.bincount(label, minlength=count)]
    return [int(n) for n in label_matrix(label, count).sum(dim=0)]
