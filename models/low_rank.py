"""LoRA on a frozen linear layer, with the half that is drawn at random held fixed.

``y = W x + B A x``. ``A`` (r, in) is a public constant and ``B`` (out, r) trains from zero (FFA-LoRA, Sun et al.,
arXiv 2403.12313). With both halves in training, the mean of the sites' products is not the product of their means, and
noise on one half multiplies the noise on the other; with one half fixed, averaging is exact, noise stays additive and
half as many coordinates carry it.
"""

import math
from collections.abc import Callable
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["LowRank", "merge", "wrap"]


class LowRank(nn.Module):
    """A linear layer with an adapter of rank r beside it; only ``up.weight`` (out, r) trains.

    Args:
        base: (in → out), frozen.
        rank: r, at least 1.
        name: of the layer; says which public constant ``down`` is.
    """

    def __init__(self, base: nn.Linear, rank: int, name: str) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, device="meta")
        self.down.weight = nn.Parameter(_constant(rank, base.in_features, name), requires_grad=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        y: Tensor = self.base(x) + self.up(self.down(x))
        return y

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The one linear layer that computes the same: W + B A, added up in float64."""
        weight = self.base.weight.double() + self.up.weight.double() @ self.down.weight.double()
        linear = nn.Linear(self.base.in_features, self.base.out_features, self.base.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(self.base.weight.dtype), requires_grad=False)
        if self.base.bias is not None:
            linear.bias = self.base.bias
        return linear


def _constant(rank: int, width: int, name: str) -> Tensor:
    """A (r, in), N(0, 1/in) drawn by Philox from the layer's name: the same at every site, and no secret."""
    seed = int.from_bytes(sha256(f"clinifed low rank {name}".encode()).digest()[:8], "big")
    drawn = np.random.Generator(np.random.Philox(seed)).standard_normal((rank, width)) / math.sqrt(width)
    return torch.from_numpy(drawn.astype(np.float32))


def wrap(module: nn.Module, rank: int, name: str = "") -> None:
    """Put an adapter beside every linear layer below ``module``, in place; ``name`` is the path to ``module``."""
    _replace(module, name, lambda layer, path: LowRank(layer, rank, path) if type(layer) is nn.Linear else None)


def merge(module: nn.Module) -> None:
    """Fold every adapter below ``module`` into its layer, in place.

    Guarantees:
        - The merged module computes what the adapters did, up to the rounding of one float32 weight.
    """
    _replace(module, "", lambda layer, _: layer.merged() if isinstance(layer, LowRank) else None)


def _replace(module: nn.Module, path: str, new: Callable[[nn.Module, str], nn.Module | None]) -> None:
    for name, child in list(module.named_children()):
        below = f"{path}.{name}" if path else name
        if (other := new(child, below)) is not None:
            setattr(module, name, other)
        else:
            _replace(child, below, new)
