"""FP16 and BF16: what stays FP32, what must not overflow, and that every rounding is seen."""

from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from clinifed.errors import ExportError
from clinifed.evaluation.parity import EMBEDDING, PIXELS, Outputs, run_onnx
from clinifed.export.half import emulate, overflowing, to_half
from clinifed.export.norms import l2_norms
from clinifed.export.onnx import write_onnx
from clinifed.export.precision import Converter
from clinifed.export.presets import HalfPrecision, load_presets
from clinifed.export.ranges import Ranges, element_types, measure

PRESETS = load_presets()
TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
NOTHING_MEASURED = Ranges({})


def options_of(name: str) -> HalfPrecision:
    half = PRESETS.precisions[name].half
    assert half is not None
    return half


@pytest.fixture(scope="module")
def typed(graph: onnx.ModelProto, calibration: NDArray[np.float32]) -> dict[str, onnx.ModelProto]:
    converter = Converter(graph, calibration)
    return {name: converter.convert(PRESETS.precisions[name]) for name in TYPES}


def run(model: onnx.ModelProto, pixels: NDArray[np.float32], folder: Path) -> Outputs:
    write_onnx(model, folder / "run.onnx")
    return run_onnx(folder / "run.onnx", pixels)


def cosines(a: Outputs, b: Outputs) -> NDArray[np.float32]:
    return np.asarray(np.sum(a.embedding * b.embedding, axis=1), np.float32)


def small(*nodes: onnx.NodeProto, **weights: NDArray[np.float32]) -> onnx.ModelProto:
    """A graph pixels (batch, 4) → z, and z's norm as its embedding."""
    norm = [
        helper.make_node("ReduceL2", ["z", "last axis"], ["length"], name="l2", keepdims=1),
        helper.make_node("Div", ["z", "length"], [EMBEDDING], name="div"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in (PIXELS, EMBEDDING)]
    arrays = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    arrays.append(numpy_helper.from_array(np.array([-1], np.int64), "last axis"))
    graph = helper.make_graph([*nodes, *norm], "small", ends[:1], ends[1:], arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("name", TYPES)
def test_kept_operators_compute_in_fp32_and_products_in_16_bits(
    name: str, typed: dict[str, onnx.ModelProto], graph: onnx.ModelProto
) -> None:
    types = element_types(typed[name])
    seen = set()
    for node in typed[name].graph.node:
        seen.add(node.op_type)
        if node.op_type in ("LayerNormalization", "Softmax", "ReduceL2"):
            assert types[node.output[0]] == TensorProto.FLOAT, node.name
        # ONNX defines Conv on BF16 from opset 22 only.
        if node.op_type in ("MatMul", "Gemm") or (node.op_type == "Conv" and name == "fp16"):
            assert types[node.output[0]] == TYPES[name], node.name
    assert seen >= {"LayerNormalization", "Softmax", "ReduceL2", "MatMul", "Gemm", "Conv"}


@pytest.mark.parametrize("name", TYPES)
def test_from_a_norms_start_to_its_embedding_nothing_is_rounded(
    name: str, typed: dict[str, onnx.ModelProto], graph: onnx.ModelProto
) -> None:
    types = element_types(typed[name])
    norms = l2_norms(graph.graph)
    assert len(norms) == 2
    inside = {node for nodes in norms.values() for node in nodes}
    for node in typed[name].graph.node:
        if node.name in inside:
            assert TYPES[name] not in {types[tensor] for tensor in (*node.input, *node.output)}, node.name


@pytest.mark.parametrize("name", TYPES)
def test_the_typed_graph_is_valid_and_no_value_is_typed_wrongly(name: str, typed: dict[str, onnx.ModelProto]) -> None:
    onnx.checker.check_model(typed[name], full_check=True)
    types = element_types(typed[name])
    written = {v.name: v.type.tensor_type.elem_type for v in typed[name].graph.value_info}
    assert written
    assert written == {tensor: types[tensor] for tensor in written}


@pytest.mark.parametrize("name", TYPES)
def test_weights_are_rounded_from_the_fp32_originals(
    name: str, typed: dict[str, onnx.ModelProto], graph: onnx.ModelProto
) -> None:
    originals = {t.name: numpy_helper.to_array(t) for t in graph.graph.initializer}
    dtype = np.dtype(np.float16 if name == "fp16" else ml_dtypes.bfloat16)
    halved = [t for t in typed[name].graph.initializer if t.data_type == TYPES[name]]
    assert len(halved) > 20
    for tensor in halved:
        np.testing.assert_array_equal(
            numpy_helper.to_array(tensor).astype(np.float32), originals[tensor.name].astype(dtype).astype(np.float32)
        )


@pytest.mark.parametrize(("name", "least"), [("fp16", 0.99999), ("bf16", 0.9999)])
def test_the_embeddings_stay_close_with_every_rounding(
    name: str,
    least: float,
    typed: dict[str, onnx.ModelProto],
    graph: onnx.ModelProto,
    images: dict[str, SimpleNamespace],
    tmp_path: Path,
) -> None:
    pixels = images["test"].pixels
    reference, found = run(graph, pixels, tmp_path), run(emulate(typed[name]), pixels, tmp_path)
    assert cosines(reference, found).mean() >= least
    assert np.abs(reference.embedding - found.embedding).max() > 1e-5  # it is another computation


@pytest.mark.parametrize("name", TYPES)
def test_emulation_rounds_what_the_typed_graph_rounds(name: str, tmp_path: Path) -> None:
    """Against the same steps in NumPy, to the bit: a product's weight, its input and its result are rounded."""
    dtype = np.dtype(np.float16 if name == "fp16" else ml_dtypes.bfloat16)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 4)).astype(np.float32)
    pixels = rng.standard_normal((8, 4)).astype(np.float32)
    model = small(helper.make_node("MatMul", [PIXELS, "w"], ["z"], name="product"), w=weight)
    emulated = emulate(to_half(model, options_of(name), NOTHING_MEASURED))

    def rounded(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(x.astype(dtype).astype(np.float32))

    z = rounded(rounded(pixels) @ rounded(weight))
    wanted = z / np.linalg.norm(z, axis=1, keepdims=True)
    exact = pixels @ weight
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    found = run(emulated, pixels, tmp_path).embedding
    np.testing.assert_allclose(found, wanted, atol=3e-7)
    assert np.abs(exact - wanted).max() > 1e-5


BIG = np.diag(np.array([3e4, 1, 1, 1], np.float32))
# 30000 · pixels is beyond FP16's 65504 for every pixel above 2.2; what is read of it is not.
LARGE_ACTIVATION = small(
    helper.make_node("MatMul", [PIXELS, "big"], ["large"], name="enlarge"),
    helper.make_node("Mul", ["large", "one"], ["same"], name="carry"),
    helper.make_node("Add", ["large", "same"], ["twice"], name="twice"),
    helper.make_node("MatMul", ["twice", "small"], ["back"], name="reduce"),
    helper.make_node("Relu", ["back"], ["z"], name="relu"),
    big=BIG / 4,
    small=np.linalg.inv(BIG).astype(np.float32) * 4,
    one=np.ones(1, np.float32),
)
PIXELS_UP_TO_20 = np.random.default_rng(1).uniform(1, 20, (16, 4)).astype(np.float32)


def test_an_activation_beyond_fp16_stays_fp32(tmp_path: Path) -> None:
    options = options_of("fp16")
    ranges = measure(LARGE_ACTIVATION, PIXELS_UP_TO_20, {})
    assert ranges.largest("large") > float(np.finfo(np.float16).max)
    wanted = run(LARGE_ACTIVATION, PIXELS_UP_TO_20, tmp_path).embedding
    naive = run(emulate(to_half(LARGE_ACTIVATION, options, NOTHING_MEASURED)), PIXELS_UP_TO_20, tmp_path).embedding
    assert not np.isfinite(naive).all()
    assert overflowing(LARGE_ACTIVATION, options, ranges) == ["enlarge", "carry", "twice", "reduce"]
    typed = to_half(LARGE_ACTIVATION, options, ranges)
    ours = run(emulate(typed), PIXELS_UP_TO_20, tmp_path).embedding
    assert np.abs(ours - wanted).max() < 1e-3
    types = element_types(typed)
    assert types["z"] == TensorProto.FLOAT16  # the rest is halved all the same
    assert [node.op_type for node in typed.graph.node].count("Cast") == 2  # no cast within the chain


def test_headroom_counts_before_the_overflow() -> None:
    options = options_of("fp16")
    ranges = measure(LARGE_ACTIVATION, PIXELS_UP_TO_20 / 8, {})
    largest = ranges.largest("twice")
    limit = largest / float(np.finfo(np.float16).max)
    assert limit < 1
    below, above = (options.model_copy(update={"headroom": limit * factor}) for factor in (0.99, 1.01))
    assert "twice" in overflowing(LARGE_ACTIVATION, below, ranges)
    assert "twice" not in overflowing(LARGE_ACTIVATION, above, ranges)


def test_a_weight_beyond_fp16_stays_fp32() -> None:
    model = small(helper.make_node("MatMul", [PIXELS, "w"], ["z"], name="product"), w=BIG)
    assert overflowing(model, options_of("fp16"), NOTHING_MEASURED) == ["product"]
    typed = to_half(model, options_of("fp16"), NOTHING_MEASURED)
    assert TensorProto.FLOAT16 not in {t.data_type for t in typed.graph.initializer}
    assert overflowing(model, options_of("bf16"), NOTHING_MEASURED) == []  # its range is FP32's


def test_an_int8_weight_beyond_fp16_is_dequantised_in_fp32() -> None:
    """What an INT8 value stands for is judged by its scale; one Cast between it and its product would undo INT8."""
    scale, zero = np.full(4, 200, np.float32), np.zeros(4, np.int8)
    model = small(
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["w"], name="dequantise", axis=1),
        helper.make_node("MatMul", [PIXELS, "w"], ["z"], name="product"),
        q=np.ones((4, 4), np.int8),
        scale=scale,
        zero=zero,
    )
    assert overflowing(model, options_of("fp16"), NOTHING_MEASURED) == ["dequantise", "product"]
    types = element_types(to_half(model, options_of("fp16"), NOTHING_MEASURED))
    assert types["w"] == types["z"] == TensorProto.FLOAT


def test_nothing_of_the_tiny_model_overflows(graph: onnx.ModelProto, calibration: NDArray[np.float32]) -> None:
    assert overflowing(graph, options_of("fp16"), measure(graph, calibration, {})) == []


def test_a_graph_whose_embedding_no_norm_makes_is_refused() -> None:
    model = small(helper.make_node("Relu", [PIXELS], ["z"], name="relu"))
    options = options_of("fp16").model_copy(update={"keep_fp32_norm": ("LpNormalization",)})
    with pytest.raises(ExportError, match="no L2 norm by LpNormalization makes the output 'embedding'"):
        to_half(model, options, NOTHING_MEASURED)


def test_a_shared_weight_keeps_both_types(tmp_path: Path) -> None:
    """One initialiser read by a kept and by a halved operator: each gets its own copy."""
    model = small(
        helper.make_node("LayerNormalization", [PIXELS, "shared", "shared"], ["normal"], name="norm"),
        helper.make_node("Add", ["normal", "shared"], ["z"], name="add"),
        shared=np.full(4, 1.5, np.float32),
    )
    typed = to_half(model, options_of("fp16"), NOTHING_MEASURED)
    types = {t.name: t.data_type for t in typed.graph.initializer if t.name.startswith("shared")}
    assert types == {"shared": TensorProto.FLOAT, "shared_half": TensorProto.FLOAT16}
    found = run(typed, np.array([[1, 2, 3, 5]], np.float32), tmp_path).embedding
    np.testing.assert_allclose(np.linalg.norm(found), 1, atol=1e-6)


def test_a_graph_output_that_others_read_is_fp32_under_its_name(tmp_path: Path) -> None:
    model = small(
        helper.make_node("Relu", [PIXELS], ["logits_a"], name="relu"),
        helper.make_node("Neg", ["logits_a"], ["z"], name="neg"),
    )
    model.graph.output.append(helper.make_tensor_value_info("logits_a", TensorProto.FLOAT, ["batch", 4]))
    typed = to_half(model, options_of("fp16"), NOTHING_MEASURED)
    onnx.checker.check_model(typed, full_check=True)
    types = element_types(typed)
    assert types["logits_a"] == TensorProto.FLOAT
    assert types["z"] == TensorProto.FLOAT16
    pixels = np.array([[1 / 3, 2, -3, 5]], np.float32)
    found = run(emulate(typed), pixels, tmp_path).logits["a"]
    np.testing.assert_array_equal(found, np.maximum(pixels, 0).astype(np.float16).astype(np.float32))


def test_tensorrt_rtx_builds_the_bf16_graph(typed: dict[str, onnx.ModelProto], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from clinifed.export.tensorrt import build_engine

    write_onnx(typed["bf16"], tmp_path / "bf16.onnx")
    engine = build_engine(tmp_path / "bf16.onnx", "tensorrt-rtx", PRESETS.engine_for("workstation", "bf16"))
    assert engine.data[:4] == b"vtrt"
