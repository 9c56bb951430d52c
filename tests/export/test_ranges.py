"""Ranges are the extremes that the graph's tensors take on all images, whatever the batch."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from clinifed.errors import ExportError
from clinifed.evaluation.parity import PIXELS
from clinifed.export import ranges
from clinifed.export.ranges import element_types, measure, without_weights


def run_tensor(model: onnx.ModelProto, tensor: str, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """The tensor's values on all images at once."""
    with_output = onnx.ModelProto()
    with_output.CopyFrom(model)
    with_output.graph.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(with_output.SerializeToString(), providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run([tensor], {PIXELS: pixels})[0]
    return found


def test_extremes_are_those_of_all_images(graph: onnx.ModelProto, calibration: NDArray[np.float32]) -> None:
    pixels = calibration[:20]  # two batches and a half
    node = next(n for n in graph.graph.node if n.op_type == "LayerNormalization")
    channels = onnx.numpy_helper.to_array(next(t for t in graph.graph.initializer if t.name == node.input[1])).size
    found = measure(graph, pixels, {node.output[0]: channels})
    product = next(n for n in graph.graph.node if n.op_type == "MatMul").output[0]
    for tensor in (PIXELS, product):
        values = pixels if tensor == PIXELS else run_tensor(graph, tensor, pixels)
        np.testing.assert_allclose(found.of(tensor), (values.min(), values.max()), rtol=1e-5)
    values = run_tensor(graph, node.output[0], pixels)  # (B, T, C)
    np.testing.assert_allclose(found.channels(node.output[0]), np.abs(values).max(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_allclose(found.of(node.output[0]), (values.min(), values.max()), rtol=1e-5)


def test_every_float_tensor_but_the_weights_is_measured(
    graph: onnx.ModelProto, calibration: NDArray[np.float32]
) -> None:
    found = measure(graph, calibration[:1], {})
    weights = {tensor.name for tensor in graph.graph.initializer}
    floats = {name for name, kind in element_types(graph).items() if kind == TensorProto.FLOAT}
    assert set(found.extremes) == floats - weights


def test_the_batch_changes_nothing(
    graph: onnx.ModelProto, calibration: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(graph, calibration[:8], {})
    monkeypatch.setattr(ranges, "_BATCH", 3)
    parts = measure(graph, calibration[:8], {})
    for tensor in whole.extremes:
        np.testing.assert_allclose(parts.of(tensor), whole.of(tensor), rtol=1e-4, atol=1e-5)


def test_dividing_channels_divides_their_ranges(graph: onnx.ModelProto, calibration: NDArray[np.float32]) -> None:
    tensor = next(n for n in graph.graph.node if n.op_type == "LayerNormalization").output[0]
    found = measure(graph, calibration[:4], {tensor: 64})
    scale = np.linspace(0.5, 2, 64, dtype=np.float32)
    after = found.divided([tensor], scale)
    np.testing.assert_allclose(after.channels(tensor), found.channels(tensor) / scale, rtol=1e-6)
    assert after.of(PIXELS) == found.of(PIXELS)


def test_a_value_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in (PIXELS, "y")]
    nodes = [helper.make_node("Exp", [PIXELS], ["y"], name="exp")]
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(helper.make_graph(nodes, "exp", ends[:1], ends[1:]), opset_imports=opset, ir_version=10)
    with pytest.raises(ExportError, match="overflows on the calibration images: first in 'y'"):
        measure(model, np.full((1, 2), 100, np.float32), {})


def test_control_flow_is_refused() -> None:
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["z"], value_float=1.0)],
        "branch",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [])],
    )
    condition = helper.make_tensor_value_info("condition", TensorProto.BOOL, [])
    node = helper.make_node("If", ["condition"], ["y"], name="choice", then_branch=branch, else_branch=branch)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [])
    with pytest.raises(ExportError, match="control flow cannot be converted: choice"):
        element_types(helper.make_model(helper.make_graph([node], "flow", [condition], [output])))


def test_a_graph_without_weights_is_small_and_its_original_whole(graph: onnx.ModelProto) -> None:
    before = len(graph.graph.initializer)
    bare = without_weights(graph)
    assert not bare.graph.initializer
    assert list(bare.graph.node) == list(graph.graph.node)
    assert bare.opset_import == graph.opset_import
    assert len(graph.graph.initializer) == before
