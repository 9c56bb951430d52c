"""Objectives: each image's loss depends on that image alone; what does not may not run."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from clinifed.errors import PrivacyError
from clinifed.privacy.audit_neighbours import clipped_sum, neighbour_shift, without_patient
from clinifed.privacy.engine import PatientTensors
from clinifed.privacy.objectives import (
    MAX_LABELS,
    OBJECTIVES,
    Objective,
    encode_labels,
    label_counts,
    label_matrix,
    resolve_objective,
)

C = 0.5


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("count", [16, 64, 256])
def test_other_images_do_not_change_an_images_loss(objective, count):
    logits = {"a": torch.randn(count, 2), "b": torch.randn(count, 3)}
    specialty, label = torch.randint(0, 2, (count,)), torch.randint(0, 2, (count,))
    before = objective(logits, specialty, label)
    changed = {k: torch.cat([v[:1], 9 * torch.randn_like(v[1:])]) for k, v in logits.items()}
    assert before.shape == (count,)
    assert objective(changed, specialty, label)[0] == before[0]


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_head_gets_no_gradient_from_other_specialties(objective):
    logits = {"a": torch.randn(4, 2, requires_grad=True), "b": torch.randn(4, 3, requires_grad=True)}
    objective(logits, torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 0, 2])).sum().backward()
    assert torch.count_nonzero(logits["b"].grad[:3]) == 0
    assert torch.count_nonzero(logits["b"].grad[3]) > 0


@pytest.mark.parametrize("both", [False, True], ids=["one specialty", "two specialties"])
@pytest.mark.parametrize("projection", [False, True], ids=["heads", "projection"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("images", [1, 2, 20, 200])
@pytest.mark.parametrize("patients", [16, 64, 256])
def test_one_patient_moves_the_sum_by_at_most_the_clip(build_part, patients, images, objective, projection, both):
    shift = neighbour_shift(
        objective, patients, images, module=build_part(projection), both_specialties=both, max_grad_norm=C
    )
    assert shift <= 1 + 1e-4
    assert shift > 0.5  # or the test would hold for a step that ignores the patient


def in_batch_infonce(texts: torch.Tensor) -> Objective:
    """The symmetric contrastive loss of CLIP over the batch; each patient's label picks the patient's own text."""

    def loss(logits, specialty, label):
        image = functional.normalize(logits["radiology"], dim=1)
        similarity = 100 * image @ texts[label].T  # CLIP's own scale
        own = torch.arange(len(label))
        by_image = functional.cross_entropy(similarity, own, reduction="none")
        return (by_image + functional.cross_entropy(similarity.T, own, reduction="none")) / 2

    return Objective(loss, "one")


def test_an_in_batch_loss_fails_the_same_bound():
    """Control, through the same step: each row is clipped, and yet one patient moves the sum by more than 20 C."""
    patients, removed = 64, 63
    torch.manual_seed(0)
    module = nn.ModuleDict({"radiology": nn.Linear(8, 8, bias=False)})
    nn.init.eye_(module["radiology"].weight)

    class Embedder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, features):
            return {"radiology": self.inner["radiology"](features)}

    # The others fit their own texts, up to a little; the text of the one that is removed fits every image better.
    texts = functional.normalize(torch.eye(8)[:1] + torch.eye(8)[1:2] + 0.01 * torch.randn(patients, 8), dim=1)
    texts[removed] = torch.eye(8)[0]
    features = torch.eye(8)[:1] + 0.01 * torch.randn(patients, 8)
    features[removed] = torch.eye(8)[2]
    number = torch.arange(patients)
    data = PatientTensors(features, number, torch.zeros_like(number), number)
    objective = in_batch_infonce(texts)
    shift = clipped_sum(Embedder(), data, objective, C) - clipped_sum(
        Embedder(), without_patient(data, removed), objective, C
    )
    assert shift.norm() > 20 * C


def test_siglip_is_the_sum_over_own_and_other_prompts():
    z = torch.tensor([[2.0, -1.0, 0.5]])
    expected = -functional.logsigmoid(torch.tensor([-2.0, -1.0, -0.5])).sum()
    loss = OBJECTIVES["siglip-public-negatives"]({"a": z}, torch.tensor([0]), torch.tensor([1]))
    assert torch.allclose(loss, expected)


def test_multi_label_is_the_sum_over_labels_that_hold_or_not():
    z = torch.tensor([[2.0, -1.0, 0.5]]).repeat(2, 1)
    signs = torch.tensor([[1.0, -1.0, 1.0], [-1.0, -1.0, -1.0]])
    loss = OBJECTIVES["multi-label-bce"]({"a": z}, torch.tensor([0, 0]), torch.tensor([0b101, 0]))
    assert torch.allclose(loss, -functional.logsigmoid(signs * z).sum(dim=1))


ONE, MANY = OBJECTIVES["cross-entropy"], OBJECTIVES["multi-label-bce"]
NAMES = ["effusion", "mass", "nodule"]


@pytest.mark.parametrize(
    ("objective", "text", "code"),
    [
        (ONE, "mass", 1),
        (MANY, "mass", 0b010),
        (MANY, "nodule|effusion", 0b101),
        (MANY, "mass|mass", 0b010),
        (MANY, "", 0),
        (MANY, "  ", 0),
    ],
)
def test_labels_of_a_manifest_are_encoded(objective, text, code):
    assert encode_labels(objective, NAMES, text) == code


@pytest.mark.parametrize(
    ("objective", "text"), [(ONE, ""), (ONE, "mass|nodule"), (ONE, "x"), (MANY, "mass|x"), (MANY, "mass|")]
)
def test_an_unknown_label_is_an_error(objective, text):
    with pytest.raises(KeyError):
        encode_labels(objective, NAMES, text)


def test_a_bit_set_reaches_to_its_last_label_and_not_beyond():
    names = [f"l{i}" for i in range(MAX_LABELS)]
    highest = torch.tensor([encode_labels(MANY, names, "l0|l61")])
    assert label_matrix(highest, MAX_LABELS).nonzero()[:, 1].tolist() == [0, 61]
    with pytest.raises(PrivacyError, match="63 labels: one specialty holds at most 62"):
        encode_labels(MANY, [*names, "one more"], "l0")


def test_labels_are_counted_as_the_objective_reads_them():
    assert label_counts(ONE, torch.tensor([0, 2, 2]), 4) == [1, 0, 2, 0]
    assert label_counts(MANY, torch.tensor([0b101, 0b001, 0]), 4) == [2, 0, 1, 0]


@pytest.mark.parametrize("name", ["clip-contrastive", "InfoNCE", "in-batch siglip"])
def test_a_loss_over_the_batch_is_refused_and_says_why(name):
    with pytest.raises(PrivacyError, match="every other patient's gradient"):
        resolve_objective(name)


def test_an_unregistered_objective_is_refused():
    with pytest.raises(PrivacyError, match="use one of"):
        resolve_objective("mse")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_registered_objective_resolves(name):
    assert resolve_objective(name) is OBJECTIVES[name]
