"""The Triton repository: every configuration is Triton's own message, fits the graph, and serves the same bytes."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from clinifed.errors import ExportError
from clinifed.export.onnx import MAX_BATCH, write_onnx
from clinifed.export.presets import Profile, load_presets
from clinifed.export.triton import Interface, check_config, model_config, write_repository
from clinifed.models.specialties import SPECIALTIES

PRESETS = load_presets()
LABELS = {name: tuple(entry.labels) for name, entry in SPECIALTIES.items()}
PROFILE = PRESETS.profiles["datacenter"].engine.profile
INTERFACE = Interface(32, {"embedding": 8, "logits_x": 2, "zero_shot_x": 2}, {"x": ("no", "yes")})
Config = model_config_pb2.ModelConfig


def parsed(text: str) -> Any:
    return text_format.Parse(text, Config())


@pytest.fixture
def bundle(graph: onnx.ModelProto, tmp_path: Path) -> Path:
    """A bundle as it is before its repository is written: two graphs, and one engine that was built here."""
    folder = tmp_path / "bundle"
    (folder / "onnx").mkdir(parents=True)
    (folder / "engines" / "tensorrt").mkdir(parents=True)
    (folder / "engines" / "tensorrt-rtx").mkdir()
    for precision in ("fp32", "int8"):
        write_onnx(graph, folder / "onnx" / f"{precision}.onnx")
    (folder / "text").mkdir()
    (folder / "text" / "fp32.onnx").write_bytes(b"a graph of another interface")
    (folder / "engines" / "tensorrt" / "int8.engine").write_bytes(b"engine")
    (folder / "engines" / "tensorrt-rtx" / "fp32.engine").write_bytes(b"engine of another runtime")
    return folder


@pytest.mark.parametrize("profile", PRESETS.profiles)
@pytest.mark.parametrize("precision", PRESETS.precisions)
@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_every_preset_gives_a_configuration_that_fits_its_graph_and_profile(
    profile: str, precision: str, backend: Any, graph: onnx.ModelProto
) -> None:
    limits = PRESETS.engine_for(profile, precision).profile
    interface = Interface.of(graph, LABELS)
    config = parsed(model_config(precision, backend, interface, limits))
    assert config.max_batch_size == limits.max <= MAX_BATCH
    assert list(config.input[0].dims) == [3, 160, 160]
    widths = {v.name: v.type.tensor_type.shape.dim[1].dim_value for v in graph.graph.output}
    assert {output.name: output.dims[0] for output in config.output} == widths
    assert {w.batch_size for w in config.model_warmup} == {limits.min, limits.opt}
    kinds = model_config_pb2.ModelInstanceGroup
    wanted = {"onnxruntime": ("onnxruntime_onnx", kinds.KIND_AUTO), "tensorrt": ("tensorrt_plan", kinds.KIND_GPU)}
    platform, kind = wanted[backend]
    assert config.platform == platform
    # ONNX Runtime has no BF16 kernels on a CPU.
    assert config.instance_group[0].kind == (kinds.KIND_GPU if precision == "bf16" else kind)


def test_emergencies_and_urgent_requests_are_never_refused_and_routine_is_the_default() -> None:
    batching = parsed(model_config("fp32", "onnxruntime", INTERFACE, PROFILE)).dynamic_batching
    assert (batching.priority_levels, batching.default_priority_level) == (3, 3)
    policy = model_config_pb2.ModelQueuePolicy
    for level in (1, 2):
        assert batching.priority_queue_policy[level] == policy(timeout_action=policy.DELAY)
    routine = batching.priority_queue_policy[3]
    assert (routine.timeout_action, routine.default_timeout_microseconds) == (policy.REJECT, 2_000_000)


def test_the_emergency_specialty_is_told_to_ask_for_the_first_lane() -> None:
    interface = Interface(32, {"embedding": 8}, {"emergency": ("a", "b"), "radiology": ("c", "d")})
    parameters = parsed(model_config("fp32", "onnxruntime", interface, PROFILE)).parameters
    found = {name: value.string_value for name, value in parameters.items()}
    assert found == {"priority_emergency": "1", "priority_radiology": "3"}


def test_the_repository_serves_the_bundles_own_files_and_no_engine_of_another_runtime(bundle: Path) -> None:
    interface = Interface.of(onnx.load(bundle / "onnx" / "fp32.onnx"), LABELS)
    folders = write_repository(bundle, interface, PROFILE, on_device=["fp32", "int8"])
    assert [folder.relative_to(bundle).as_posix() for folder in folders] == [
        "triton/clinifed_fp32",
        "triton/clinifed_int8",
        "triton/clinifed_int8_tensorrt",
        "device/clinifed_fp32_tensorrt",  # that of int8 is there already
    ]
    for precision in ("fp32", "int8"):
        served = bundle / "triton" / f"clinifed_{precision}" / "1" / "model.onnx"
        assert served.samefile(bundle / "onnx" / f"{precision}.onnx")
    assert (folders[2] / "1" / "model.plan").samefile(bundle / "engines" / "tensorrt" / "int8.engine")
    assert sorted(path.name for path in folders[3].iterdir()) == [
        "config.pbtxt",
        "labels_emergency.txt",
        "labels_radiology.txt",
    ]
    for folder in folders:
        config = parsed((folder / "config.pbtxt").read_text())
        check_config((folder / "config.pbtxt").read_text(), interface)
        assert config.name == folder.name
        for output in config.output:
            specialty = re.sub("^(logits|zero_shot)_", "", output.name)
            if specialty != "embedding":
                assert tuple((folder / output.label_filename).read_text().splitlines()) == LABELS[specialty]


def test_a_file_system_without_links_gets_copies(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("links are not permitted here")

    monkeypatch.setattr(os, "link", refuse)
    interface = Interface.of(onnx.load(bundle / "onnx" / "fp32.onnx"), LABELS)
    folder, *_ = write_repository(bundle, interface, PROFILE)
    source, served = bundle / "onnx" / "fp32.onnx", folder / "1" / "model.onnx"
    assert not served.samefile(source)
    assert served.read_bytes() == source.read_bytes()


def test_the_same_bundle_gets_the_same_text() -> None:
    one, two = (model_config("int8", "tensorrt", INTERFACE, PROFILE) for _ in range(2))
    assert one == two


def test_a_graph_of_an_unknown_precision_is_refused_before_anything_is_written(bundle: Path) -> None:
    (bundle / "onnx" / "fp7.onnx").write_bytes(b"")
    with pytest.raises(ExportError, match="precision 'fp7' is not known; use fp32"):
        write_repository(bundle, INTERFACE, PROFILE)
    assert not (bundle / "triton").exists()


def test_nothing_is_overwritten_and_a_bundle_without_models_is_refused(bundle: Path, tmp_path: Path) -> None:
    write_repository(bundle, INTERFACE, PROFILE)
    before = sorted(bundle.rglob("*"))
    with pytest.raises(ExportError, match="triton exists"):
        write_repository(bundle, INTERFACE, PROFILE)
    assert sorted(bundle.rglob("*")) == before
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ExportError, match=r"no onnx/<precision>\.onnx"):
        write_repository(empty, INTERFACE, PROFILE)
    assert list(empty.iterdir()) == []


def _of(text: str, change: Callable[[Any], None]) -> str:
    config = parsed(text)
    change(config)
    return text_format.MessageToString(config)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: setattr(c, "max_batch_size", 65), "max_batch_size is 65; the graph takes 1 to 64"),
        (lambda c: setattr(c, "max_batch_size", 0), "max_batch_size is 0"),
        (lambda c: c.dynamic_batching.preferred_batch_size.append(33), "are \\[8, 32, 33, 1, 8\\]"),
        (lambda c: setattr(c.model_warmup[0], "batch_size", 40), "warm-up batches are"),
        (lambda c: setattr(c.dynamic_batching, "default_priority_level", 7), "must be in \\[1, 3\\]"),
        (lambda c: setattr(c.dynamic_batching, "default_priority_level", 0), "default_priority_level is 0"),
        (lambda c: c.dynamic_batching.priority_queue_policy[9].SetInParent(), "has levels \\[1, 2, 3, 9\\]"),
        (lambda c: setattr(c.input[0], "name", "image"), "input is .*image"),
        (lambda c: c.output[1].dims.append(4), "output is .*2, 4"),
        (lambda c: c.output.pop(), "output is"),
        (lambda c: (c.ClearField("platform"), c.ClearField("backend")), "names neither platform nor backend"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(change: Callable[[Any], None], problem: str) -> None:
    text = model_config("fp32", "onnxruntime", INTERFACE, PROFILE)
    check_config(text, INTERFACE)
    with pytest.raises(ExportError, match=problem):
        check_config(_of(text, change), INTERFACE)


def test_an_unknown_field_is_refused_with_its_place() -> None:
    text = model_config("fp32", "onnxruntime", INTERFACE, PROFILE)
    with pytest.raises(ExportError, match='no field named "most_batch_size"'):
        check_config(text.replace("max_batch_size", "most_batch_size"), INTERFACE)


def test_every_problem_is_named_at_once() -> None:
    text = model_config("fp32", "onnxruntime", INTERFACE, PROFILE).replace("max_batch_size: 32", "max_batch_size: 65")
    with pytest.raises(ExportError) as caught:
        check_config(text.replace("default_priority_level: 3", "default_priority_level: 4"), INTERFACE)
    assert len(caught.value.problems) == 2


def value(name: str, *dims: str | int) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims)


@pytest.mark.parametrize(
    ("outputs", "labels", "problem"),
    [
        ([value("logits_x", "batch", 2)], {"x": ("a",)}, "'logits_x' is 2 wide; labels are \\('a',\\)"),
        ([value("logits_x", "batch", 2)], {}, "labels are None"),
        ([value("logits_x", "batch", "free")], {"x": ("a", "b")}, "needs \\(batch, a fixed width\\)"),
        ([value("features", "batch", 2)], {}, "is none of embedding, logits_"),
        ([value("logits_x", "batch", 2)], {"x": ("a", "b\nc")}, "labels.x: 'b\\\\nc' is not one line"),
    ],
)
def test_a_graph_that_is_no_exported_one_has_no_interface(outputs: list, labels: dict, problem: str) -> None:
    graph = onnx.GraphProto(input=[value("pixels", "batch", 3, 8, 8)], output=outputs)
    with pytest.raises(ExportError, match=problem):
        Interface.of(onnx.ModelProto(graph=graph), labels)


@pytest.mark.parametrize("dims", [("batch", 3, 8, 9), (2, 3, 8, 8), ("batch", 1, 8, 8), ("batch", 3, "side", "side")])
def test_pixels_of_another_shape_are_refused(dims: tuple) -> None:
    graph = onnx.GraphProto(input=[value("pixels", *dims)], output=[value("embedding", "batch", 4)])
    with pytest.raises(ExportError, match="needs one, 'pixels' of"):
        Interface.of(onnx.ModelProto(graph=graph), {})


def test_a_profile_for_single_images_prefers_no_others_twice() -> None:
    config = parsed(model_config("fp32", "tensorrt", INTERFACE, Profile(min=1, opt=1, max=1)))
    assert list(config.dynamic_batching.preferred_batch_size) == [1]
    assert [warmup.batch_size for warmup in config.model_warmup] == [1]
