"""Gradients per patient: those of the mean loss of each patient, whether they are formed or not."""

import copy

import pytest
import torch
from torch import nn

from clinifed.errors import PrivacyError
from clinifed.privacy.patient_gradients import PatientGradients
from clinifed.privacy.patient_means import Groups, Outer

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


def one_by_one(module: nn.Module, x: torch.Tensor, patients: torch.Tensor = GROUPS) -> list[torch.Tensor]:
    """The same by autograd alone: the gradient of each patient's mean loss, (P, *shape) for each parameter."""
    found = []
    for patient in range(int(patients[-1]) + 1):
        mine = copy.deepcopy(module)
        loss(mine, x[patient == patients]).mean().backward()
        found.append([torch.zeros_like(p) if p.grad is None else p.grad for p in mine.parameters()])
    return [torch.stack(of_one) for of_one in zip(*found, strict=True)]


def by_hooks(module: nn.Module, x: torch.Tensor, sizes: torch.Tensor = GROUPS):
    hooks = PatientGradients(module.train())
    hooks.groups = Groups(sizes)
    hooks.backward(loss(module, x))
    hooks.cleanup()
    return hooks.take(dict(module.named_parameters()))


def assert_gradients(taken, trained, expected: list[torch.Tensor], factor: torch.Tensor) -> None:
    """``taken`` are the ``expected`` ones of ``trained``, (P, *shape) each, wherever ``factor`` is not zero."""
    each = dict(zip(trained, expected, strict=True))
    kept = factor > 0
    for parameters, gradient in taken:
        mine = [each.pop(p) for p in parameters]
        squared = sum(m.flatten(1).square().sum(dim=1) for m in mine)
        torch.testing.assert_close(gradient.squared_norms()[kept], squared[kept], rtol=1e-5, atol=1e-9)
        for one, summed in zip(mine, gradient.clipped_sums(factor, some_skipped=not bool(factor.all())), strict=True):
            torch.testing.assert_close(summed, (factor @ one.flatten(1)).view(one.shape[1:]), rtol=1e-5, atol=1e-6)
    assert not each, "a parameter without a gradient"


@pytest.mark.parametrize("tokens", [None, 1, 7])
def test_take_returns_the_mean_over_the_patients_images(tokens):
    module = Tokens()
    factor = torch.rand(len(SIZES), generator=torch.Generator().manual_seed(2)) + 0.1
    assert_gradients(by_hooks(module, rows(tokens)), module.parameters(), one_by_one(module, rows(tokens)), factor)


@pytest.mark.parametrize("tokens", [None, 7])
@pytest.mark.parametrize("images", [1, 2])
def test_patients_of_as_many_images_each_have_the_same_gradients(tokens, images):
    module, x = Tokens(), rows(tokens)[: 4 * images]
    patient = torch.arange(4).repeat_interleave(images)
    expected = one_by_one(module, x, patient)
    assert_gradients(by_hooks(module, x, patient), module.parameters(), expected, torch.tensor([0.3, 1.0, 0.1, 0.7]))


class Heads(nn.Module):
    """Heads beside each other, of which some train a bias, after a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.heads = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 2), nn.Linear(5, 4, bias=False), nn.Linear(5, 2)])
        self.heads[3].bias.requires_grad_(False)

    def forward(self, x):
        rows = torch.tanh(self.first(x))
        return torch.cat([head(rows) for head in self.heads], dim=1)


def test_layers_that_are_sent_the_same_are_one_and_none_of_their_gradients_is_formed():
    module = Heads()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    hooks = PatientGradients(module.train())
    hooks.groups = Groups(GROUPS)
    hooks.backward(loss(module, rows(None)))
    taken = hooks.take(trained)
    hooks.cleanup()
    assert {type(gradient) for _, gradient in taken} == {Outer}
    assert sorted(len(parameters) for parameters, _ in taken) == [2, 2, 4]  # no bias, the first layer, both heads
    names = list(dict(module.named_parameters()))
    expected = dict(zip(names, one_by_one(module, rows(None)), strict=True))
    factor = torch.rand(len(SIZES), generator=torch.Generator().manual_seed(5)) + 0.1
    assert_gradients(taken, trained.values(), [expected[name] for name in trained], factor)


def test_hooks_leave_nothing_on_the_module():
    module = Tokens()
    before = [set(vars(part)) for part in (*module.modules(), *module.parameters())]
    by_hooks(module, rows(7))
    assert [set(vars(part)) for part in (*module.modules(), *module.parameters())] == before
    assert not any(part._forward_hooks for part in module.modules())


@pytest.mark.parametrize("tokens", [None, 7])
def test_a_factor_of_zero_leaves_a_patient_out_even_where_it_is_not_finite(tokens):
    module, x = Tokens(), rows(tokens)
    x[GROUPS == 1] = torch.nan
    factor = torch.ones(len(SIZES))
    factor[1] = 0
    others = one_by_one(module, rows(tokens))
    taken = by_hooks(module, x)
    for _, gradient in taken:
        assert gradient.squared_norms().isfinite().tolist() == [p != 1 for p in range(len(SIZES))]
    assert_gradients(taken, module.parameters(), others, factor)


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
