"""Pixels as the backbone wants them, through MONAI transforms."""

import math
from typing import Protocol

import numpy as np
import torch
from monai.transforms import Affine, Compose, NormalizeIntensity, Transform
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from clinifed.errors import ModelError

__all__ = ["Preprocess", "augment", "transform"]

_TURN = math.radians(4)  # between two views; 16 views reach 32 degrees
_ZOOM = 1.04


class Preprocess(Protocol):
    """What the backbone says of its input; all of it public constants."""

    @property
    def size_px(self) -> int:
        """Height = width, pixels."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, of pixels in [0, 1]."""

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel."""

    @property
    def interpolation(self) -> str:
        """``bicubic`` or ``bilinear``."""


class ToChannels(Transform):
    """(H, W) or (H, W, 3) → (1 or 3, H, W) tensor, a view."""

    def __call__(self, pixels: NDArray[np.float32]) -> Tensor:
        """Channels first."""
        tensor = torch.from_numpy(np.ascontiguousarray(pixels))
        return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)


class ThreeChannels(Transform):
    """(1 or 3, S, S) → (3, S, S): grey is repeated late, so that it is resized once."""

    def __call__(self, image: Tensor) -> Tensor:
        """Each channel has memory of its own: MONAI normalises them in place."""
        return image.repeat(3, 1, 1) if len(image) == 1 else image.clone()


class ResizeShortest(Transform):
    """The shortest side to ``size_px``, antialiased, as Pillow does and the backbone was trained with.

    MONAI's Resize smooths with a Gaussian instead, which differs visibly on X-rays.
    """

    def __init__(self, size_px: int, interpolation: str) -> None:
        self.size_px, self.interpolation = size_px, interpolation

    def __call__(self, image: Tensor) -> Tensor:
        """(C, H, W) → (C, H', W') with min(H', W') = ``size_px``, in [0, 1].

        First along rows, then along columns, each cut to [0, 1]: bicubic overshoots at edges, and Pillow's 8 bits cut
        it off after each pass. Images more than twice as high as wide, made smaller, go the other way round (so Pillow
        13 does, as its results show).
        """
        height, width = image.shape[1:]
        shortest = min(height, width)
        if shortest == self.size_px:
            return image
        rows, columns = (max(self.size_px, int(self.size_px * side / shortest)) for side in (height, width))
        resized = image[None]
        between = (rows, width) if height > 2 * width and rows < height else (height, columns)
        for size in (between, (rows, columns)):
            resized = functional.interpolate(resized, size, mode=self.interpolation, antialias=True).clamp_(0, 1)
        return resized[0]


class CropCentre(Transform):
    """The middle ``size_px`` × ``size_px``, rounded as torchvision rounds; MONAI's own is a pixel off for odd rests."""

    def __init__(self, size_px: int) -> None:
        self.size_px = size_px

    def __call__(self, image: Tensor) -> Tensor:
        """(C, H, W) → (C, S, S)."""
        top, left = (round((side - self.size_px) / 2) for side in image.shape[1:])
        return image[:, top : top + self.size_px, left : left + self.size_px]


def transform(preprocess: Preprocess) -> Compose:
    """Pixels in [0, 1] → (3, S, S) float32 as the backbone wants them.

    Equal to open_clip's own within 1e-2 on the scale of [0, 1], before mean and standard deviation: that rounds to 8
    bits after each of its two passes.

    Raises:
        ModelError: constants of the backbone that cannot be.
    """
    mean, std = preprocess.mean, preprocess.std
    if (
        preprocess.size_px < 1
        or preprocess.interpolation not in ("bicubic", "bilinear")
        or not len(mean) == len(std) == 3
        or not all(math.isfinite(value) for value in (*mean, *std))
        or min(std) <= 0
    ):
        raise ModelError(
            "preprocess: the model asks for an input that is none: size ≥ 1, bicubic or bilinear, and finite mean and "
            "standard deviation > 0 of three channels are needed; see its open_clip_config.json"
        )
    return Compose(
        [
            ToChannels(),
            ResizeShortest(preprocess.size_px, preprocess.interpolation),
            CropCentre(preprocess.size_px),
            ThreeChannels(),
            NormalizeIntensity(subtrahend=preprocess.mean, divisor=preprocess.std, channel_wise=True),
        ]
    )


def augment(pixels: Tensor, view: int) -> Tensor:
    """The same images a little turned and nearer: view 0 is the image, 1 and 2 turn by 4 degrees each way, and so on.

    Nothing is drawn at random, and nothing is flipped: the heart stays on its side.

    Args:
        pixels: (B, 3, S, S) float32, normalised.
        view: ≥ 0.

    Returns:
        (B, 3, S, S) float32.
    """
    if view == 0:
        return pixels
    step = (view + 1) // 2
    turn, zoom = _TURN * step * (1 if view % 2 else -1), 1 / _ZOOM**step  # MONAI scales the grid, not the picture
    move = Affine(
        rotate_params=turn, scale_params=(zoom, zoom), mode="bilinear", padding_mode="border", image_only=True
    )
    return torch.stack([torch.as_tensor(np.asarray(move(image))) for image in pixels])
