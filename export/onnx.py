"""The global model as one ONNX graph: pixels → embedding and the logits of every specialty.

Opset 20 keeps LayerNormalization and Gelu whole (18 splits Gelu) and spells attention out as MatMul, Softmax and
MatMul, which every TensorRT takes (TensorRT-RTX 1.7 refuses opset 23's FP32 Attention).
"""

import warnings
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from clinifed.errors import ExportError
from clinifed.evaluation.parity import EMBEDDING, LOGITS, PIXELS
from clinifed.files import write_atomic
from clinifed.models.adapters import GlobalModel

__all__ = ["MAX_BATCH", "OPSET", "export_onnx", "strip_metadata", "write_onnx"]

OPSET = 20
MAX_BATCH = 64  # images per run; the graph's own upper limit, above every optimisation profile


class _Flat(nn.Module):
    """The model with a flat tuple of outputs, in the order of their names."""

    def __init__(self, model: GlobalModel, specialties: list[str]) -> None:
        super().__init__()
        self.model = model
        self.specialties = specialties

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        embedding, logits = self.model(pixels)
        return embedding, *(logits[name] for name in self.specialties)


def export_onnx(model: GlobalModel, size_px: int) -> onnx.ModelProto:
    """Export to ONNX, FP32, opset 20; the same model gives the same bytes.

    The graph's input is ``pixels`` (B, 3, S, S) float32, normalised, with 1 ≤ B ≤ 64; its outputs are
    ``embedding`` (B, D), L2-normalised, and ``logits_<specialty>`` (B, K), all float32.

    Args:
        model: put into evaluation mode.
        size_px: S, the side of an image in pixels.

    Raises:
        ExportError: the exporter cannot translate the model, or what it made is not valid ONNX.
    """
    specialties = list(model.part.heads)
    flat = _Flat(model, specialties).eval()
    try:
        with warnings.catch_warnings():
            # torch's exporter warns about its own and onnxscript's deprecations; what it made is checked below
            # and compared with torch before it is packed.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                flat,
                (torch.zeros(2, 3, size_px, size_px),),  # a batch of 1 would be specialised to 1
                input_names=[PIXELS],
                output_names=[EMBEDDING, *(LOGITS + name for name in specialties)],
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
    """Write one self-contained file, atomically; returns its size in bytes."""
    content: bytes = model.SerializeToString(deterministic=True)
    write_atomic(path, content)
    return len(content)
