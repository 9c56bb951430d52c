"""The model a federation trains: a frozen tower, a trunk that may train, and a head for every specialty.

The frozen part turns pixels into features once; only the trainable part runs in every step.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clinifed.config import Specialty, Training
from clinifed.errors import ModelError
from clinifed.models.backbone import Backbone
from clinifed.models.heads import build_heads, zero_shot_heads
from clinifed.models.trunk import Trunk, build_trunk

__all__ = ["FrozenPart", "GlobalModel", "TrainablePart", "build_trainable"]


class TrainablePart(nn.Module):
    """Features (B, …) → L2-normalised embedding (B, D) → logits {specialty: (B, K)}.

    What a federation shares of it is :meth:`shared`: ``trunk.*`` as far as the trunk trains, and
    ``heads.<specialty>.weight`` (K, D), ``heads.<specialty>.bias`` (K,) for every specialty.
    """

    def __init__(self, heads: nn.ModuleDict, trunk: Trunk | None = None) -> None:
        super().__init__()
        self.trunk = trunk or Trunk()
        self.heads = heads

    def embed(self, features: Tensor) -> Tensor:
        """Features (B, …) → L2-normalised embedding (B, D)."""
        embedding: Tensor = self.trunk(features)
        return embedding

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Logits {specialty: (B, K)} of ``features``, every head on every row."""
        embedding = self.embed(features)
        return {name: head(embedding) for name, head in self.heads.items()}

    def shared(self) -> dict[str, Tensor]:
        """Copies of all parameters that train, by their shared names, in the CPU's memory."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_shared(self, state: Mapping[str, Tensor]) -> None:
        """Set the parameters that train.

        Raises:
            ModelError: names or shapes are not those of :meth:`shared`; nothing is set then.
        """
        mine = {name: p for name, p in self.named_parameters() if p.requires_grad}
        problems = [f"{name}: missing" for name in sorted(mine.keys() - state.keys())]
        problems += [f"{name}: unknown here" for name in sorted(state.keys() - mine.keys())]
        problems += [
            f"{name}: {tuple(state[name].shape)} instead of {tuple(p.shape)}"
            for name, p in mine.items()
            if name in state and state[name].shape != p.shape
        ]
        if problems:
            raise ModelError(f"the parameters do not fit this model: {'; '.join(problems)}")
        for name, parameter in mine.items():
            parameter.copy_(state[name])


class GlobalModel(nn.Module):
    """Pixels (B, 3, S, S) → embedding (B, D) and logits {specialty: (B, K)}: what is evaluated and exported."""

    def __init__(self, backbone: Backbone, part: TrainablePart) -> None:
        super().__init__()
        self.visual: Any = backbone.visual  # open_clip's TimmModel
        self.part = part

    def features(self, pixels: Tensor) -> Tensor:
        """What the frozen part makes of ``pixels``: the features (B, …) that the trainable part reads."""
        return self.part.trunk.frozen(self.visual, pixels)

    def forward(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Embedding (B, D), L2-normalised, and logits {specialty: (B, K)}."""
        embedding = self.part.embed(self.features(pixels))
        return embedding, {name: head(embedding) for name, head in self.part.heads.items()}


class FrozenPart:
    """Pixels → features, as :class:`GlobalModel` makes them; the image tower is loaded with the first pixels."""

    def __init__(self, backbone: Backbone, part: TrainablePart) -> None:
        self._backbone, self.part = backbone, part

    def features(self, pixels: Tensor) -> Tensor:
        """The features (B, …) that the trainable part reads."""
        return self.part.trunk.frozen(self._backbone.visual.to(pixels.device), pixels)


def build_trainable(
    backbone: Backbone,
    specialties: Mapping[str, Specialty],
    training: Training,
    state: Mapping[str, Tensor] | None = None,
) -> TrainablePart:
    """The trainable part at its start (zero-shot), or with ``state`` loaded.

    Raises:
        ModelError: the backbone has no such part, or ``state`` has other names or shapes.
    """
    trunk = build_trunk(backbone, training)
    start = zero_shot_heads(backbone, specialties, training.temperature)
    embed_dim = next(iter(start.values())).shape[1]
    part = TrainablePart(build_heads(specialties, embed_dim), trunk)
    part.load_shared({**part.shared(), **start})
    if state is not None:
        part.load_shared(state)
    return part
