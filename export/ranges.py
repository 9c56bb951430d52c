"""What values the FP32 graph takes on the calibration images: one run, for smoothing, INT8 ranges and FP16's headroom.

The extremes are taken inside the graph, so that only a few numbers per tensor come out of it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from clinifed.errors import ExportError
from clinifed.evaluation.parity import PIXELS

__all__ = ["Ranges", "element_types", "inferred", "measure", "without_weights"]

_BATCH = 8  # images per run; changes memory, not the ranges
_THREADS = 2  # as in clinifed.evaluation.parity: sums in another order would give other last digits on other machines

Extremes = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class Ranges:
    """Smallest and largest value of every float32 tensor of a graph that its images decide; weights are not among them.

    Each is of shape (), or (C,) where the channels, on the tensor's last axis, were measured one by one.
    """

    extremes: Mapping[str, Extremes]

    def of(self, tensor: str) -> tuple[float, float]:
        """Smallest and largest value of the whole tensor."""
        low, high = self.extremes[tensor]
        return float(low.min()), float(high.max())

    def largest(self, tensor: str) -> float:
        """Largest magnitude; 0 for a tensor that was not measured."""
        return max(map(abs, self.of(tensor))) if tensor in self.extremes else 0.0

    def channels(self, tensor: str) -> NDArray[np.float32]:
        """Largest magnitude of each channel, (C,)."""
        low, high = self.extremes[tensor]
        return np.maximum(np.abs(low), np.abs(high))

    def divided(self, tensors: Collection[str], scale: NDArray[np.float32]) -> "Ranges":
        """The ranges after the channels of ``tensors`` were divided by ``scale`` (C,), positive."""
        return Ranges({**self.extremes, **{t: _divided(self.extremes[t], scale) for t in tensors}})


def _divided(extremes: Extremes, scale: NDArray[np.float32]) -> Extremes:
    low, high = extremes
    return low / scale, high / scale


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without initialisers, which are nearly all of a model's memory."""
    bare = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name != "graph":
            _set(bare, field.name, value)
    for field, value in model.graph.ListFields():
        if field.name != "initializer":
            _set(bare.graph, field.name, value)
    return bare


def _set(message: object, name: str, value: object) -> None:
    """Copy one protobuf field, repeated or not."""
    if isinstance(value, str | bytes | int | float):
        setattr(message, name, value)
    else:
        getattr(message, name).MergeFrom(value)


def inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without initialisers, whose ``value_info`` has the type and rank of every tensor that a node makes.

    Raises:
        ExportError: the types of the graph contradict each other, or it has control flow.
    """
    if nested := [node.name for node in model.graph.node if any(a.HasField("g") or a.graphs for a in node.attribute)]:
        raise ExportError(f"control flow cannot be converted: {', '.join(nested)}")
    bare = without_weights(model)
    inputs = len(bare.graph.input)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.INT64:  # a shape, on which other shapes depend
            bare.graph.initializer.append(tensor)
        else:
            bare.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    try:
        bare = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise ExportError(f"the graph's types contradict each other: {error}") from error
    del bare.graph.input[inputs:], bare.graph.initializer[:]
    return bare


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Every tensor's element type (``onnx.TensorProto.DataType``), inferred without copying the large weights.

    Raises:
        ExportError: see :func:`inferred`.
    """
    graph = inferred(model).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in model.graph.initializer}


def measure(model: onnx.ModelProto, pixels: NDArray[np.float32], channels: Mapping[str, int]) -> Ranges:
    """Run the FP32 graph on ``pixels`` (N, 3, S, S), which may be public images only: ranges are functions of them.

    Args:
        model: not changed.
        pixels: float32, normalised; N ≥ 1.
        channels: the tensors whose channels are measured one by one, with their number.

    Raises:
        ExportError: a tensor holds a value that is not finite.
    """
    augmented, tensors = _augmented(model, channels)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _THREADS
    options.log_severity_level = 3  # errors only
    # The default order leaves the extremes to the end and so keeps every tensor: 3.4 GB at BiomedCLIP's size, not 1.6.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    session = onnxruntime.InferenceSession(augmented, options, providers=["CPUExecutionProvider"])
    del augmented  # as large as the model
    names = [value.name for value in session.get_outputs()]
    found: list[NDArray[np.float32]] = []
    for start in range(0, len(pixels), _BATCH):
        now = session.run(names, {PIXELS: pixels[start : start + _BATCH]})
        pairs = zip(found or now, now, names, strict=True)
        found = [np.minimum(a, b) if name.startswith(_LOW) else np.maximum(a, b) for a, b, name in pairs]
    by_name = dict(zip(names, found, strict=True))
    extremes = {tensor: (by_name[_LOW + tensor], by_name[_HIGH + tensor]) for tensor in tensors}
    if broken := [tensor for tensor, pair in extremes.items() if not np.isfinite(pair).all()]:
        raise ExportError(f"the FP32 model overflows on the calibration images: first in {broken[0]!r}")
    return Ranges(extremes)


_LOW, _HIGH = "lowest ", "highest "  # with a blank, which no exporter puts into a name


def _augmented(model: onnx.ModelProto, channels: Mapping[str, int]) -> tuple[bytes, list[str]]:
    """The graph, serialised, with the extremes of its float tensors as its only outputs; and those tensors."""
    types = element_types(model)
    bare = without_weights(model)
    graph = bare.graph
    made = [value.name for value in graph.input] + [name for node in graph.node for name in node.output if name]
    tensors = [name for name in made if types.get(name) == TensorProto.FLOAT]
    del graph.output[:]
    graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "axis 0"))
    for tensor in tensors:
        source, axes = tensor, []
        if tensor in channels:
            rows = numpy_helper.from_array(np.array([-1, channels[tensor]], np.int64), f"rows {tensor}")
            graph.initializer.append(rows)
            graph.node.append(helper.make_node("Reshape", [tensor, rows.name], [f"by row {tensor}"]))
            source, axes = f"by row {tensor}", ["axis 0"]
        for operator, prefix in (("ReduceMin", _LOW), ("ReduceMax", _HIGH)):
            graph.node.append(helper.make_node(operator, [source, *axes], [prefix + tensor], keepdims=0))
            shape = [channels[tensor]] if tensor in channels else []
            graph.output.append(helper.make_tensor_value_info(prefix + tensor, TensorProto.FLOAT, shape))
    graph.initializer.extend(model.graph.initializer)
    return bare.SerializeToString(), tensors
