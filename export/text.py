"""The text tower, for prompts that are not baked into the image graph: optional, FP32, with its tokenizer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from clinifed.config import Specialty
from clinifed.errors import ExportError
from clinifed.export.deployed import TextTower
from clinifed.export.onnx import TEXT_EMBEDDING, TOKENS, export_text, write_onnx
from clinifed.models.backbone import Backbone

__all__ = ["export_text_tower"]

_BATCH = 8  # prompts per run; changes memory only
_MOST_APART = 1e-5  # of two numbers of embeddings of length 1


def export_text_tower(bundle: Path, backbone: Backbone, specialties: Sequence[Specialty]) -> None:
    """Write ``text/fp32.onnx`` and ``text/tokenizer/``; every prompt of ``specialties`` must come out as torch says.

    Raises:
        ExportError: it does not, or the tokenizer cannot be kept as files.
    """
    folder = bundle / "text"
    folder.mkdir()
    keep = getattr(getattr(backbone.tokenizer, "tokenizer", None), "save_pretrained", None)
    if keep is None:
        raise ExportError(f"{backbone.ref}: its tokenizer cannot be kept as files; export without --text")
    keep(str(folder / "tokenizer"))
    prompts = [text for specialty in specialties for texts in specialty.labels.values() for text in texts]
    tokens = backbone.tokenizer(prompts)  # (N, L) int64
    tower = TextTower(backbone).eval()
    path = folder / "fp32.onnx"
    write_onnx(export_text(tower, tokens.shape[1]), path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    apart = 0.0
    for some in tokens.split(_BATCH):
        with torch.no_grad():
            expected = tower(some).numpy()
        (found,) = session.run([TEXT_EMBEDDING], {TOKENS: some.numpy()})
        apart = max(apart, float(np.abs(found - expected).max()))
    if not apart <= _MOST_APART:
        raise ExportError(f"the text graph differs from torch by {apart:.3g}, more than {_MOST_APART:g}")
