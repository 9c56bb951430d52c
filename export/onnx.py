"""The global model as one ONNX graph: pixels → embedding, logits of every specialty, and zero-shot logits.

Opset 20 keeps LayerNormalization and Gelu whole (18 splits Gelu) and spells attention out as MatMul, Softmax and
MatMul, which every TensorRT takes (TensorRT-RTX 1.7 refuses opset 23's FP32 Attention).
"""

import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from clinifed.errors import ExportError
from clinifed.evaluation.parity import EMBEDDING, LOGITS, PIXELS, ZERO_SHOT
from clinifed.export.deployed import DeployedModel, TextTower
from clinifed.files import write_atomic

__all__ = [
    "MAX_BATCH",
    "OPSET",
    "TEXT_EMBEDDING",
    "TOKENS",
    "export_onnx",
    "export_text",
    "strip_metadata",
    "write_onnx",
]

OPSET = 20
MAX_BATCH = 64  # images per run; the graph's own upper limit, above every optimisation profile
# The text graph's input and output; "embedding" is a name that BERT's own graph uses.
TOKENS, TEXT_EMBEDDING = "tokens", "text_embedding"


class _Flat(nn.Module):
    """The model with a flat tuple of outputs, in the order of their names."""

    def __init__(self, model: DeployedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        embedding, *logits = self.model(pixels)
        kinds = logits if self.model.shows_zero_shot else logits[:1]
        return embedding, *(kind[name] for kind in kinds for name in self.model.specialties)


def export_onnx(model: DeployedModel, size_px: int) -> onnx.ModelProto:
    """Export to ONNX, FP32, opset 20; the same model gives the same bytes.

    The graph's input is ``pixels`` (B, 3, S, S) float32, normalised, with 1 ≤ B ≤ 64. Its outputs are ``embedding``
    (B, D), L2-normalised; ``logits_<specialty>`` (B, K); and, where the model shows it, ``zero_shot_<specialty>``
    (B, K), what the base model says by its class prompts. All are float32.

    Args:
        model: put into evaluation mode.
        size_px: S, the side of an image in pixels.

    Raises:
        ExportError: the exporter cannot translate the model, or what it made is not valid ONNX.
    """
    kinds = (LOGITS, ZERO_SHOT) if model.shows_zero_shot else (LOGITS,)
    outputs = [EMBEDDING, *(kind + name for kind in kinds for name in model.specialties)]
    return _export(_Flat(model).eval(), torch.zeros(2, 3, size_px, size_px), PIXELS, outputs)


def export_text(tower: TextTower, length: int) -> onnx.ModelProto:
    """The text tower as ONNX: ``tokens`` (B, L) int64, zero where padded → ``text_embedding`` (B, D), L2-normalised.

    Args:
        tower: put into evaluation mode.
        length: L, tokens to a text.

    Raises:
        ExportError: as :func:`export_onnx`.
    """
    tokens = torch.zeros(2, length, dtype=torch.int64)
    tokens[:, :3] = 1  # the mask is made of what is not zero
    return _export(tower.eval(), tokens, TOKENS, [TEXT_EMBEDDING])


def _export(module: nn.Module, example: Tensor, name: str, outputs: list[str]) -> onnx.ModelProto:
    """``module`` with a dynamic batch; ``example`` has a batch of 2, since one of 1 would be specialised to 1."""
    try:
        with warnings.catch_warnings():
            # torch's exporter warns about its own and onnxscript's deprecations; what it made is checked below
            # and compared with torch before it is packed.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (example,),
                input_names=[name],
                output_names=outputs,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,  # else the exporter prints its steps
            )
        if program is None:
            raise ExportError("torch's ONNX exporter returned nothing")
        proto = strip_metadata(program.model_proto)
        onnx.checker.check_model(proto, full_check=True)
    except (torch.onnx.errors.OnnxExporterError, onnx.checker.ValidationError) as error:
        raise ExportError(f"the model cannot be expressed in ONNX opset {OPSET}: {error}") from error
    return proto


def strip_metadata(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove, in place, what describes the exporting machine and not the model; returns ``model``.

    The exporter notes stack traces, which hold file paths, on every node.
    """
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for item in (model, graph, *graph.node, *values):
        item.doc_string = ""
        del item.metadata_props[:]
    return model


def write_onnx(model: onnx.ModelProto, path: Path) -> int:
    """Write one self-contained file, atomically; returns its size in bytes.

    Raises:
        ExportError: it cannot be written, as on a full disk; nothing is left half-written.
    """
    content: bytes = model.SerializeToString(deterministic=True)
    try:
        write_atomic(path, content)
    except OSError as error:
        raise ExportError(
            f"{path.name}: cannot be written ({error.strerror}); it takes {len(content) >> 20} MiB"
        ) from error
    return len(content)
