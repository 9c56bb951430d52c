"""Per-specialty heads: one linear layer each, which starts as BiomedCLIP's own zero-shot classifier."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from clinifed.config import Specialty
from clinifed.messages import head_name
from clinifed.models.backbone import Backbone

__all__ = ["build_heads", "prompt_matrix", "zero_shot_heads"]


def prompt_matrix(backbone: Backbone, specialty: Specialty) -> Tensor:
    """One L2-normalised embedding per label, (K, D) float32: the mean of the label's prompt embeddings."""
    rows = [backbone.encode_text(prompts).mean(dim=0) for prompts in specialty.labels.values()]
    return functional.normalize(torch.stack(rows), dim=-1)


def zero_shot_heads(backbone: Backbone, specialties: Mapping[str, Specialty], temperature: float) -> dict[str, Tensor]:
    """Head parameters for which ``softmax(head(embedding))`` is zero-shot classification.

    ``logits = temperature · embedding · promptsᵀ``: weight (K, D) holds ``temperature · prompts``, bias (K,) is 0.
    The temperature changes no zero-shot decision; it sets how steep the loss is where training starts.
    """
    state = {}
    for name, specialty in specialties.items():
        state[head_name(name, "weight")] = temperature * prompt_matrix(backbone, specialty)
        state[head_name(name, "bias")] = torch.zeros(len(specialty.labels))
    return state


def build_heads(specialties: Mapping[str, Specialty], dims: int, bias: bool = True) -> nn.ModuleDict:
    """Untrained heads, rows (B, dims) → logits (B, K), keyed by specialty; load the zero-shot state next.

    Args:
        bias: not where the rows end in a constant.
    """
    return nn.ModuleDict({name: nn.Linear(dims, len(s.labels), bias) for name, s in specialties.items()})
