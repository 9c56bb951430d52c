"""INT8: what is quantised and what is not, and that a node taken out again is as if it had never been in."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from clinifed.errors import ExportError
from clinifed.evaluation.parity import run_onnx
from clinifed.export.norms import downstream, l2_norms
from clinifed.export.onnx import write_onnx
from clinifed.export.presets import Quantization, load_presets
from clinifed.export.quantization import quantize, unquantize, weight_products
from clinifed.export.ranges import Ranges, measure


@pytest.fixture(scope="module")
def options() -> Quantization:
    found = load_presets().precisions["int8"].quantize
    assert found is not None
    return found


@pytest.fixture(scope="module")
def ranges(graph: onnx.ModelProto, calibration: NDArray[np.float32]) -> Ranges:
    return measure(graph, calibration, {})


@pytest.fixture(scope="module")
def int8(graph: onnx.ModelProto, options: Quantization, ranges: Ranges) -> onnx.ModelProto:
    return quantize(graph, options, weight_products(graph, options), ranges)


def test_every_weight_product_has_its_quantisers(
    graph: onnx.ModelProto, int8: onnx.ModelProto, options: Quantization
) -> None:
    nodes = weight_products(graph, options)
    blocks = [node.op_type for node in graph.graph.node].count("Gelu")
    # qkv, proj, fc1, fc2; the patch convolution, and the projections of the two embeddings
    assert len(nodes) == 4 * blocks + 3
    stored = [t for t in int8.graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) > 1]
    assert len(stored) == len(nodes)
    operators = [node.op_type for node in int8.graph.node]
    assert operators.count("DequantizeLinear") == operators.count("QuantizeLinear") + len(nodes)


def test_what_reads_an_embedding_and_attention_products_are_not_quantised(
    graph: onnx.ModelProto, int8: onnx.ModelProto, options: Quantization
) -> None:
    nodes = weight_products(graph, options)
    behind = {node.name for node in downstream(graph.graph, l2_norms(graph.graph))}
    assert behind
    assert not behind & set(nodes)
    by_output = {name: node for node in int8.graph.node for name in node.output}
    bare = [node for node in int8.graph.node if node.op_type in options.op_types and node.name not in nodes]
    assert {node.op_type for node in bare} >= {"MatMul", "Gemm"}  # attention's own, and the heads
    for node in bare:
        producers = [by_output[name].op_type for name in node.input if name in by_output]
        assert "DequantizeLinear" not in producers, node.name


def test_scales_are_the_largest_magnitude_over_127(
    graph: onnx.ModelProto, int8: onnx.ModelProto, options: Quantization, ranges: Ranges
) -> None:
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in int8.graph.initializer}
    quantizers = [node for node in int8.graph.node if node.op_type == "QuantizeLinear"]
    assert quantizers
    for node in quantizers:
        assert arrays[node.input[2]] == 0  # symmetric
        steps = ranges.largest(node.input[0]) / float(arrays[node.input[1]])
        assert steps == pytest.approx(127, rel=0.005), node.name


def test_the_graph_can_be_computed_in_its_order_and_says_nothing_of_this_machine(int8: onnx.ModelProto) -> None:
    onnx.checker.check_model(int8, full_check=True)
    assert not int8.metadata_props


def test_a_node_taken_out_is_as_if_never_quantised(
    graph: onnx.ModelProto,
    int8: onnx.ModelProto,
    options: Quantization,
    ranges: Ranges,
    images: dict[str, SimpleNamespace],
    tmp_path: Path,
) -> None:
    nodes = weight_products(graph, options)
    out = [nodes[0], nodes[5], nodes[-1]]  # the convolution, a product in a block, a projection beside another
    before = int8.SerializeToString(deterministic=True)
    restored = unquantize(int8, graph, out)
    assert int8.SerializeToString(deterministic=True) == before
    direct = quantize(graph, options, [name for name in nodes if name not in out], ranges)
    for model in (restored, direct):
        onnx.checker.check_model(model, full_check=True)
    assert [node.name for node in restored.graph.node] == [node.name for node in direct.graph.node]
    assert {t.name for t in restored.graph.initializer} == {t.name for t in direct.graph.initializer}
    pixels = images["test"].pixels
    found = []
    for name, model in (("restored", restored), ("direct", direct)):
        write_onnx(model, tmp_path / f"{name}.onnx")
        found.append(run_onnx(tmp_path / f"{name}.onnx", pixels).embedding)
    np.testing.assert_array_equal(*found)


def test_taking_everything_out_gives_the_fp32_graph(
    graph: onnx.ModelProto, int8: onnx.ModelProto, options: Quantization
) -> None:
    restored = unquantize(int8, graph, weight_products(graph, options))
    assert list(restored.graph.node) == list(graph.graph.node)


def test_a_quantiser_that_skips_a_node_is_found(graph: onnx.ModelProto, options: Quantization, ranges: Ranges) -> None:
    attention = next(node.name for node in graph.graph.node if node.op_type == "Softmax")
    with pytest.raises(ExportError, match=f"not quantised although the preset asks for it: {attention}"):
        quantize(graph, options, [attention, *weight_products(graph, options)], ranges)


def test_a_graph_without_weight_products_is_refused(graph: onnx.ModelProto, options: Quantization) -> None:
    with pytest.raises(ExportError, match="nothing to quantise: no ConvTranspose multiplies by a weight"):
        weight_products(graph, options.model_copy(update={"op_types": ("ConvTranspose",)}))
