"""What a part says of patients: each specialty's own images, in order, however they are batched."""

import torch

from clinifed.config import Specialty
from clinifed.evaluation import scoring
from clinifed.evaluation.scoring import logits_of, scores_of
from clinifed.models.adapters import TrainablePart
from clinifed.models.heads import build_heads
from clinifed.privacy.objectives import OBJECTIVES
from clinifed.privacy.patients import PatientTensors

NAMES = ["cardiology", "radiology"]
LABELS = {"normal": ("normal",), "abnormal": ("abnormal",)}


def part_of(*names: str) -> TrainablePart:
    torch.manual_seed(1)
    part = TrainablePart(build_heads({name: Specialty(labels=LABELS) for name in names}, 8))
    with torch.no_grad():
        for parameter in part.heads.parameters():
            parameter.normal_()
    return part


def patients() -> PatientTensors:
    rng = torch.Generator().manual_seed(2)
    patient = torch.arange(30).repeat_interleave(3)
    specialty = torch.randint(0, 2, (90,), generator=rng)
    return PatientTensors(torch.randn(90, 8, generator=rng), patient, specialty, patient % 2)


def test_batches_do_not_change_what_is_said_nor_its_order(monkeypatch) -> None:
    part, data = part_of(*NAMES), patients()
    monkeypatch.setattr(scoring, "_BATCH", 7)
    found = logits_of(part, data, NAMES)
    with torch.no_grad():
        whole = part(data.features)
    assert sorted(found) == NAMES
    for index, name in enumerate(NAMES):
        assert torch.allclose(torch.from_numpy(found[name]), whole[name][data.specialty == index].double(), atol=1e-6)


def test_a_part_is_asked_about_its_own_specialties_alone() -> None:
    data = patients()
    found = logits_of(part_of("radiology"), data, NAMES)
    assert list(found) == ["radiology"]
    assert scores_of(found, data, NAMES, OBJECTIVES["cross-entropy"])["radiology"].patients <= 30
    assert logits_of(part_of("dermatology"), data, NAMES) == {}
