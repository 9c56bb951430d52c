"""The global checkpoint: one directory, whole or absent, with weights and the card that says where they come from."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from clinifed.errors import ModelError
from clinifed.files import OWNER_ONLY, file_sha256, sync_folder, write_atomic, write_json
from clinifed.messages import Parameters
from clinifed.models.state import CARD, WEIGHTS

__all__ = ["write_checkpoint"]


def write_checkpoint(path: Path, params: Parameters, card: Mapping[str, Any], *, owner_only: bool = False) -> None:
    """Write ``path/model.safetensors`` and ``path/card.json``; the card gains ``weights_sha256``.

    Args:
        params: the shared parameters as they are used (start plus delta), float32.
        owner_only: folder and files are their owner's alone, for what must not leave the machine.

    Raises:
        ModelError: ``path`` exists, or a parameter is not finite. Nothing is left behind.
    """
    if path.exists():
        raise ModelError(f"{path} exists; a checkpoint is never overwritten")
    broken = [name for name, value in params.items() if not np.isfinite(value).all()]
    if broken:
        raise ModelError(f"not written: {', '.join(sorted(broken))} holds NaN or infinity")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir(mode=0o700 if owner_only else 0o777)
    mode = OWNER_ONLY if owner_only else 0o644
    try:
        write_atomic(temporary / WEIGHTS, save({k: np.ascontiguousarray(v) for k, v in sorted(params.items())}), mode)
        write_json(temporary / CARD, {**card, "weights_sha256": file_sha256(temporary / WEIGHTS)}, mode)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)
