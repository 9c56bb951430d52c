"""Objectives: each image's loss depends on that image alone; what does not may not run."""

import pytest
import torch

from clinifed.errors import PrivacyError
from clinifed.privacy.objectives import OBJECTIVES, resolve_objective


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


@pytest.mark.parametrize("name", ["clip-contrastive", "InfoNCE", "in-batch siglip"])
def test_a_loss_over_the_batch_is_refused_and_says_why(name):
    with pytest.raises(PrivacyError, match="every other patient's gradient"):
        resolve_objective(name)


def test_an_unregistered_objective_is_refused():
    with pytest.raises(PrivacyError, match="use one of"):
        resolve_objective("mse")
