"""What trains: ``heads`` alone, or the image tower's ``projection`` as well. Everything before it is frozen.

The frozen part turns pixels into features once; only the trainable part runs in every step. ``TRAINABLE`` says,
for each mode, where the cut lies.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clinifed.config import Specialty
from clinifed.errors import ModelError
from clinifed.models.backbone import Backbone
from clinifed.models.heads import build_heads, zero_shot_heads

__all__ = ["TRAINABLE", "GlobalModel", "TrainablePart", "build_trainable"]

# mode → does the shared trunk hold the projection (cut before it), or only the heads (cut after it)?
TRAINABLE: dict[str, bool] = {"heads": False, "projection": True}


class TrainablePart(nn.Module):
    """Features (B, F) → L2-normalised embedding (B, D) → logits {specialty: (B, K)}.

    Its state dict is what a federation shares: ``trunk.projection.weight`` (D, F) where the projection trains,
    and ``heads.<specialty>.weight`` (K, D), ``heads.<specialty>.bias`` (K,) for every specialty.
    """

    def __init__(self, heads: nn.ModuleDict, projection: nn.Linear | None) -> None:
        super().__init__()
        self.trunk = nn.ModuleDict({} if projection is None else {"projection": projection})
        self.heads = heads

    def embed(self, features: Tensor) -> Tensor:
        """Features (B, F) → L2-normalised embedding (B, D); the identity where only heads train."""
        if "projection" not in self.trunk:
            return features
        return functional.normalize(self.trunk["projection"](features), dim=-1)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Logits {specialty: (B, K)} of ``features`` (B, F), every head on every row."""
        embedding = self.embed(features)
        return {name: head(embedding) for name, head in self.heads.items()}


class GlobalModel(nn.Module):
    """Pixels (B, 3, S, S) → embedding (B, D) and logits {specialty: (B, K)}: what is evaluated and exported."""

    def __init__(self, backbone: Backbone, part: TrainablePart) -> None:
        super().__init__()
        self.visual: Any = backbone.model.visual  # open_clip's TimmModel
        self.part = part

    def features(self, pixels: Tensor) -> Tensor:
        """What the frozen part makes of ``pixels``: the features (B, F) that the trainable part reads."""
        if "projection" in self.part.trunk:
            features: Tensor = self.visual.trunk(pixels)
            return features
        return functional.normalize(self.visual(pixels), dim=-1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Embedding (B, D), L2-normalised, and logits {specialty: (B, K)}."""
        embedding = self.part.embed(self.features(pixels))
        return embedding, {name: head(embedding) for name, head in self.part.heads.items()}


def build_trainable(
    backbone: Backbone,
    specialties: Mapping[str, Specialty],
    train: str,
    temperature: float,
    state: Mapping[str, Tensor] | None = None,
) -> TrainablePart:
    """The trainable part at its start (zero-shot), or with ``state`` loaded.

    Raises:
        ModelError: ``train`` is not in :data:`TRAINABLE`, or ``state`` has other names or shapes.
    """
    if train not in TRAINABLE:
        raise ModelError(f"training.train: {train!r} is not one of {sorted(TRAINABLE)}")
    projection = None
    if TRAINABLE[train]:
        source = backbone.projection()
        projection = nn.Linear(source.in_features, source.out_features, bias=False)
        with torch.no_grad():
            projection.weight.copy_(source.weight)
    start = zero_shot_heads(backbone, specialties, temperature)
    embed_dim = next(iter(start.values())).shape[1]
    part = TrainablePart(build_heads(specialties, embed_dim), projection)
    part.load_state_dict({**part.state_dict(), **start})
    if state is not None:
        try:
            part.load_state_dict(dict(state))
        except RuntimeError as error:
            raise ModelError(f"the parameters do not fit this model: {error}") from error
    return part
