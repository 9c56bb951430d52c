"""Adapters of low rank: they start as nothing, their fixed half is the same everywhere, and merging is exact."""

import copy

import pytest
import torch
from torch import nn

from clinifed.models.low_rank import LowRank, merge, wrap


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.Sequential(nn.GELU(), nn.Linear(10, 8, bias=False))).requires_grad_(
        False
    )


def adapted(scale: float) -> nn.Sequential:
    module = small()
    wrap(module, 3)
    for name, parameter in module.named_parameters():
        if name.endswith("up.weight"):
            parameter.data = scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return module


def test_an_adapter_starts_as_nothing_and_its_up_half_alone_trains():
    module, x = small(), torch.randn(4, 12)
    before = module(x)
    wrap(module, 3)
    assert torch.equal(module(x), before)
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["0.up.weight", "1.1.up.weight"]


def test_the_fixed_half_depends_on_the_layers_name_alone():
    one, other = adapted(0.0), adapted(1.0)
    assert torch.equal(one[0].down.weight, other[0].down.weight)
    assert not torch.equal(one[0].down.weight[:, :10], one[1][1].down.weight)
    # N(0, 1/in): a row has length about 1
    wide = LowRank(nn.Linear(4096, 2), 8, "wide").down.weight
    assert wide.norm(dim=1).sub(1).abs().max() < 0.05
    assert wide.double().sum().item() == pytest.approx(-4.7086, abs=1e-3), "another constant than other sites draw"


def test_merge_computes_what_the_adapters_did():
    module, x = adapted(0.7), torch.randn(64, 12)
    expected = module(x)
    plain = copy.deepcopy(module)
    merge(plain)
    assert [type(m) for m in plain.modules() if not isinstance(m, nn.Sequential)] == [nn.Linear, nn.GELU, nn.Linear]
    assert (expected - small()(x)).abs().max() > 0.1
    torch.testing.assert_close(plain(x), expected, rtol=1e-6, atol=2e-6)


def test_the_mean_of_adapters_is_the_adapter_of_the_mean():
    """What holding one half fixed is for: averaging is exact."""
    first, second, x = adapted(0.3), adapted(1.1), torch.randn(5, 12)
    mean = adapted(0.0)
    mean[0].up.weight.data = (first[0].up.weight + second[0].up.weight) / 2
    torch.testing.assert_close(mean[0](x), (first[0](x) + second[0](x)) / 2, rtol=1e-5, atol=1e-6)
