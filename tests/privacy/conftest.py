"""A small trainable part and patients with very different numbers of images, in two specialties."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from clinifed.models.adapters import TrainablePart
from clinifed.models.trunk import Projection
from clinifed.privacy.engine import PatientTensors

Build = Callable[..., TrainablePart]


@pytest.fixture
def build_part() -> Build:
    def build(projection: bool = False) -> TrainablePart:
        torch.manual_seed(0)
        heads = nn.ModuleDict({"cardiology": nn.Linear(8, 2), "radiology": nn.Linear(8, 3)})
        return TrainablePart(heads, Projection(nn.Linear(8, 8, bias=False)) if projection else None)

    return build


@pytest.fixture
def build_patients() -> Callable[[list[int]], PatientTensors]:
    def build(images: list[int], scale: float = 1.0) -> PatientTensors:
        generator = torch.Generator().manual_seed(1)
        patient = torch.repeat_interleave(torch.arange(len(images)), torch.tensor(images))
        rows = len(patient)
        return PatientTensors(
            features=scale * torch.randn(rows, 8, generator=generator),
            patient=patient,
            specialty=torch.randint(0, 2, (rows,), generator=generator),
            label=torch.randint(0, 2, (rows,), generator=generator),
        )

    return build
