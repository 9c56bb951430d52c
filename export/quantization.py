"""INT8 as explicit Q/DQ: what is quantised, by ONNX Runtime's quantiser, and how a node is taken out again.

Every weight product reads its activation through a QuantizeLinear/DequantizeLinear pair, and its weight through a
DequantizeLinear over what is stored as INT8.
"""

from collections.abc import Collection

import numpy as np
import onnx
from onnx import TensorProto
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import add_infer_metadata

from clinifed.errors import ExportError
from clinifed.evaluation.parity import EMBEDDING
from clinifed.export.norms import downstream, l2_norms
from clinifed.export.onnx import strip_metadata
from clinifed.export.presets import Quantization
from clinifed.export.ranges import Ranges, inferred, without_weights

__all__ = ["quantize", "unquantize", "weight_products"]


def weight_products(model: onnx.ModelProto, options: Quantization) -> list[str]:
    """The nodes that are quantised: operators of the preset with a weight as their second input, in graph order.

    What reads an embedding, the heads and the products with prompts, is left out: it is tiny, and its logits are what
    is read.

    Raises:
        ExportError: there are none.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    heads = {node.name for node in downstream(model.graph, {EMBEDDING, *l2_norms(model.graph)})}
    found = [
        node.name
        for node in model.graph.node
        if node.op_type in options.op_types and node.input[1] in weights and node.name not in heads
    ]
    if not found:
        raise ExportError(f"nothing to quantise: no {' or '.join(options.op_types)} multiplies by a weight")
    return found


def quantize(model: onnx.ModelProto, options: Quantization, nodes: Collection[str], ranges: Ranges) -> onnx.ModelProto:
    """Explicit Q/DQ on the inputs of ``nodes``, symmetric, with weights stored as INT8; ``model`` is not changed.

    Args:
        model: the FP32 graph.
        options: of the preset.
        nodes: names of :func:`weight_products`.
        ranges: of the graph's tensors on the calibration images.

    Raises:
        ExportError: a node was left without its quantisers.
    """
    bare = inferred(model)
    bare.graph.initializer.extend(model.graph.initializer)
    add_infer_metadata(bare)  # else the quantiser infers anew, through files
    extremes = {name: tuple(np.array(x, np.float32) for x in ranges.of(name)) for name in ranges.extremes}
    quantizer = QDQQuantizer(
        bare,
        per_channel=options.per_channel,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, extremes),
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
    # Whatever else reads a quantised tensor is given it dequantised: it shall read the original.
    others = {node.name for node in model.graph.node}.difference(nodes)
    quantized = unquantize(strip_metadata(quantizer.model.model), model, others)
    _check_quantizers(quantized.graph, nodes)
    return quantized


def unquantize(quantized: onnx.ModelProto, model: onnx.ModelProto, nodes: Collection[str]) -> onnx.ModelProto:
    """A copy of ``quantized`` in which ``nodes`` compute as in ``model``, the graph that was quantised.

    It is the graph that :func:`quantize` makes without these nodes, in a small part of its time.
    """
    restored = without_weights(quantized)
    _read_as_in(model, restored.graph, nodes)
    read = {name for node in restored.graph.node for name in node.input}
    weights = {tensor.name: tensor for source in (model, quantized) for tensor in source.graph.initializer}
    restored.graph.initializer.extend(tensor for name, tensor in weights.items() if name in read)
    return restored


def _read_as_in(model: onnx.ModelProto, graph: onnx.GraphProto, nodes: Collection[str]) -> None:
    """Give ``nodes`` of a quantised graph the inputs that they have in ``model``.

    Quantisers are put before what reads them first, and dropped where nobody does any more.
    """
    before = {node.name: node for node in model.graph.node}
    quantizers = {n.output[0]: n for n in graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")}
    order: list[onnx.NodeProto] = []

    def place(node: onnx.NodeProto) -> None:
        for name in node.input:
            if quantizer := quantizers.pop(name, None):
                place(quantizer)
        order.append(node)

    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            if node.name in nodes:
                node.input[:] = before[node.name].input
            place(node)
    copies = onnx.GraphProto(node=order)
    del graph.node[:]
    graph.node.extend(copies.node)


def _check_quantizers(graph: onnx.GraphProto, nodes: Collection[str]) -> None:
    """A quantiser that skips a node says nothing: look for every one."""
    producer = {output: node for node in graph.node for output in node.output}
    int8 = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.INT8}

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
