"""The presets' precisions: each passes its gate, can be repeated, and shares what was measured once."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto

from clinifed.errors import ExportError
from clinifed.evaluation.parity import compare, run_onnx
from clinifed.export import precision as precision_module
from clinifed.export.half import emulate
from clinifed.export.onnx import write_onnx
from clinifed.export.precision import Converter
from clinifed.export.presets import load_presets
from clinifed.export.quantization import weight_products
from clinifed.export.ranges import element_types

PRESETS = load_presets()
CONVERTED = [name for name, preset in PRESETS.precisions.items() if preset.quantize or preset.half]


@pytest.fixture(scope="module")
def forms(graph: onnx.ModelProto, calibration: NDArray[np.float32]) -> dict[str, onnx.ModelProto]:
    """Every precision of the presets."""
    converter = Converter(graph, calibration)
    return {name: converter.convert(preset) for name, preset in PRESETS.precisions.items()}


@pytest.mark.parametrize("name", PRESETS.precisions)
def test_inputs_and_outputs_stay_fp32(name: str, forms: dict[str, onnx.ModelProto], graph: onnx.ModelProto) -> None:
    for field in ("input", "output"):
        assert list(getattr(forms[name].graph, field)) == list(getattr(graph.graph, field))


@pytest.mark.parametrize("name", PRESETS.precisions)
def test_every_precision_passes_its_own_gate(
    name: str,
    forms: dict[str, onnx.ModelProto],
    graph: onnx.ModelProto,
    images: dict[str, SimpleNamespace],
    tmp_path: Path,
) -> None:
    test = images["test"]
    write_onnx(graph, tmp_path / "fp32.onnx")
    write_onnx(emulate(forms[name]), tmp_path / "other.onnx")
    reference, found = (run_onnx(tmp_path / f"{which}.onnx", test.pixels) for which in ("fp32", "other"))
    parity = compare(reference, found, test.specialties, test.labels)
    assert PRESETS.precisions[name].parity.failures(parity) == []


def test_int8_products_are_dequantised_without_a_cast_in_between(
    graph: onnx.ModelProto, forms: dict[str, onnx.ModelProto]
) -> None:
    """TensorRT makes an INT8 kernel of exactly this: two DequantizeLinear and the product, of one type."""
    options = PRESETS.precisions["int8"].quantize
    assert options is not None
    products = weight_products(graph, options)
    types = element_types(forms["int8"])
    producer = {name: node.op_type for node in forms["int8"].graph.node for name in node.output}
    found = [node for node in forms["int8"].graph.node if node.name in products]
    assert len(found) == len(products)
    for node in found:
        assert [producer[name] for name in node.input[:2]] == ["DequantizeLinear"] * 2, node.name
        assert {types[name] for name in (*node.input, *node.output)} == {TensorProto.FLOAT16}, node.name


def test_sizes_shrink(forms: dict[str, onnx.ModelProto]) -> None:
    size = {name: form.ByteSize() for name, form in forms.items()}
    assert size["int8"] < 0.4 * size["fp32"]  # 0.25 at BiomedCLIP's size, where weights are nearly all
    for name in ("fp16", "bf16"):
        assert size["int8"] < size[name] < 0.6 * size["fp32"]


@pytest.mark.parametrize("name", CONVERTED)
def test_conversion_repeats_and_leaves_its_input_alone(
    name: str,
    graph: onnx.ModelProto,
    forms: dict[str, onnx.ModelProto],
    calibration: NDArray[np.float32],
) -> None:
    before = graph.SerializeToString(deterministic=True)
    again = Converter(graph, calibration).convert(PRESETS.precisions[name])
    assert again.SerializeToString(deterministic=True) == forms[name].SerializeToString(deterministic=True)
    assert graph.SerializeToString(deterministic=True) == before


def test_what_conversions_share_is_computed_once(
    graph: onnx.ModelProto, calibration: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("measure", "fold", "quantize"):
        real = getattr(precision_module, name)

        def counted(*args: object, _name: str = name, _real: object = real) -> object:
            calls.append(_name)
            return _real(*args)  # type: ignore[operator]

        monkeypatch.setattr(precision_module, name, counted)
    converter = Converter(graph, calibration[:8])
    preset = PRESETS.precisions["int8"]
    assert preset.quantize is not None
    nodes = weight_products(graph, preset.quantize)
    for keep in ((), nodes[:1], nodes[:3]):
        converter.convert(preset, keep)
    converter.convert(PRESETS.precisions["fp16"])
    assert calls == ["measure", "fold", "quantize"]


def test_kept_nodes_are_not_quantised(graph: onnx.ModelProto, calibration: NDArray[np.float32]) -> None:
    preset = PRESETS.precisions["int8"]
    assert preset.quantize is not None
    nodes = weight_products(graph, preset.quantize)
    kept = Converter(graph, calibration[:8]).convert(preset, nodes[:2])
    stored = [t for t in kept.graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) > 1]
    assert len(stored) == len(nodes) - 2


def test_keeping_what_is_not_quantised_is_refused(graph: onnx.ModelProto, calibration: NDArray[np.float32]) -> None:
    converter = Converter(graph, calibration[:8])
    with pytest.raises(ExportError, match="cannot be kept, since INT8 does not touch it: nobody"):
        converter.convert(PRESETS.precisions["int8"], ["nobody"])


def test_conversion_says_nothing(
    graph: onnx.ModelProto,
    calibration: NDArray[np.float32],
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    Converter(graph, calibration[:8]).convert(PRESETS.precisions["int8"])
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_fp32_needs_no_images_and_is_the_graph_itself(graph: onnx.ModelProto) -> None:
    assert Converter(graph, None).convert(PRESETS.precisions["fp32"]) is graph


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.parametrize("pixels", [None, np.zeros((0, 3, 160, 160), np.float32)])
def test_converting_without_images_is_refused(
    name: str, pixels: NDArray[np.float32] | None, graph: onnx.ModelProto
) -> None:
    with pytest.raises(ExportError, match="depends on calibration images; none were given"):
        Converter(graph, pixels).convert(PRESETS.precisions[name])
