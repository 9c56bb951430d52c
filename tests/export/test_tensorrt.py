"""Engines: built from the typed graph at every precision, or a clear reason why not. None is executed here."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from clinifed.errors import ExportError
from clinifed.export import tensorrt
from clinifed.export.onnx import write_onnx
from clinifed.export.precision import Converter
from clinifed.export.presets import load_presets

PRESETS = load_presets()


@pytest.fixture
def fp32(graph: onnx.ModelProto, tmp_path: Path) -> Path:
    path = tmp_path / "fp32.onnx"
    write_onnx(graph, path)
    return path


@pytest.fixture(scope="module")
def converter(graph: onnx.ModelProto, calibration: NDArray[np.float32]) -> Converter:
    return Converter(graph, calibration)


@pytest.mark.parametrize("precision", PRESETS.precisions)
def test_every_precision_is_built_without_a_gpu_for_the_named_capabilities(
    precision: str, converter: Converter, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path / f"{precision}.onnx"
    write_onnx(converter.convert(PRESETS.precisions[precision]), path)
    options = PRESETS.engine_for("workstation", precision)
    engine = tensorrt.build_engine(path, "tensorrt-rtx", options)
    assert engine.data[:4] == b"vtrt"  # the format's own mark
    assert engine.compute_capabilities == options.compute_capabilities
    assert {"SM80", "SM86", "SM89", "SM120"} <= set(options.compute_capabilities)
    assert engine.complaints == ()
    written = tmp_path / "deep" / f"{precision}.engine"
    assert tensorrt.write_engine(engine, written) == written.stat().st_size == len(engine.data)
    metadata = json.loads(json.dumps(engine.metadata()))
    assert metadata["bytes"] == len(engine.data)
    assert metadata["profile"] == {"min": 1, "opt": 8, "max": 32}
    assert metadata["package"].startswith("tensorrt_rtx ")
    assert metadata["executed"] is False


def test_a_damaged_graph_is_an_error_with_the_builders_own_words(fp32: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    fp32.write_bytes(fp32.read_bytes()[:2000])
    with pytest.raises(ExportError, match=r"target 'tensorrt-rtx': .*fp32\.onnx cannot be parsed"):
        tensorrt.build_engine(fp32, "tensorrt-rtx", PRESETS.engine_for("workstation", "fp32"))


def test_an_unknown_capability_is_an_error(fp32: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = PRESETS.engine_for("workstation", "fp32").model_copy(update={"compute_capabilities": ("SM90",)})
    with pytest.raises(ExportError, match="SM90"):
        tensorrt.build_engine(fp32, "tensorrt-rtx", options)


def test_options_progress_and_timings_reach_the_builder(fp32: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    cache = tmp_path / "timings"
    lines: list[str] = []
    changes = {"compute_capabilities": ("SM80",), "version_compatible": True, "workspace_mib": 512}
    options = PRESETS.engine_for("workstation", "fp32").model_copy(update=changes)
    metadata = tensorrt.build_engine(fp32, "tensorrt-rtx", options, lines.append, cache).metadata()
    assert metadata["timing_cache"] == "refused"
    assert "timings: not used" in metadata["complaints"][0]  # TensorRT-RTX takes none
    assert lines
    assert (metadata["version_compatible"], metadata["lean_runtime"]) == (True, "excluded")
    assert metadata["workspace_mib"] == 512
    refused = options.model_copy(update={"hardware_compatibility": "ampere-plus"})
    with pytest.raises(ExportError, match="AMPERE_PLUS"):
        tensorrt.build_engine(fp32, "tensorrt-rtx", refused)


@pytest.mark.parametrize("name", tensorrt.TARGETS)
def test_an_absent_package_names_the_extra_that_installs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, tensorrt.TARGETS[name].module, None)
    with pytest.raises(ExportError, match=rf"pip install 'clinifed\[{tensorrt.TARGETS[name].extra}\]'"):
        tensorrt.check_target(name)


def test_an_unknown_target_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ExportError, match="tensorrt, tensorrt-rtx"):
        tensorrt.check_target("openvino")


# A limit on the size of files, which cannot be lifted again, stands for a full disk.
TOO_SMALL = """
import resource, sys
from pathlib import Path
from clinifed.errors import ExportError
from clinifed.export.presets import load_presets
from clinifed.export.tensorrt import BuiltEngine, write_engine
options = load_presets().engine_for("workstation", "fp16")
engine = BuiltEngine(bytes(3 << 20), "tensorrt-rtx", "", (), options, None, None, ())
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    write_engine(engine, Path(sys.argv[1]))
except ExportError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
def test_a_disk_that_takes_no_more_is_an_error_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "fp16.engine"
    done = subprocess.run([sys.executable, "-c", TOO_SMALL, path], check=True, capture_output=True, text=True)
    assert f"{path}: the engine cannot be written (File too large); it takes 3 MiB" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_plan_says_what_the_device_builds(graph: onnx.ModelProto, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    path = tmp_path / "onnx" / "int8.onnx"
    write_onnx(graph, path)
    options = PRESETS.engine_for("jetson-orin", "int8")
    planned = tensorrt.Planned("int8", path, "clinifed_int8_tensorrt", options)
    plan = tensorrt.build_plan(tmp_path, [planned], 64, PRESETS.profiles["jetson-orin"].on_device)
    entry = plan["precisions"]["int8"]
    assert entry["onnx"] == "onnx/int8.onnx"
    assert entry["shape"] == [3, 64, 64]
    assert entry["profile"] == {"min": 1, "opt": 1, "max": 8}
    assert "Orin" in entry["on_device"]
    assert "--maxShapes=pixels:8x3x64x64" in entry["trtexec"]
    assert f"--memPoolSize=workspace:{options.workspace_mib}" in entry["trtexec"]
    tensorrt.write_build_plan(tmp_path, plan)
    assert json.loads((tmp_path / "build.json").read_text()) == plan
    for name in ("build_engine.py", "builder.py"):
        assert (tmp_path / name).read_bytes() == Path(tensorrt.__file__).with_name(name).read_bytes()
