"""The model a federation trains: a frozen tower, a trunk that may train, and a head for every specialty.

The frozen part turns pixels into features once; only the trainable part runs in every step.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from clinifed.config import Specialty, Training
from clinifed.errors import ModelError
from clinifed.models.backbone import Backbone
from clinifed.models.basis import Basis, InBasis
from clinifed.models.heads import build_heads, zero_shot_heads
from clinifed.models.trunk import Trunk, build_trunk

__all__ = ["FrozenPart", "GlobalModel", "TrainablePart", "accelerator", "build_trainable"]


def accelerator() -> torch.device:
    """Where the tower and its steps are computed: the GPU where torch finds one, or else the processor.

    What is kept, compared, released or written is in the CPU's memory everywhere.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class TrainablePart(nn.Module):
    """Features (B, …) → L2-normalised embedding (B, D) → logits {specialty: (B, K)}.

    What a federation shares of it is :meth:`shared`: ``trunk.*`` as far as the trunk trains, and
    ``heads.<specialty>.weight`` (K, D), ``heads.<specialty>.bias`` (K,) for every specialty; in a basis the heads read
    its d + 1 coordinates, and are weights (K, d + 1) alone.
    """

    def __init__(self, heads: nn.ModuleDict, trunk: Trunk | None = None, basis: Basis | None = None) -> None:
        super().__init__()
        self.trunk = trunk or Trunk()
        self.basis = InBasis(basis) if basis else nn.Identity()
        self.heads = heads

    @property
    def device(self) -> torch.device:
        """Where its parameters are, all of them."""
        return next(self.parameters()).device

    def ready(self) -> Self:
        """In evaluation mode, and where towers are computed; frozen weights that it shares with one move along."""
        return self.eval().to(accelerator())

    def embed(self, features: Tensor) -> Tensor:
        """Features (B, …) → L2-normalised embedding (B, D)."""
        embedding: Tensor = self.trunk(features)
        return embedding

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Logits {specialty: (B, K)} of ``features``, every head on every row."""
        return self.classify(self.embed(features))

    def classify(self, embedding: Tensor) -> dict[str, Tensor]:
        """Logits {specialty: (B, K)} of ``embedding`` (B, D)."""
        rows = self.basis(embedding)
        return {name: head(rows) for name, head in self.heads.items()}

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
        return embedding, self.part.classify(embedding)


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
        ModelError: the backbone has no such part or no basis, or ``state`` has other names or shapes.
    """
    basis = None if training.basis == "none" else backbone.basis
    if training.basis != "none" and basis is None:
        raise ModelError(
            f"training.basis: {training.basis!r}, but no basis is at hand; make it with `clinifed basis CONFIG --out "
            "FILE`, and name the file under model.basis and, at a site, under `basis` of its policy"
        )
    trunk = build_trunk(backbone, training)
    start = zero_shot_heads(backbone, specialties, training.temperature)
    dims = next(iter(start.values())).shape[1]
    if basis is not None:
        if len(basis.mean) != dims:
            raise ModelError(f"the basis is of {len(basis.mean)} dimensions, the embedding has {dims}: another model's")
        start, dims = basis.heads(start), basis.dims
    part = TrainablePart(build_heads(specialties, dims, bias=basis is None), trunk, basis)
    part.load_shared({**part.shared(), **start})
    if state is not None:
        part.load_shared(state)
    return part
