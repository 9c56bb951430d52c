"""The part of the image tower that trains: nothing, the projection, adapters of low rank, or the last blocks.

Everything before it is frozen, and sees each image once. ``TRUNKS`` says, for each value of ``training.train``, where
the tower is cut and what follows the cut.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from clinifed.config import Training
from clinifed.errors import ModelError
from clinifed.models.backbone import Backbone
from clinifed.models.low_rank import merge, wrap

__all__ = ["TRUNKS", "Projection", "Tail", "Trunk", "build_trunk"]


class Trunk(nn.Module):
    """Features → L2-normalised embedding (B, D). This one trains nothing: its features are the embedding."""

    cut = "embedding"  # where the tower is cut: part of the name under which features are kept
    shape: tuple[int, ...] = ()  # of the features of one image, where they are more than one row of numbers
    checkpointing = False

    def frozen(self, visual: Any, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) → the features that this trunk reads, by the frozen part of open_clip's ``visual``."""
        return functional.normalize(visual(pixels), dim=-1)

    def forward(self, features: Tensor) -> Tensor:
        """Embedding (B, D) of ``features`` (B, D)."""
        return features

    def merged(self) -> "Trunk":
        """A trunk that computes the same, without adapters: what is exported."""
        return self


class Projection(Trunk):
    """Pooled features (B, F) → embedding, by the tower's own bias-free projection, which trains."""

    cut = "pooled"

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.projection = nn.Linear(source.in_features, source.out_features, bias=False)
        with torch.no_grad():
            self.projection.weight.copy_(source.weight)

    def frozen(self, visual: Any, pixels: Tensor) -> Tensor:
        """Pooled features (B, F)."""
        features: Tensor = visual.trunk(pixels)
        return features

    def forward(self, features: Tensor) -> Tensor:
        """Embedding (B, D) of ``features`` (B, F)."""
        return functional.normalize(self.projection(features), dim=-1)


class Tail(Trunk):
    """Tokens (B, T, W) that enter block ``first`` of a vision transformer → embedding, by the rest of the tower.

    Weights that do not train are the backbone's own tensors, not copies.

    Args:
        visual: open_clip's TimmModel around timm's VisionTransformer.
        first: the block before which the tower is cut, counted from 0.
        checkpointing: compute each block again in the backward pass instead of keeping what it needs.
        bf16: multiply in bfloat16 (autocast); parameters and gradients stay float32.
    """

    def __init__(self, visual: Any, first: int, *, checkpointing: bool = False, bf16: bool = False) -> None:
        super().__init__()
        self.first, self.checkpointing, self.bf16 = first, checkpointing, bf16
        self.cut = f"block {first}"
        self.shape = (visual.trunk.patch_embed.num_patches + visual.trunk.num_prefix_tokens, visual.trunk.embed_dim)
        blocks = {str(i): _sharing(block) for i, block in enumerate(visual.trunk.blocks) if i >= first}
        self.blocks = nn.ModuleDict(blocks)
        self.after = _After(visual)

    def frozen(self, visual: Any, pixels: Tensor) -> Tensor:
        """Tokens (B, T, W) at the cut."""
        trunk = visual.trunk
        tokens = trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(pixels))))
        for block in trunk.blocks[: self.first]:
            tokens = block(tokens)
        return tokens  # type: ignore[no-any-return]

    def forward(self, features: Tensor) -> Tensor:
        """Embedding (B, D), float32, of tokens ``features`` (B, T, W)."""
        with torch.autocast(features.device.type, torch.bfloat16, enabled=self.bf16):
            tokens = features
            for block in self.blocks.values():
                again = self.checkpointing and torch.is_grad_enabled()
                # The reentrant kind runs the first pass without a graph, so that Opacus' hooks see each block once.
                tokens = checkpoint(block, tokens, use_reentrant=True) if again else block(tokens)
            embedding = self.after(tokens)
        return functional.normalize(embedding.float(), dim=-1)

    def merged(self) -> "Tail":
        """As a copy without adapters."""
        tail: Tail = _sharing(self)
        merge(tail.blocks)
        return tail


class _After(nn.Module):
    """What follows the last block: norm, pooling and projection, all frozen."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        trunk = visual.trunk
        self.norm, self.fc_norm, self.head = trunk.norm, trunk.fc_norm, visual.head
        self.pool_type, self.prefix = trunk.global_pool, trunk.num_prefix_tokens
        self.include_prefix = trunk.pool_include_prefix

    def forward(self, tokens: Tensor) -> Tensor:
        from timm.models.vision_transformer import global_pool_nlc

        pooled = global_pool_nlc(self.norm(tokens), self.pool_type, self.prefix, self.include_prefix)
        embedding: Tensor = self.head(self.fc_norm(pooled))
        return embedding


def _sharing(module: Any) -> Any:
    """A copy of ``module`` whose frozen parameters and buffers are the original's own tensors."""
    kept = [*(p for p in module.parameters() if not p.requires_grad), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in kept})


def _tail(backbone: Backbone, first: int, training: Training) -> Tail:
    visual = backbone.visual
    trunk: Any = getattr(visual, "trunk", None)
    if type(trunk).__name__ != "VisionTransformer" or trunk.attn_pool is not None:
        raise ModelError(
            f"{backbone.ref}: the image tower is no plain vision transformer of timm, so `train: {training.train}` has "
            "no blocks to train; use `train: heads` or `train: projection`"
        )
    if not 0 <= first < len(trunk.blocks):
        raise ModelError(
            f"training.blocks: {training.blocks}, but the image tower of {backbone.ref} has {len(trunk.blocks)} blocks"
        )
    return Tail(visual, first, checkpointing=training.checkpointing, bf16=training.precision == "bf16")


def _low_rank(backbone: Backbone, training: Training) -> Trunk:
    tail = _tail(backbone, 0, training)
    wrap(tail.blocks, training.rank)
    return tail


def _last_blocks(backbone: Backbone, training: Training) -> Trunk:
    tail = _tail(backbone, len(backbone.visual.trunk.blocks) - training.blocks, training)
    _set_free(tail.blocks)
    return tail


def _set_free(module: nn.Module) -> None:
    """Let everything below ``module`` train, in copies of its own."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.LayerNorm) and type(child) is not nn.LayerNorm:
            # timm's own kind computes the same; Opacus knows torch's.
            plain = nn.LayerNorm(child.normalized_shape, child.eps)
            plain.load_state_dict(child.state_dict())
            setattr(module, name, plain)
            continue
        for own, parameter in list(child.named_parameters(recurse=False)):
            setattr(child, own, nn.Parameter(parameter.detach().clone()))
        _set_free(child)


# training.train → the trunk at its start, which computes what the base model does
TRUNKS: dict[str, Callable[[Backbone, Training], Trunk]] = {
    "heads": lambda backbone, training: Trunk(),
    "projection": lambda backbone, training: Projection(backbone.projection()),
    "lora": _low_rank,
    "blocks": _last_blocks,
}


def build_trunk(backbone: Backbone, training: Training) -> Trunk:
    """The trunk that ``training`` asks for, as the base model has it.

    Raises:
        ModelError: ``training.train`` is not known, or this backbone has no such part.
    """
    if training.train not in TRUNKS:
        raise ModelError(f"training.train: {training.train!r} is not one of {sorted(TRUNKS)}")
    return TRUNKS[training.train](backbone, training)
