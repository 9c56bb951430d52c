"""Parameters on disk: safetensors only, and the checkpoint directory that a federation ends with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clinifed.errors import ModelError
from clinifed.files import file_sha256
from clinifed.messages import Parameters

__all__ = ["CARD", "WEIGHTS", "Checkpoint", "apply_delta", "arrays", "read_checkpoint"]

WEIGHTS = "model.safetensors"
CARD = "card.json"
_MAX_CARD_BYTES = 16 << 20  # a site adds about 2 KiB


@dataclass(frozen=True)
class Checkpoint:
    """A global checkpoint: the shared parameters as they are used (not as deltas), and the card that describes them."""

    path: Path
    params: dict[str, Tensor]  # trunk.*, heads.<specialty>.{weight,bias}; float32
    card: dict[str, Any]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint directory (``model.safetensors`` and ``card.json``).

    Raises:
        ModelError: a file is missing or damaged, or the two do not belong together. Nothing is unpickled.
    """
    missing = [name for name in (WEIGHTS, CARD) if not (path / name).is_file()]
    if missing:
        raise ModelError(f"{path}: not a checkpoint, {' and '.join(missing)} missing")
    card = _read_card(path / CARD)
    try:
        if card.get("weights_sha256", digest := file_sha256(path / WEIGHTS)) != digest:
            raise ModelError(f"{path}: {WEIGHTS} is not the one that {CARD} describes; fetch the checkpoint again")
        params = load_file(path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path / WEIGHTS}: cannot be read as safetensors: {error}") from error
    return Checkpoint(path, params, card)


def _read_card(path: Path) -> dict[str, Any]:
    """The card, an object of JSON; a stranger's is not read where it is too large or too deep to be one."""
    try:
        if (size := path.stat().st_size) > _MAX_CARD_BYTES:
            raise ModelError(f"{path}: has {size} bytes; a card has at most {_MAX_CARD_BYTES}")
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: the card cannot be read: {error}") from error
    except RecursionError:
        raise ModelError(f"{path}: the card cannot be read: it is nested too deeply") from None
    if not isinstance(card, dict):
        raise ModelError(f"{path}: expected an object, found {type(card).__name__}")
    return card


def arrays(params: Mapping[str, Tensor]) -> Parameters:
    """Parameters as checkpoints are written of: float32 arrays by name."""
    return {name: tensor.detach().numpy().astype(np.float32) for name, tensor in params.items()}


def apply_delta(start: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``start + delta`` by name, in float32.

    A federation shares the difference from the zero-shot start, so that the server needs no model at all.

    Raises:
        ModelError: the names or the shapes differ.
    """
    wrong = sorted(set(start) ^ set(delta))
    wrong += [n for n in start if n in delta and start[n].shape != delta[n].shape]
    if wrong:
        raise ModelError(f"the shared delta does not fit the model at {', '.join(wrong)}")
    return {name: start[name].to(torch.float32) + delta[name].to(torch.float32) for name in start}
