"""The first audit: how far one patient moves the clipped sum, through the real step; and what any audit returns."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clinifed.privacy.engine import Mechanism, PatientTensors, private_step
from clinifed.privacy.objectives import Objective

__all__ = [
    "AuditResult",
    "Neighbours",
    "clipped_sum",
    "flat",
    "neighbour_audit",
    "neighbour_shift",
    "without_patient",
]

_QUIET = 1e-7  # a sigma that leaves the clipped sum readable: the grid's steps of 2^-20 C hide it
_SLACK = 1e-4  # of the clip: sums run in float32, and the grid rounds
_WIDTH = 8  # features of the patients that neighbours are tried on


@dataclass(frozen=True)
class AuditResult:
    """What an audit found."""

    audit: str  # its name
    passed: bool
    says: str  # one line, for people

    def to_dict(self) -> dict[str, Any]:
        """As plain data, figures included."""
        return asdict(self)


@dataclass(frozen=True)
class Neighbours(AuditResult):
    """How far one patient moves the clipped sum, in C."""

    cases: int
    largest: float
    smallest: float  # every patient tried is loud: near 0, the step would not see patients at all


class _Probe(nn.Module):
    """What trains in a federation, small: a projection if wished, and a head for each of two specialties."""

    def __init__(self, projection: bool = False) -> None:
        super().__init__()
        self.trunk = nn.Linear(_WIDTH, _WIDTH, bias=False) if projection else nn.Identity()
        self.heads = nn.ModuleDict({"cardiology": nn.Linear(_WIDTH, 2), "radiology": nn.Linear(_WIDTH, 3)})

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        embedding = self.trunk(features)
        return {name: head(embedding) for name, head in self.heads.items()}


def flat(module: nn.Module) -> Tensor:
    """All parameters in one row."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def clipped_sum(
    module: nn.Module, data: PatientTensors, objective: Objective, max_grad_norm: float, batch_size: int = 1 << 30
) -> Tensor:
    """The sum of the patients' clipped gradients, flat: read from a real step with next to no noise.

    ``module`` is put back as it was. For synthetic patients only: this is a release without noise.
    """
    state = {name: t.clone() for name, t in module.state_dict().items()}
    before = flat(module)
    private_step(module, data, objective, Mechanism(_QUIET, max_grad_norm, 1), 1.0, batch_size)
    moved = before - flat(module)
    module.load_state_dict(state)
    return moved


def without_patient(data: PatientTensors, patient: int) -> PatientTensors:
    """The neighbouring data set: all rows of one patient removed, the others numbered anew."""
    keep = data.patient != patient
    number = data.patient[keep] - (data.patient[keep] > patient).long()
    return PatientTensors(data.features[keep], number, data.specialty[keep], data.label[keep])


def neighbour_shift(
    objective: Objective,
    patients: int,
    images: int,
    *,
    module: nn.Module | None = None,
    both_specialties: bool = False,
    max_grad_norm: float = 1.0,
) -> float:
    """How far removing one patient moves the clipped sum, in C: at most 1 where patient-level privacy holds.

    The patient is the worst we can think of: alike images, loud, and labelled against the head.

    Args:
        patients: n, with the one that is removed; the others have two images each.
        images: of the patient that is removed.
        module: features (B, 8) → logits {specialty: (B, K)} of two specialties; by default two linear heads.
        both_specialties: the patient's images alternate between the two; otherwise all are of the first.
    """
    module = module or _Probe()
    generator = torch.Generator().manual_seed(patients + images)
    patient = torch.repeat_interleave(torch.arange(patients), torch.tensor([2] * (patients - 1) + [images]))
    rows, loud = len(patient), patient == patients - 1
    features = torch.randn(rows, _WIDTH, generator=generator)
    features[loud] = 100 * max_grad_norm * features[-1]
    specialty = torch.randint(0, 2, (rows,), generator=generator)
    specialty[loud] = torch.arange(images) % 2 if both_specialties else 0
    with torch.no_grad():
        logits = module(features)
    every = sorted(logits)
    against = torch.stack(
        [
            logits[name].argmin(dim=1)
            if objective.labels == "one"
            else ((logits[name] < 0).long() << torch.arange(logits[name].shape[1])).sum(dim=1)
            for name in every
        ]
    )  # (specialties, R)
    label = torch.where(loud, against[specialty, torch.arange(rows)], torch.randint(0, 2, (rows,), generator=generator))
    data = PatientTensors(features, patient, specialty, label)
    neighbour = without_patient(data, patients - 1)
    shift = clipped_sum(module, data, objective, max_grad_norm) - clipped_sum(
        module, neighbour, objective, max_grad_norm
    )
    return float(shift.double().norm()) / max_grad_norm


def neighbour_audit(
    objective: Objective,
    max_grad_norm: float = 1.0,
    patients: Sequence[int] = (16, 64, 256),
    images: Sequence[int] = (1, 2, 20, 200),
) -> Neighbours:
    """:func:`neighbour_shift` over sizes, heads with and without a projection, one and two specialties."""
    shifts = [
        neighbour_shift(objective, n, k, module=_Probe(projection), both_specialties=both, max_grad_norm=max_grad_norm)
        for n in patients
        for k in images
        for projection in (False, True)
        for both in (False, True)
    ]
    largest, smallest = max(shifts), min(shifts)
    return Neighbours(
        "neighbour shift",
        smallest > 0.5 and largest <= 1 + _SLACK,
        f"one patient moves the clipped sum by {smallest:.4f} C to {largest:.4f} C; C is the limit",
        len(shifts),
        largest,
        smallest,
    )
