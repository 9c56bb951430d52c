"""The smoothing fold changes nothing in FP32, and gives INT8 back what outliers took."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from clinifed.evaluation.parity import PIXELS, Outputs, run_onnx
from clinifed.export.onnx import write_onnx
from clinifed.export.precision import Converter
from clinifed.export.presets import load_presets
from clinifed.export.ranges import measure
from clinifed.export.smoothing import Fold, fold, foldable, scales

OUTLIERS, FACTOR = 6, 40.0  # channels per LayerNorm, as Xiao et al. 2023 see in large models


def with_outliers(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function in FP32: a few channels of every foldable LayerNorm are larger, their weights smaller."""
    rng = np.random.default_rng(0)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    nodes = {node.name: node for node in changed.graph.node}
    weights = {tensor.name: tensor for tensor in changed.graph.initializer}

    def scale(name: str, factor: NDArray[np.float32]) -> None:
        weights[name].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights[name]) * factor, name))

    for found in foldable(changed.graph):
        factor = np.ones(found.channels, np.float32)
        factor[rng.choice(found.channels, OUTLIERS, replace=False)] = FACTOR
        for name in nodes[found.norm].input[1:]:
            scale(name, factor)
        for product in (nodes[name] for name in found.products):
            transposed = any(a.name == "transB" and a.i for a in product.attribute)
            scale(product.input[1], 1 / (factor if transposed else factor[:, None]))
    return changed


def run(model: onnx.ModelProto, pixels: NDArray[np.float32], folder: Path) -> Outputs:
    write_onnx(model, folder / "run.onnx")
    return run_onnx(folder / "run.onnx", pixels)


def cosine(a: Outputs, b: Outputs) -> float:
    return float(np.mean(np.sum(a.embedding * b.embedding, axis=1)))


def small(*nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("y",), **weights: tuple[int, ...]) -> onnx.ModelProto:
    """A graph on pixels (batch, 4) with random weights."""
    rng = np.random.default_rng(1)
    arrays = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name) for name, shape in weights.items()
    ]
    pixels, *ends = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in (PIXELS, *outputs))
    graph = helper.make_graph(list(nodes), "small", [pixels], ends, arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


NORM = helper.make_node("LayerNormalization", [PIXELS, "gamma", "beta"], ["x"], name="norm")
PRODUCT = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")


def test_every_layernorm_before_weights_is_found(graph: onnx.ModelProto) -> None:
    norms = [node.name for node in graph.graph.node if node.op_type == "LayerNormalization"]
    found = {each.norm: each for each in foldable(graph.graph)}
    assert list(found) == norms
    assert len(found[norms[0]].products) == 1  # qkv in one
    assert len(found[norms[-1]].products) == 2  # behind the class token: the trained projection, and the base model's


def test_the_fold_is_exact_in_fp32(
    graph: onnx.ModelProto, calibration: NDArray[np.float32], images: dict[str, SimpleNamespace], tmp_path: Path
) -> None:
    folds = foldable(graph.graph)
    ranges = measure(graph, calibration, {t: f.channels for f in folds for t in f.tensors})
    folded, after = fold(graph, folds, ranges, 0.5)
    onnx.checker.check_model(folded, full_check=True)
    pixels = images["test"].pixels
    one, other = run(graph, pixels, tmp_path), run(folded, pixels, tmp_path)
    assert np.abs(one.embedding - other.embedding).max() < 1e-6
    for name, logits in one.logits.items():
        np.testing.assert_allclose(other.logits[name], logits, rtol=1e-5, atol=1e-5)
    # and the ranges that come with it are those of the folded graph, without another run
    again = measure(folded, calibration, {})
    for tensor in again.extremes:
        np.testing.assert_allclose(after.of(tensor), again.of(tensor), rtol=1e-4, atol=1e-4)


def test_channels_share_their_range_with_their_weights(
    graph: onnx.ModelProto, calibration: NDArray[np.float32]
) -> None:
    """At alpha 0.5 both have the same maximum in every channel: the geometric mean of what they had."""
    model = with_outliers(graph)
    folds = foldable(model.graph)[:1]
    tensor = folds[0].tensors[0]
    ranges = measure(model, calibration, {tensor: folds[0].channels})
    folded, after = fold(model, folds, ranges, 0.5)
    product = next(node for node in folded.graph.node if node.name == folds[0].products[0])
    weight = next(numpy_helper.to_array(t) for t in folded.graph.initializer if t.name == product.input[1])
    np.testing.assert_allclose(np.abs(weight).max(axis=1), after.channels(tensor), rtol=1e-4)


def test_outliers_break_plain_int8_and_smoothing_mends_it(
    graph: onnx.ModelProto, calibration: NDArray[np.float32], images: dict[str, SimpleNamespace], tmp_path: Path
) -> None:
    quantize = load_presets().precisions["int8"].quantize
    assert quantize is not None
    assert quantize.smoothing > 0
    plain = quantize.model_copy(update={"smoothing": 0.0})
    pixels = images["test"].pixels
    model = with_outliers(graph)
    reference = run(graph, pixels, tmp_path)
    assert cosine(reference, run(model, pixels, tmp_path)) > 0.999999
    converter = Converter(model, calibration)
    broken = cosine(reference, run(converter.quantized(plain), pixels, tmp_path))
    mended = cosine(reference, run(converter.quantized(quantize), pixels, tmp_path))
    assert broken < 0.995
    assert 1 - mended < (1 - broken) / 100
    # The fold finds the factors again: INT8 is as close as if there had never been outliers.
    assert mended > 0.9999


def test_alpha_0_folds_nothing(graph: onnx.ModelProto, calibration: NDArray[np.float32]) -> None:
    quantize = load_presets().precisions["int8"].quantize
    assert quantize is not None
    converter = Converter(graph, calibration)
    assert converter.folded(quantize) == len(foldable(graph.graph))
    assert converter.folded(quantize.model_copy(update={"smoothing": 0.0})) == 0


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (small(NORM, PRODUCT, outputs=("y", "x"), gamma=(4,), beta=(4,), w=(4, 4)), "a graph output"),
        (
            small(
                NORM,
                PRODUCT,
                helper.make_node("Add", ["x", "y"], ["z"], name="residual"),
                outputs=("z",),
                gamma=(4,),
                beta=(4,),
                w=(4, 4),
            ),
            "the residual stream",
        ),
        (
            small(NORM, helper.make_node("MatMul", ["w", "x"], ["y"], name="product"), gamma=(4,), beta=(4,), w=(4, 4)),
            "a product that mixes other than channels",
        ),
        (
            small(
                NORM,
                helper.make_node("Gather", ["x", "order"], ["g"], name="channels", axis=1),
                helper.make_node("MatMul", ["g", "w"], ["y"], name="product"),
                gamma=(4,),
                beta=(4,),
                w=(4, 4),
                order=(4,),
            ),
            "a selection of channels",
        ),
    ],
)
def test_another_reader_forbids_the_fold(model: onnx.ModelProto, why: str) -> None:
    assert foldable(model.graph) == [], why


def test_separate_products_are_scaled_together_and_shared_weights_copied(tmp_path: Path) -> None:
    """Two norms with one gamma, one of them read by two products of one weight: each gets copies of its own."""
    model = small(
        NORM,
        PRODUCT,
        helper.make_node("Gemm", ["x", "w"], ["t"], name="transposed", transB=1),
        helper.make_node("LayerNormalization", ["y", "gamma", "beta"], ["residual"], name="other"),
        helper.make_node("Sum", ["residual", "t"], ["z"], name="sum"),
        helper.make_node("ReduceL2", ["z"], ["length"], name="l2", keepdims=1),
        helper.make_node("Div", ["z", "length"], ["embedding"], name="div"),
        outputs=("embedding",),
        gamma=(4,),
        beta=(4,),
        w=(4, 4),
    )
    assert foldable(model.graph) == [Fold("norm", ("x",), ("product", "transposed"), 4)]
    pixels = np.random.default_rng(2).standard_normal((16, 4)).astype(np.float32)
    before = model.SerializeToString(deterministic=True)
    folded, _ = fold(model, foldable(model.graph), measure(model, pixels, {"x": 4}), 0.7)
    assert model.SerializeToString(deterministic=True) == before
    read = {node.name: list(node.input) for node in folded.graph.node}
    assert read["other"][1:] == ["gamma", "beta"]
    assert len({read["norm"][1], read["product"][1], read["transposed"][1], "gamma", "w"}) == 5
    assert len(folded.graph.initializer) == len({t.name for t in folded.graph.initializer})
    one, other = run(model, pixels, tmp_path), run(folded, pixels, tmp_path)
    np.testing.assert_allclose(other.embedding, one.embedding, atol=1e-6)


def test_a_layernorm_without_beta_is_folded(tmp_path: Path) -> None:
    model = small(
        helper.make_node("LayerNormalization", [PIXELS, "gamma"], ["x"], name="norm"),
        helper.make_node("MatMul", ["x", "w"], ["embedding"], name="product"),
        outputs=("embedding",),
        gamma=(4,),
        w=(4, 4),
    )
    pixels = np.random.default_rng(3).standard_normal((16, 4)).astype(np.float32)
    folded, _ = fold(model, foldable(model.graph), measure(model, pixels, {"x": 4}), 0.5)
    one, other = run(model, pixels, tmp_path), run(folded, pixels, tmp_path)
    np.testing.assert_allclose(other.embedding, one.embedding, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_scales_are_positive_and_finite_whatever_a_channel_is(alpha: float) -> None:
    usual = np.array([1.0, 2.0, 3.0], np.float32)
    for odd in (np.zeros(3), np.full(3, 1e-40), np.array([0, 1e-40, 1.0]), np.array([1e38, 1e-38, 0])):
        for pair in ((odd.astype(np.float32), usual), (usual, odd.astype(np.float32))):
            found = scales(*pair, alpha)
            assert np.isfinite(found).all()
            assert (found > np.finfo(np.float32).tiny).all()
            assert np.isfinite(1 / found).all()


def test_scales_are_the_papers() -> None:
    activation, weight = np.array([16.0, 2.0], np.float32), np.array([2.0, 8.0], np.float32)
    np.testing.assert_allclose(scales(activation, weight, 0.75), [16**0.75 / 2**0.25, 2**0.75 / 8**0.25], rtol=1e-6)
