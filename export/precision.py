"""From the FP32 graph to FP16 and INT8: TensorRT 11 is strongly typed, so precision is decided in the ONNX.

INT8 is explicit: every weight product reads its activation through a QuantizeLinear/DequantizeLinear pair, and
its weight through a DequantizeLinear over what is stored as INT8. The rest of that graph then becomes FP16.
"""

import copy
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxconverter_common.float16 import convert_float_to_float16
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

from clinifed.errors import ExportError
from clinifed.evaluation.parity import EMBEDDING, PIXELS
from clinifed.export.onnx import strip_metadata, write_onnx
from clinifed.export.presets import HalfPrecision, Precision, Quantization

__all__ = ["activation_ranges", "convert", "quantize", "to_half", "weight_products"]

FLOAT16_MAX = float(np.finfo(np.float16).max)
_CALIBRATION_BATCH = 8  # images; changes memory, not the ranges


def convert(
    model: onnx.ModelProto,
    precision: Precision,
    pixels: NDArray[np.float32] | None,
    workdir: Path,
    keep: Collection[str] = (),
) -> onnx.ModelProto:
    """A graph of the same inputs and outputs (FP32) that computes in ``precision``; ``model`` is not changed.

    Args:
        model: the FP32 graph of :func:`clinifed.export.onnx.export_onnx`.
        precision: a preset.
        pixels: (N, 3, S, S) public calibration images; used where the preset quantises.
        workdir: an existing folder for intermediate models; files are left there.
        keep: nodes that are not quantised although the preset would.

    Raises:
        ExportError: a node that the preset quantises was not quantised, or the result is not valid ONNX.
    """
    if precision.quantize is not None:
        if pixels is None:
            raise ExportError("this precision quantises and needs calibration images; none were given")
        # An exact LayerNorm → Linear smoothing fold belongs here, before the ranges are taken.
        nodes = [name for name in weight_products(model, precision.quantize) if name not in keep]
        ranges = activation_ranges(model, precision.quantize, pixels, workdir)
        model = quantize(model, precision.quantize, nodes, ranges, workdir)
    if precision.half is not None:
        model = to_half(model, precision.half)
    onnx.checker.check_model(model, full_check=True)
    return model


def _downstream(graph: onnx.GraphProto, tensors: Collection[str]) -> list[onnx.NodeProto]:
    """All nodes that depend on ``tensors``, in the graph's own (topological) order."""
    reached = set(tensors)
    found = []
    for node in graph.node:
        if reached.intersection(node.input):
            reached.update(node.output)
            found.append(node)
    return found


def weight_products(model: onnx.ModelProto, options: Quantization) -> list[str]:
    """The nodes that are quantised: operators of the preset with a weight as their second input.

    The heads, everything after the embedding, are left out: they are tiny, and their logits are what is read.

    Raises:
        ExportError: there are none.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    heads = {node.name for node in _downstream(model.graph, [EMBEDDING])}
    found = [
        node.name
        for node in model.graph.node
        if node.op_type in options.op_types and node.input[1] in weights and node.name not in heads
    ]
    if not found:
        raise ExportError(f"nothing to quantise: no {' or '.join(options.op_types)} multiplies by a weight")
    return found


class _Batches(CalibrationDataReader):
    """ONNX Runtime's view of the calibration images."""

    def __init__(self, pixels: NDArray[np.float32]) -> None:
        self._batches: Iterator[NDArray[np.float32]] = (
            pixels[i : i + _CALIBRATION_BATCH] for i in range(0, len(pixels), _CALIBRATION_BATCH)
        )

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The next batch as the graph's inputs, or None."""
        batch = next(self._batches, None)
        return None if batch is None else {PIXELS: batch}


def activation_ranges(
    model: onnx.ModelProto, options: Quantization, pixels: NDArray[np.float32], workdir: Path
) -> TensorsData:
    """Smallest and largest value of every tensor around the preset's operators, over ``pixels`` (N, 3, S, S).

    These are functions of the images: they may come from public images only.
    """
    path = workdir / "calibrate.onnx"
    write_onnx(model, path)
    calibrator = create_calibrator(
        path,
        list(options.op_types),
        augmented_model_path=str(workdir / "calibrate-augmented.onnx"),
        calibrate_method=CalibrationMethod.MinMax,
    )
    calibrator.collect_data(_Batches(pixels))
    return calibrator.compute_data()


def quantize(
    model: onnx.ModelProto, options: Quantization, nodes: Collection[str], ranges: TensorsData, workdir: Path
) -> onnx.ModelProto:
    """Explicit Q/DQ on the inputs of ``nodes``, symmetric, with weights stored as INT8.

    Raises:
        ExportError: a node was left without its quantisers.
    """
    path = workdir / "quantize.onnx"
    write_onnx(model, path)
    quantizer = QDQQuantizer(
        load_model_with_shape_infer(path),
        per_channel=options.per_channel,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8,
        tensors_range=ranges,
        nodes_to_quantize=list(nodes),
        nodes_to_exclude=[],
        op_types_to_quantize=list(options.op_types),
        extra_options={
            # TensorRT's INT8 is symmetric; biases stay floating point and outputs unquantised, so that the
            # residual stream between the products keeps its precision.
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": list(options.op_types),
        },
    )
    quantizer.quantize_model()
    quantized = strip_metadata(quantizer.model.model)
    _check_quantizers(quantized.graph, nodes)
    return quantized


def _check_quantizers(graph: onnx.GraphProto, nodes: Collection[str]) -> None:
    """A quantiser that skips a node says nothing: look for every one."""
    producer = {output: node for node in graph.node for output in node.output}
    int8 = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}

    def dequantizes(tensor: str) -> str | None:
        node = producer.get(tensor)
        return node.input[0] if node is not None and node.op_type == "DequantizeLinear" else None

    bare = []
    for node in graph.node:
        if node.name in nodes:
            activation, weight = [*map(dequantizes, node.input), None, None][:2]
            paired = activation in producer and producer[activation].op_type == "QuantizeLinear"
            if not paired or weight not in int8:
                bare.append(node.name)
    if bare:
        raise ExportError(f"not quantised although the preset asks for it: {', '.join(bare)}")


def to_half(model: onnx.ModelProto, options: HalfPrecision) -> onnx.ModelProto:
    """FP16 but for what ``options`` keeps; inputs and outputs stay FP32. ``model`` is not changed."""
    model = onnx.shape_inference.infer_shapes(copy.deepcopy(model))
    norm = _cut_norm(model.graph, options.keep_fp32_norm)
    _own_initializers(model.graph, [n for n in model.graph.node if n.op_type in options.keep_fp32_ops])
    with warnings.catch_warnings():
        # It warns of every weight that FP16 rounds to its smallest number; the parity gate judges the result.
        warnings.simplefilter("ignore")
        half = convert_float_to_float16(
            model,
            keep_io_types=True,
            max_finite_val=FLOAT16_MAX,  # its own default would clip weights at 1e4
            op_block_list=list(options.keep_fp32_ops),
        )
    _join_norm(half.graph, norm)
    return strip_metadata(half)


def _cut_norm(graph: onnx.GraphProto, first_ops: Collection[str]) -> onnx.GraphProto:
    """Move the L2 norm, from the first of ``first_ops`` to the embedding, out of ``graph``.

    What it reads becomes an output of the graph, the embedding an input: both stay FP32, and the converter,
    which would make FP16 of an output that a kept node computes, never sees them.
    """
    starts = [node for node in graph.node if node.op_type in first_ops]
    after = _downstream(graph, [name for node in starts for name in node.output])
    heads = {node.name for node in _downstream(graph, [EMBEDDING])}
    names = {node.name for node in (*starts, *after)} - heads
    moved = [node for node in graph.node if node.name in names]
    _own_initializers(graph, moved)
    made, read = _made_and_read(moved)

    norm = onnx.GraphProto()
    norm.node.extend(moved)
    norm.initializer.extend(tensor for tensor in graph.initializer if tensor.name in read)
    norm.output.extend(output for output in graph.output if output.name in made)
    border = [value for value in graph.value_info if value.name in read]
    _replace(graph.node, [node for node in graph.node if node.name not in names])
    _replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name not in read])
    _replace(graph.output, [*border, *(output for output in graph.output if output.name not in made)])
    _replace(graph.value_info, [value for value in graph.value_info if value.name not in made | read])
    graph.input.extend(norm.output)
    return norm


def _made_and_read(nodes: Collection[onnx.NodeProto]) -> tuple[set[str], set[str]]:
    """The tensors that ``nodes`` make, and those they read from elsewhere."""
    made = {name for node in nodes for name in node.output}
    return made, {name for node in nodes for name in node.input} - made


def _replace(field: Any, values: Sequence[Any]) -> None:
    """Set a repeated protobuf field; copies first, since the values may be the field's own."""
    copies = [copy.deepcopy(value) for value in values]
    del field[:]
    field.extend(copies)


def _join_norm(graph: onnx.GraphProto, norm: onnx.GraphProto) -> None:
    """Undo :func:`_cut_norm` on the converted graph."""
    made, read = _made_and_read(norm.node)
    heads = _downstream(graph, made)
    names = {node.name for node in heads}
    tower = [node for node in graph.node if node.name not in names]
    _replace(graph.node, [*tower, *norm.node, *heads])  # the order in which they can be computed
    _replace(graph.input, [value for value in graph.input if value.name not in made])
    _replace(graph.output, [*norm.output, *(output for output in graph.output if output.name not in read)])
    graph.initializer.extend(norm.initializer)


def _own_initializers(graph: onnx.GraphProto, nodes: Collection[onnx.NodeProto]) -> None:
    """Give ``nodes`` copies of the initialisers they share with others: each can then have its own type."""
    names = {node.name for node in nodes}
    elsewhere = {name for node in graph.node if node.name not in names for name in node.input}
    for tensor in [t for t in graph.initializer if t.name in elsewhere]:
        readers = [node for node in nodes if tensor.name in node.input]
        if readers:
            own = graph.initializer.add()
            own.CopyFrom(tensor)
            own.name = f"{tensor.name}_fp32"
            for node in readers:
                for i, name in enumerate(node.input):
                    if name == tensor.name:
                        node.input[i] = own.name
