"""Gradients of patients as sums of outer products: what they come to, and how exactly."""

import pytest
import torch

from clinifed.privacy.patient_means import Groups, Outer


@pytest.mark.parametrize("images", [[2, 2, 2], [1, 3, 2, 1]], ids=["as many each", "uneven"])
def test_what_is_joined_is_in_the_order_of_the_patients(images):
    groups = Groups(torch.repeat_interleave(torch.arange(len(images)), torch.tensor(images)))
    rows = torch.arange(sum(images) * 5.0).view(-1, 5)
    expected = torch.stack([part.mean(dim=0) for part in rows.split(images)])
    assert torch.equal(groups.mean(rows), expected)
    assert torch.equal(groups.mean(rows.T.contiguous().T), expected)


def test_the_norm_of_images_that_cancel_is_not_above_what_is_left():
    """Two images whose gradients are nearly opposite: what remains is far below either of them."""
    back = torch.randn(1, 40, generator=torch.Generator().manual_seed(3))
    sent = torch.randn(1, 50, generator=torch.Generator().manual_seed(4))
    groups = Groups(torch.zeros(2).long())
    gradient = Outer(torch.cat([back, -back * (1 + 1e-3)]), torch.cat([sent, sent]), groups, (40,))
    formed = (gradient.backprops.double().T @ gradient.sent.double() / 2).norm() ** 2
    assert gradient.squared_norms().item() == pytest.approx(formed.item(), rel=1e-5)
