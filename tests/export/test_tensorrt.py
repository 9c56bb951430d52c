"""Engines: built from the typed graph, or a clear reason why not. None is executed here."""

import sys
from pathlib import Path

import onnx
import pytest

from clinifed.errors import ExportError
from clinifed.export import tensorrt
from clinifed.export.onnx import write_onnx
from clinifed.export.presets import load_presets

PRESETS = load_presets()


@pytest.fixture
def fp32(graph: onnx.ModelProto, tmp_path: Path) -> Path:
    path = tmp_path / "fp32.onnx"
    write_onnx(graph, path)
    return path


@pytest.fixture(autouse=True)
def _forget_imports():
    tensorrt._toolkit.cache_clear()
    yield
    tensorrt._toolkit.cache_clear()


def test_an_engine_is_built_without_a_gpu_for_the_named_capabilities(fp32: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    engine = tensorrt.build_engine(fp32, "tensorrt-rtx", PRESETS.engine_for("fp32"))
    assert engine.data[:4] == b"vtrt"  # the format's own mark
    assert set(engine.compute_capabilities) == {"SM80", "SM86", "SM89", "SM120"}
    path = tmp_path / "deep" / "fp32.engine"
    assert tensorrt.write_engine(engine, path) == path.stat().st_size == len(engine.data)


def test_a_damaged_graph_is_an_error_with_the_builders_own_words(fp32: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    fp32.write_bytes(fp32.read_bytes()[:2000])
    with pytest.raises(ExportError, match="tensorrt-rtx"):
        tensorrt.build_engine(fp32, "tensorrt-rtx", PRESETS.engine_for("fp32"))


def test_an_unknown_capability_is_an_error(fp32: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = PRESETS.engine_for("fp32").model_copy(update={"compute_capabilities": ("SM90",)})
    with pytest.raises(ExportError, match="SM90"):
        tensorrt.build_engine(fp32, "tensorrt-rtx", options)


@pytest.mark.parametrize("name", tensorrt.TARGETS)
def test_an_absent_package_names_the_extra_that_installs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, tensorrt.TARGETS[name].module, None)
    with pytest.raises(ExportError, match=rf"pip install 'clinifed\[{tensorrt.TARGETS[name].extra}\]'"):
        tensorrt.check_target(name)


def test_an_unknown_target_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ExportError, match="tensorrt, tensorrt-rtx"):
        tensorrt.check_target("openvino")
