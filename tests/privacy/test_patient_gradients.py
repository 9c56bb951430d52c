"""Gradients per patient: those of the mean loss of each patient, whether they are formed or not."""

import copy

import pytest
import torch
from torch import nn

from clinifed.errors import PrivacyError
from clinifed.privacy.patient_gradients import Groups, Outer, PatientGradients, Sent

SIZES = [1, 3, 1, 2, 3, 1]
GROUPS = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))


class Tokens(nn.Module):
    """A norm and two layers over tokens, a third over their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first = nn.LayerNorm(6), nn.Linear(6, 5)
        self.second, self.head = nn.Linear(5, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x):
        x = x + self.second(torch.tanh(self.first(self.norm(x))))
        return self.head(x.mean(dim=1) if x.dim() == 3 else x)


def rows(tokens: int | None) -> torch.Tensor:
    shape = (len(GROUPS), 6) if tokens is None else (len(GROUPS), tokens, 6)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def loss(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x).square().sum(dim=1)


def one_by_one(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The same by autograd alone: the gradient of each patient's mean loss, (P, *shape) for each parameter."""
    found = []
    for patient in range(len(SIZES)):
        mine = copy.deepcopy(module)
        loss(mine, x[patient == GROUPS]).mean().backward()
        found.append([p.grad for p in mine.parameters()])
    return [torch.stack(of_one) for of_one in zip(*found, strict=True)]


def by_hooks(module: nn.Module, x: torch.Tensor):
    hooks = PatientGradients(module.train())
    hooks.groups = Groups(GROUPS)
    hooks.backward(loss(module, x))
    hooks.cleanup()
    return hooks.take(dict(module.named_parameters()))


@pytest.mark.parametrize("tokens", [None, 1, 7])
def test_take_returns_the_mean_over_the_patients_images(tokens):
    module = Tokens()
    expected = one_by_one(module, rows(tokens))
    factor = torch.rand(len(SIZES), generator=torch.Generator().manual_seed(2)) + 0.1
    for gradient, each in zip(by_hooks(module, rows(tokens)), expected, strict=True):
        torch.testing.assert_close(gradient.squared_norms(), each.flatten(1).square().sum(dim=1), rtol=1e-5, atol=1e-9)
        summed = (factor @ each.flatten(1)).view(each.shape[1:])
        torch.testing.assert_close(gradient.clipped_sum(factor), summed, rtol=1e-5, atol=1e-6)


def test_where_an_image_is_one_row_the_gradients_of_weights_are_not_formed():
    kinds = [type(gradient) for gradient in by_hooks(Tokens(), rows(None))]
    assert kinds.count(Outer) == 3  # of seven parameters


@pytest.mark.parametrize("tokens", [None, 7])
def test_a_factor_of_zero_leaves_a_patient_out_even_where_it_is_not_finite(tokens):
    module, x = Tokens(), rows(tokens)
    x[GROUPS == 1] = torch.nan
    factor = torch.ones(len(SIZES))
    factor[1] = 0
    others = one_by_one(module, rows(tokens))
    for gradient, each in zip(by_hooks(module, x), others, strict=True):
        assert gradient.squared_norms().isfinite().tolist() == [p != 1 for p in range(len(SIZES))]
        summed = (factor @ each.flatten(1)).view(each.shape[1:])
        torch.testing.assert_close(gradient.clipped_sum(factor), summed, rtol=1e-5, atol=1e-6)


def test_the_norm_of_images_that_cancel_is_not_above_what_is_left():
    """Two images whose gradients are nearly opposite: what remains is far below either of them."""
    back = torch.randn(1, 40, generator=torch.Generator().manual_seed(3))
    sent = torch.randn(1, 50, generator=torch.Generator().manual_seed(4))
    images = Sent(torch.cat([sent, sent]), Groups(torch.zeros(2).long()))
    gradient = Outer(torch.cat([back, -back * (1 + 1e-3)]), images)
    formed = (gradient.backprops.double().T @ images.rows.double() / 2).norm() ** 2
    assert gradient.squared_norms().item() == pytest.approx(formed.item(), rel=1e-5)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(self.layer(x))


def test_a_parameter_that_took_part_in_another_way_is_refused():
    with pytest.raises(PrivacyError, match=r"(?s)layer.weight: used more than once .*layer.bias: used more"):
        by_hooks(Twice(), rows(None))


def test_autograd_adds_up_no_gradient_of_a_parameter():
    module = Tokens()
    by_hooks(module, rows(7))
    assert all(p.grad is None for p in module.parameters())
