"""FP16 and INT8: what changed, what must not have, and that each can be repeated."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from clinifed.errors import ExportError
from clinifed.evaluation.parity import Outputs, compare, run_onnx
from clinifed.export.onnx import write_onnx
from clinifed.export.precision import convert, quantize, weight_products
from clinifed.export.presets import Presets, load_presets


@pytest.fixture(scope="module")
def presets() -> Presets:
    return load_presets()


@pytest.fixture(scope="module")
def forms(
    graph: onnx.ModelProto,
    presets: Presets,
    calibration: NDArray[np.float32],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, onnx.ModelProto]:
    """Every precision of the presets."""
    work = tmp_path_factory.mktemp("work")
    return {name: convert(graph, preset, calibration, work) for name, preset in presets.precisions.items()}


@pytest.fixture(scope="module")
def files(forms: dict[str, onnx.ModelProto], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("forms")
    for name, form in forms.items():
        write_onnx(form, folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in forms}


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Tensor → its element type, inferred."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_inputs_and_outputs_stay_fp32(name: str, forms: dict[str, onnx.ModelProto], graph: onnx.ModelProto) -> None:
    for field in ("input", "output"):
        found, wanted = (getattr(m.graph, field) for m in (forms[name], graph))
        assert {v.name for v in found} == {v.name for v in wanted}
        assert {v.type.tensor_type.elem_type for v in found} == {TensorProto.FLOAT}


@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_kept_operators_compute_in_fp32_and_products_in_fp16(name: str, forms: dict[str, onnx.ModelProto]) -> None:
    types = element_types(forms[name])
    kept = {"LayerNormalization", "Softmax", "ReduceL2", "Clip", "Div"}
    for node in forms[name].graph.node:
        if node.op_type in kept:
            assert types[node.output[0]] == TensorProto.FLOAT, node.name
        if node.op_type in ("MatMul", "Conv", "Gemm"):
            assert types[node.output[0]] == TensorProto.FLOAT16, node.name


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_every_precision_passes_its_own_gate(
    name: str, files: dict[str, Path], images: dict[str, SimpleNamespace], presets: Presets
) -> None:
    test = images["test"]
    reference: Outputs = run_onnx(files["fp32"], test.pixels)
    parity = compare(reference, run_onnx(files[name], test.pixels), test.specialties, test.labels)
    assert presets.precisions[name].parity.failures(parity) == []


def test_every_weight_product_of_int8_has_its_quantisers(
    graph: onnx.ModelProto, forms: dict[str, onnx.ModelProto], presets: Presets
) -> None:
    options = presets.precisions["int8"].quantize
    assert options is not None
    nodes = weight_products(graph, options)
    operators = [node.op_type for node in graph.graph.node]
    blocks = operators.count("Gelu")
    assert len(nodes) == 4 * blocks + 2  # qkv, proj, fc1, fc2; the patch convolution and the projection
    int8 = forms["int8"].graph
    stored = [t for t in int8.initializer if t.data_type == TensorProto.INT8 and len(t.dims) > 1]
    assert len(stored) == len(nodes)
    operators = [node.op_type for node in int8.node]
    assert operators.count("DequantizeLinear") == operators.count("QuantizeLinear") + len(nodes)


def test_heads_and_attention_products_are_not_quantised(
    graph: onnx.ModelProto, forms: dict[str, onnx.ModelProto], presets: Presets
) -> None:
    options = presets.precisions["int8"].quantize
    assert options is not None
    nodes = weight_products(graph, options)
    by_output = {name: node for node in forms["int8"].graph.node for name in node.output}
    for node in forms["int8"].graph.node:
        if node.op_type in options.op_types and node.name not in nodes:
            producers = [by_output[name].op_type for name in node.input if name in by_output]
            assert "DequantizeLinear" not in producers, node.name
    assert not [t for t in forms["int8"].graph.initializer if "heads" in t.name and t.data_type == TensorProto.INT8]


def test_sizes_shrink(files: dict[str, Path]) -> None:
    fp32, fp16, int8 = (files[name].stat().st_size for name in ("fp32", "fp16", "int8"))
    assert int8 < fp16 < 0.6 * fp32


@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_conversion_repeats_and_leaves_its_input_alone(
    name: str,
    graph: onnx.ModelProto,
    forms: dict[str, onnx.ModelProto],
    presets: Presets,
    calibration: NDArray[np.float32],
    tmp_path: Path,
) -> None:
    before = graph.SerializeToString(deterministic=True)
    again = convert(graph, presets.precisions[name], calibration, tmp_path)
    first = forms[name].SerializeToString(deterministic=True)
    assert again.SerializeToString(deterministic=True) == first
    assert graph.SerializeToString(deterministic=True) == before
    assert str(tmp_path).encode() not in first


def test_conversion_says_nothing(
    graph: onnx.ModelProto,
    presets: Presets,
    calibration: NDArray[np.float32],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    convert(graph, presets.precisions["int8"], calibration[:8], tmp_path)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_quantising_without_images_is_refused(graph: onnx.ModelProto, presets: Presets, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="needs calibration images"):
        convert(graph, presets.precisions["int8"], None, tmp_path)


def test_a_quantiser_that_skips_a_node_is_found(
    graph: onnx.ModelProto, presets: Presets, calibration: NDArray[np.float32], tmp_path: Path
) -> None:
    from clinifed.export.precision import activation_ranges

    options = presets.precisions["int8"].quantize
    assert options is not None
    ranges = activation_ranges(graph, options, calibration[:8], tmp_path)
    attention = next(node.name for node in graph.graph.node if node.op_type == "Softmax")
    with pytest.raises(ExportError, match=f"not quantised although the preset asks for it: {attention}"):
        quantize(graph, options, [attention, *weight_products(graph, options)], ranges, tmp_path)


def test_a_shared_weight_keeps_both_types(tmp_path: Path) -> None:
    """One initialiser read by a kept and by a halved operator: each gets its own copy."""
    shared = onnx.numpy_helper.from_array(np.full(4, 1.5, np.float32), "shared")
    nodes = [
        onnx.helper.make_node("LayerNormalization", ["pixels", "shared", "shared"], ["normal"], name="norm"),
        onnx.helper.make_node("Add", ["normal", "shared"], ["moved"], name="add"),
        onnx.helper.make_node("ReduceL2", ["moved"], ["length"], name="l2", keepdims=1),
        onnx.helper.make_node("Div", ["moved", "length"], ["embedding"], name="div"),
    ]
    pixels, embedding = (
        onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("pixels", "embedding")
    )
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "shared", [pixels], [embedding], [shared]),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
        ir_version=10,
    )
    half = convert(model, load_presets().precisions["fp16"], None, tmp_path)
    write_onnx(half, tmp_path / "half.onnx")
    types = {t.data_type for t in half.graph.initializer if t.name.startswith("shared")}
    assert types == {TensorProto.FLOAT, TensorProto.FLOAT16}
    found = run_onnx(tmp_path / "half.onnx", np.array([[1, 2, 3, 5]], np.float32)).embedding
    np.testing.assert_allclose(np.linalg.norm(found), 1, atol=1e-6)
