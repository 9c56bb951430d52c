"""The model as it is deployed: the trained one, and the base model's zero-shot answer baked in beside it.

The base model's class prompts become one matrix per specialty, so that a hospital needs no text tower, and can see at
every image what the model said before it was trained.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from clinifed.config import Specialty, Training
from clinifed.errors import ExportError
from clinifed.models.adapters import GlobalModel, TrainablePart
from clinifed.models.backbone import Backbone
from clinifed.models.heads import prompt_matrix
from clinifed.models.trunk import Tail, Trunk, build_trunk

__all__ = ["DeployedModel", "TextTower", "deploy"]


class DeployedModel(nn.Module):
    """Pixels (B, 3, S, S) → embedding (B, D), and two kinds of logits {specialty: (B, K)}: trained, and zero-shot."""

    def __init__(
        self,
        model: GlobalModel,
        prompts: Mapping[str, Tensor],
        base: Trunk | None,
        temperature: float,
        zero_shot_heads: Collection[str] = (),
    ) -> None:
        """Put the parts together.

        Args:
            model: the trained model.
            prompts: of each exported specialty, the L2-normalised prompt embeddings (K, D).
            base: the base model's own trunk, where the trunk was trained; None where it was not.
            temperature: factor of the zero-shot logits, as in training.
            zero_shot_heads: specialties whose trained head is left out; they answer zero-shot.
        """
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.zero_shot_heads = frozenset(zero_shot_heads)
        self.specialties = tuple(prompts)
        for name, matrix in prompts.items():
            self.register_buffer(f"prompts_{name}", matrix)
        self.base = base

    @property
    def shows_zero_shot(self) -> bool:
        """Whether the graph gives zero-shot beside the trained logits: not where that is a second tower's work."""
        return not isinstance(self.base, Tail)

    def prompts(self, specialty: str) -> Tensor:
        """The baked prompt matrix (K, D) of ``specialty``; its rows have length 1."""
        matrix: Tensor = getattr(self, f"prompts_{specialty}")
        return matrix

    def forward(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Embedding (B, D), L2-normalised; logits; and the base model's zero-shot logits."""
        features = self.model.features(pixels)
        embedding = self.model.part.embed(features)
        base = embedding if self.base is None else self.base(features)
        zero_shot = {name: self.temperature * functional.linear(base, self.prompts(name)) for name in self.specialties}
        heads = self.model.part.heads
        logits = {
            name: zero_shot[name] if name in self.zero_shot_heads else heads[name](embedding)
            for name in self.specialties
        }
        return embedding, logits, zero_shot


class TextTower(nn.Module):
    """Token ids (B, L) int64 → L2-normalised embedding (B, D): for prompts that are not baked in."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.text = backbone.model.text

    def forward(self, tokens: Tensor) -> Tensor:
        """Embedding (B, D)."""
        return functional.normalize(self.text(tokens), dim=-1)


@torch.no_grad()
def deploy(
    model: GlobalModel,
    backbone: Backbone,
    specialties: Mapping[str, Specialty],
    training: Training,
    only: Sequence[str] | None = None,
    zero_shot_heads: Collection[str] = (),
) -> DeployedModel:
    """``model`` with the prompts of ``only`` (default: every specialty), in evaluation mode.

    Raises:
        ExportError: ``only`` names a specialty the checkpoint does not have, or none.
    """
    names = list(specialties) if only is None else list(dict.fromkeys(only))
    unknown = [name for name in names if name not in specialties]
    if unknown or not names:
        raise ExportError(
            f"specialty {', '.join(unknown) or 'list is empty'}: the checkpoint has {', '.join(specialties)}"
        )
    model = GlobalModel(backbone, TrainablePart(model.part.heads, model.part.trunk.merged()))
    own = build_trunk(backbone, training).merged()
    trained = training.train != "heads"
    prompts = {name: prompt_matrix(backbone, specialties[name]) for name in names}
    return DeployedModel(model, prompts, own if trained else None, training.temperature, zero_shot_heads).eval()
