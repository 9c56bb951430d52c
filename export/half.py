"""From an FP32 graph to 16 bits, FP16 or BF16: every operator has one type, and values are cast where types meet.

Chains of operators that stay FP32 hand on FP32: a value that FP16 cannot hold is never cast on the way. (The converter
of onnxconverter-common casts every kept operator's output to FP16, and knows no BF16.)
"""

from collections.abc import Collection, Iterator

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from clinifed.errors import ExportError
from clinifed.evaluation.parity import EMBEDDING
from clinifed.export.norms import l2_norms
from clinifed.export.presets import HalfPrecision
from clinifed.export.ranges import Ranges, element_types, without_weights

__all__ = ["emulate", "overflowing", "to_half"]

_BFLOAT16_MAX = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
_TYPES: dict[str, tuple[int, np.dtype[np.generic], float]] = {
    "float16": (TensorProto.FLOAT16, np.dtype(np.float16), float(np.finfo(np.float16).max)),
    "bfloat16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16), _BFLOAT16_MAX),
}
# Their output's type is written in an attribute; such a node stays as it is, and what reads it casts.
_TYPED_BY_ATTRIBUTE = ("Cast", "Constant", "ConstantOfShape", "EyeLike", "RandomNormal", "RandomUniform")


def overflowing(model: onnx.ModelProto, options: HalfPrecision, ranges: Ranges) -> list[str]:
    """The nodes that read or make a value above ``options.headroom`` of the 16-bit type's largest, in graph order.

    Args:
        model: the FP32 graph, quantised or not.
        options: of the preset.
        ranges: of the FP32 graph's tensors, before it was quantised.
    """
    limit = options.headroom * _TYPES[options.dtype][2]
    large = {name for name in ranges.extremes if ranges.largest(name) > limit}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and _largest(tensor) > limit:
            large.add(tensor.name)
    # What an INT8 value stands for is at most 128 times its scale.
    scales = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and 128 * _largest(t) > limit}
    dequantizers = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    large.update(node.output[0] for node in dequantizers if node.input[1] in scales)
    return [node.name for node in model.graph.node if large.intersection([*node.input, *node.output])]


def _defined(node: onnx.NodeProto, opset: int, kind: str) -> bool:
    """Does ONNX define the operator on ``kind`` wherever it has floats? (Conv on BF16 only from opset 22.)"""
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    return all(kind in p.types or "tensor(float)" not in p.types for p in (*schema.inputs, *schema.outputs))


def _largest(tensor: onnx.TensorProto) -> float:
    array = numpy_helper.to_array(tensor)
    return float(max(array.max(), -array.min())) if array.size else 0.0


def to_half(model: onnx.ModelProto, options: HalfPrecision, ranges: Ranges) -> onnx.ModelProto:
    """16 bits but for what ``options`` keeps and what would overflow; inputs and outputs stay FP32.

    Weights are rounded to the nearest value of the type. ``model`` is not changed.

    Raises:
        ExportError: the embedding is not what one of ``options.keep_fp32_norm`` makes, or the graph's types
            contradict each other.
    """
    graph = model.graph
    norms = l2_norms(graph, options.keep_fp32_norm)
    if EMBEDDING not in norms:
        raise ExportError(f"no L2 norm by {' or '.join(options.keep_fp32_norm)} makes the output {EMBEDDING!r}")
    wide = {name for nodes in norms.values() for name in nodes}
    wide.update(overflowing(model, options, ranges))
    wide.update(n.name for n in graph.node if n.op_type in (*options.keep_fp32_ops, *_TYPED_BY_ATTRIBUTE))
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    wide.update(n.name for n in graph.node if not _defined(n, opsets[n.domain], f"tensor({options.dtype})"))
    readers: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.name)
    for node in graph.node:
        # TensorRT makes one INT8 kernel of a product and its two DequantizeLinear: no Cast may stand between them.
        if node.op_type == "DequantizeLinear":
            follow = wide.add if wide.issuperset(readers.get(node.output[0], [])) else wide.discard
            follow(node.name)
    return _Typing(model, options.dtype, wide).typed()


class _Typing:
    """Gives every node its type, with casts where a tensor is read in another type than it was made in."""

    def __init__(self, model: onnx.ModelProto, dtype: str, wide: Collection[str]) -> None:
        self._half, self._numpy, _ = _TYPES[dtype]
        self._wide = wide
        self._floats = {name for name, kind in element_types(model).items() if kind == TensorProto.FLOAT}
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._nodes = model.graph.node
        self._typed = without_weights(model)
        self._versions: dict[str, dict[int, str]] = {}  # FP32 tensor → type → its name in the new graph

    def _kind(self, node: onnx.NodeProto) -> int:
        return TensorProto.FLOAT if node.name in self._wide else self._half

    def typed(self) -> onnx.ModelProto:
        """The typed graph, its nodes in an order in which they can be computed."""
        graph = self._typed.graph
        outputs = {value.name for value in graph.output}
        self._versions = {value.name: {TensorProto.FLOAT: value.name} for value in graph.input}
        self._add_weights()
        del graph.node[:]
        for original in self._nodes:
            kind = self._kind(original)
            inputs = [self._read(name, kind) for name in original.input]  # may add a Cast, before the node
            node = graph.node.add()
            node.CopyFrom(original)
            node.input[:] = inputs
            for i, name in enumerate(original.output):
                if name in self._floats:
                    # A graph output keeps its name for the FP32 value.
                    node.output[i] = f"{name}_half" if kind == self._half and name in outputs else name
                    self._versions[name] = {kind: node.output[i]}
        for name in outputs & self._floats:
            self._read(name, TensorProto.FLOAT)
        for value in graph.value_info:
            if self._versions.get(value.name, {}).get(self._half) == value.name:
                value.type.tensor_type.elem_type = self._half
        return self._typed

    def _read(self, name: str, kind: int) -> str:
        """The name under which ``name`` is read in the type ``kind``; casts it the first time."""
        if name not in self._floats:
            return name
        versions = self._versions[name]
        if kind not in versions:
            (source,) = versions.values()
            versions[kind] = name if source != name else f"{name}_{'float' if kind == TensorProto.FLOAT else 'half'}"
            cast = helper.make_node("Cast", [source], [versions[kind]], name=f"cast_{versions[kind]}", to=kind)
            self._typed.graph.node.append(cast)
        return versions[kind]

    def _add_weights(self) -> None:
        """Every weight in the types in which it is read, rounded from the FP32 original."""
        kinds: dict[str, set[int]] = {}
        for node in self._nodes:
            for name in node.input:
                kinds.setdefault(name, set()).add(self._kind(node))
        for name, tensor in self._weights.items():
            if name not in self._floats:
                self._typed.graph.initializer.append(tensor)
                continue
            for kind in sorted(kinds.get(name, ())):
                both = len(kinds[name]) > 1 and kind == self._half
                own = self._versions.setdefault(name, {})[kind] = f"{name}_half" if both else name
                array = numpy_helper.to_array(tensor)
                rounded = array if kind == TensorProto.FLOAT else array.astype(self._numpy)
                self._typed.graph.initializer.append(numpy_helper.from_array(rounded, own))


def emulate(model: onnx.ModelProto) -> onnx.ModelProto:
    """An FP32 graph that rounds wherever the typed graph of :func:`to_half` holds 16 bits; ``model`` is not changed.

    ONNX Runtime has no BF16 kernels on a CPU. An engine multiplies 16-bit values, sums in FP32 and rounds the result:
    so does every operator here. Values, and so parity, are the typed graph's up to the order of sums.
    """
    types = element_types(model)
    narrow = {name: kind for name, kind in types.items() if kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16)}
    emulated = without_weights(model)
    graph = emulated.graph
    nodes = list(model.graph.node)
    del graph.node[:], graph.value_info[:]
    for tensor in model.graph.initializer:
        if tensor.name in narrow:
            array = numpy_helper.to_array(tensor).astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(array, tensor.name))
        else:
            graph.initializer.append(tensor)
    for original in nodes:
        node = graph.node.add()
        node.CopyFrom(original)
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in narrow.values():
                attribute.i = TensorProto.FLOAT
        if node.op_type == "DequantizeLinear":
            continue  # an INT8 kernel multiplies integers, and scales their sum
        for i, name in enumerate(original.output):
            if name in narrow:
                node.output[i] = f"{name}_exact"
                graph.node.extend(_round(node.output[i], name, narrow[name]))
    return emulated


def _round(source: str, target: str, kind: int) -> Iterator[onnx.NodeProto]:
    """Nodes that make of the FP32 ``source`` the FP32 ``target``, a value of the type ``kind``."""
    middle = f"{target}_narrow"
    yield helper.make_node("Cast", [source], [middle], name=f"narrow_{target}", to=kind)
    yield helper.make_node("Cast", [middle], [target], name=f"widen_{target}", to=TensorProto.FLOAT)
