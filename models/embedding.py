"""A frozen tower sees every image once: its features are cached, keyed by what they are a function of."""

import logging
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from clinifed.files import OWNER_ONLY, canonical_json, write_atomic

__all__ = ["cached_features"]

log = logging.getLogger(__name__)


def cached_features(
    folder: Path | None, key: dict[str, object], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """``compute()``, or what it returned earlier for the same ``key``.

    Args:
        folder: owner-only cache folder of the site; None computes without keeping anything.
        key: hashes of everything the features depend on (model, cut, images, transform).
        compute: returns named tensors.

    A damaged file is computed anew; file names are hashes and say nothing.
    """
    if folder is None:
        with torch.no_grad():
            return compute()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = folder / f"{sha256(canonical_json(key)).hexdigest()[:32]}.safetensors"
    if path.is_file():
        try:
            kept: dict[str, Tensor] = load_file(path)
            return kept
        except SafetensorError:
            log.warning("a cached embedding file is damaged and is computed anew")
    with torch.no_grad():  # not inference mode: the trainable part differentiates through these
        tensors = {name: t.contiguous() for name, t in compute().items()}
    write_atomic(path, save(tensors), OWNER_ONLY)
    return tensors
