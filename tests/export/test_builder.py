"""The one path from typed ONNX to an engine, taken with TensorRT-RTX, which builds without a GPU. None is executed."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from clinifed.export import builder
from clinifed.export.builder import BuildError, Options, Toolkit, build, make_builder, trtexec_command
from clinifed.export.onnx import write_onnx

PROFILE = (1, 8, 32)
CAPABILITIES = ("SM80", "SM89")


@pytest.fixture(scope="session")
def kit() -> Toolkit:
    pytest.importorskip("tensorrt_rtx")
    return builder.load("tensorrt_rtx", "")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph that is built in no time: one convolution, and a sum."""
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [4, 3, 4, 4], [0.1] * 192)
    nodes = [
        helper.make_node("Conv", ["pixels", "weight"], ["features"], name="patches", strides=[4, 4]),
        helper.make_node("GlobalAveragePool", ["features"], ["embedding"], name="pool"),
    ]
    return save(tmp_path_factory.mktemp("small") / "small.onnx", nodes, [weight], "pixels", 4)


def save(path: Path, nodes: list[Any], weights: list[Any], name: str, channels: int) -> Path:
    pixels = helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, 8, 8])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", channels, "h", "w"])
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("clinic", 1)]
    graph = helper.make_graph(nodes, "small", [pixels], [embedding], weights)
    write_onnx(helper.make_model(graph, opset_imports=domains, ir_version=9), path)
    return path


def test_an_engine_holds_the_capabilities_it_was_asked_for(kit: Toolkit, small: Path) -> None:
    built = build(kit, small, Options(PROFILE, CAPABILITIES))
    assert built.data[:4] == b"vtrt"  # the format's own mark
    assert built.compute_capabilities == CAPABILITIES
    assert built.complaints == ()


def test_the_limit_on_workspace_is_the_builders_own(kit: Toolkit, graph: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "fp32.onnx"
    write_onnx(graph, path)
    config = make_builder(kit).create_builder_config()
    builder._set_options(kit, config, Options(PROFILE, CAPABILITIES, workspace_mib=64))
    assert config.get_memory_pool_limit(kit.trt.MemoryPoolType.WORKSPACE) == 64 << 20
    assert build(kit, path, Options(PROFILE, CAPABILITIES, workspace_mib=64)).data


def test_fp32_is_not_computed_as_tf32(kit: Toolkit) -> None:
    config = make_builder(kit).create_builder_config()
    assert config.get_flag(kit.trt.BuilderFlag.TF32)  # what it is without us
    builder._set_options(kit, config, Options(PROFILE, CAPABILITIES))
    assert not config.get_flag(kit.trt.BuilderFlag.TF32)


def test_a_version_compatible_engine_is_built_without_the_runtime_that_the_package_lacks(
    kit: Toolkit, small: Path
) -> None:
    built = build(kit, small, Options(PROFILE, CAPABILITIES, version_compatible=True))
    assert built.lean_runtime == "excluded"
    assert built.complaints == ()


def test_a_refused_option_is_an_error_although_the_builder_only_logs_it(kit: Toolkit, small: Path) -> None:
    with pytest.raises(BuildError, match=r"AMPERE_PLUS.*holds .*NONE.*unsupported in TensorRT-RTX"):
        build(kit, small, Options(PROFILE, CAPABILITIES, hardware_compatibility="ampere-plus"))


@pytest.mark.skipif(sys.platform != "linux", reason="on Windows this is no refused platform")
def test_any_refused_property_is_found_by_reading_it_back(kit: Toolkit) -> None:
    config = make_builder(kit).create_builder_config()
    wanted = kit.trt.RuntimePlatform.WINDOWS_AMD64
    config.runtime_platform = wanted  # no exception
    with pytest.raises(BuildError, match=r"platform was set to .*WINDOWS_AMD64.*SAME_AS_BUILD.*does not support"):
        kit.require("platform", wanted, config.runtime_platform)


@pytest.mark.parametrize("names", [("SM90",), ("SM80", "SM87"), ("CURRENT",), ()])
def test_a_capability_that_the_package_lacks_is_refused_with_those_it_has(
    kit: Toolkit, small: Path, names: tuple[str, ...]
) -> None:
    with pytest.raises(BuildError, match=r"builds for SM75, SM80, SM86, SM89") as refused:
        build(kit, small, Options(PROFILE, names))
    assert not names or names[-1] in str(refused.value)


@pytest.mark.parametrize("profile", [(8, 1, 32), (1, 64, 32)])
def test_a_profile_that_is_none_is_refused(kit: Toolkit, small: Path, profile: tuple[int, int, int]) -> None:
    with pytest.raises(BuildError, match="/".join(map(str, profile))):
        build(kit, small, Options(profile, CAPABILITIES))


def test_an_operator_that_no_builder_knows_is_named_with_its_node(kit: Toolkit, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["pixels"], ["positive"], name="start"),
        helper.make_node("Admit", ["positive"], ["embedding"], name="ward_7", domain="clinic"),
    ]
    path = save(tmp_path / "unknown.onnx", nodes, [], "pixels", 3)
    with pytest.raises(BuildError, match=r"unknown\.onnx cannot be parsed: node 'ward_7' \(Admit\): .*[Pp]lugin"):
        build(kit, path, Options(PROFILE, CAPABILITIES))


def test_an_operator_whose_types_do_not_fit_is_named_with_its_node(kit: Toolkit, tmp_path: Path) -> None:
    half = helper.make_tensor("half", TensorProto.FLOAT16, [1], [1.0])
    nodes = [helper.make_node("Add", ["pixels", "half"], ["embedding"], name="mixed")]
    path = save(tmp_path / "mixed.onnx", nodes, [half], "pixels", 3)
    with pytest.raises(BuildError, match=r"node 'mixed' \(Add\)"):
        build(kit, path, Options(PROFILE, CAPABILITIES))


def test_a_graph_with_another_input_is_refused(kit: Toolkit, tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["image"], ["embedding"])]
    path = save(tmp_path / "image.onnx", nodes, [], "image", 3)
    with pytest.raises(BuildError, match="inputs are image; it needs one, named 'pixels'"):
        build(kit, path, Options(PROFILE, CAPABILITIES))


def test_a_file_that_is_not_there_is_an_error_with_its_name(kit: Toolkit, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"absent\.onnx cannot be parsed"):
        build(kit, tmp_path / "absent.onnx", Options(PROFILE, CAPABILITIES))


def test_a_builder_that_gives_up_is_an_error_with_its_words(
    kit: Toolkit, graph: onnx.ModelProto, tmp_path: Path
) -> None:
    path = tmp_path / "fp32.onnx"
    write_onnx(graph, path)
    with pytest.raises(BuildError, match=r"no engine came of fp32\.onnx: .*FP32 GEMM is not supported"):
        build(kit, path, Options(PROFILE, ("SM75",)))  # Turing


def test_progress_names_the_phases(kit: Toolkit, small: Path) -> None:
    lines: list[str] = []
    build(kit, small, Options(PROFILE, CAPABILITIES), lines.append)
    assert "Building engine: Building engine from subgraph" in lines


def test_progress_within_a_long_phase_counts_its_steps(
    kit: Toolkit, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "EVERY_S", 0.0)
    lines: list[str] = []
    build(kit, small, Options(PROFILE, CAPABILITIES), lines.append)
    assert any(line.endswith("2 of 6") for line in lines)


def test_ctrl_c_stops_the_builder_and_is_raised_when_it_has_stopped(kit: Toolkit, small: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(kit, small, Options(PROFILE, CAPABILITIES), lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert build(kit, small, Options(PROFILE, CAPABILITIES)).data  # and the next one is built as ever


def test_what_progress_raises_stops_the_builder_and_is_raised(kit: Toolkit, small: Path) -> None:
    def full(line: str) -> None:
        raise BrokenPipeError(line)

    with pytest.raises(BrokenPipeError, match="Building engine"):
        build(kit, small, Options(PROFILE, CAPABILITIES), full)
    assert any("BuildCanceled" in text for text in kit.errors())


def test_timings_that_the_package_does_not_use_are_a_complaint_and_not_written(
    kit: Toolkit, small: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "timings"
    built = build(kit, small, Options(PROFILE, CAPABILITIES, timing_cache=cache))
    assert built.data
    assert built.timing_cache == "refused"
    assert built.complaints[0].startswith("timing cache timings: not used: ")
    assert "no-ops in TensorRT-RTX" in built.complaints[0]
    assert not cache.exists()


def test_timings_that_cannot_be_read_are_an_error_before_the_build(kit: Toolkit, small: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot be read"):
        build(kit, small, Options(PROFILE, CAPABILITIES, timing_cache=tmp_path))


# TensorRT-RTX still makes caches and writes them, it only puts nothing into them.
@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_timings_are_kept_in_a_file_and_a_file_that_cannot_be_written_is_told(kit: Toolkit, tmp_path: Path) -> None:
    config = make_builder(kit).create_builder_config()
    assert config.set_timing_cache(config.create_timing_cache(b""), False)
    assert builder._keep_timing_cache(config, tmp_path / "timings") == []
    assert (tmp_path / "timings").read_bytes() == bytes(config.get_timing_cache().serialize())
    assert builder._keep_timing_cache(config, tmp_path / "absent" / "timings") == [
        "timing cache timings: not written (No such file or directory)"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["timings"]


def test_trtexec_gets_every_option(tmp_path: Path) -> None:
    options = Options((1, 1, 8), (), "ampere-plus", True, 2048, Path("of this GPU.cache"))
    assert trtexec_command("onnx/int8.onnx", (3, 224, 224), options, "int8.plan") == (
        "trtexec --onnx=onnx/int8.onnx --saveEngine=int8.plan --stronglyTyped --noTF32 --skipInference"
        " --minShapes=pixels:1x3x224x224 --optShapes=pixels:1x3x224x224 --maxShapes=pixels:8x3x224x224"
        " --hardwareCompatibilityLevel=ampere+ --versionCompatible --memPoolSize=workspace:2048"
        " '--timingCacheFile=of this GPU.cache'"
    )
