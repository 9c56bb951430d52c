"""A real Triton server takes the repository that an export writes, and serves emergencies first.

The server comes with nvidia-pytriton, in a virtual environment of its own (``make triton``), because its Python backend
needs NumPy 1: ``.venv-triton``, or what CLINIFED_TRITON_VENV names. It has no other backend, so that the graph's place
is taken by ``triton/model.py``; the configuration is the exported one but for the backend's name.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from clinifed.export.onnx import write_onnx
from clinifed.export.presets import load_presets
from clinifed.export.triton import PRIORITIES, Interface, write_repository
from clinifed.models.specialties import SPECIALTIES

pytestmark = pytest.mark.triton

ROOT = Path(__file__).resolve().parents[2]
VENV = Path(os.environ.get("CLINIFED_TRITON_VENV", ROOT / ".venv-triton"))
PROFILE = load_presets().profiles["datacenter"].engine.profile
MODEL = "clinifed_int8"  # served; all others of the repository are there to be refused
PATIENCE_S = 60


def altered(source: Path, target: Path, change: Callable[[Any], None]) -> Path:
    """A copy of a model's folder under another name, with its configuration changed."""
    shutil.copytree(source, target)
    config = text_format.Parse((target / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    config.name = target.name
    change(config)
    (target / "config.pbtxt").write_text(text_format.MessageToString(config))
    return target


def served_by_python(config: Any) -> None:
    config.platform, config.backend, config.default_model_filename = "", "python", "model.py"
    config.instance_group[0].kind = model_config_pb2.ModelInstanceGroup.KIND_CPU


def priority_out_of_range(config: Any) -> None:
    served_by_python(config)
    config.dynamic_batching.default_priority_level = 7


@pytest.fixture(scope="module")
def interface(graph: onnx.ModelProto) -> Interface:
    return Interface.of(graph, {name: tuple(entry.labels) for name, entry in SPECIALTIES.items()})


@pytest.fixture(scope="module")
def repository(graph: onnx.ModelProto, interface: Interface, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an export writes, and copies of it: served by Python, and broken in two ways."""
    bundle = tmp_path_factory.mktemp("bundle")
    (bundle / "onnx").mkdir()
    for precision in ("fp32", "int8"):
        write_onnx(graph, bundle / "onnx" / f"{precision}.onnx")
    write_repository(bundle, interface, PROFILE, on_device=["fp16"])
    folder = bundle / "triton"
    exported = (folder / MODEL).rename(bundle / MODEL)
    python = altered(exported, folder / MODEL, served_by_python)
    shutil.copyfile(Path(__file__).with_name("triton") / "model.py", python / "1" / "model.py")
    altered(python, folder / "broken_priority", priority_out_of_range)
    broken = altered(python, folder / "broken_field", served_by_python) / "config.pbtxt"
    broken.write_text(broken.read_text().replace("max_batch_size", "most_batch_size"))
    plan = shutil.copytree(bundle / "device" / "clinifed_fp16_tensorrt", folder / "clinifed_fp16_tensorrt")
    (plan / "1").mkdir()
    (plan / "1" / "model.plan").write_bytes(b"built on the device")
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {PATIENCE_S} s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The running server: a client, and its log."""
    packages = next(VENV.glob("lib/python3.*/site-packages"), None)
    assert packages is not None, f"{VENV} is no virtual environment; run `make triton`, or set CLINIFED_TRITON_VENV"
    parts = packages / "pytriton" / "tritonserver"
    # The backend looks for its stub beside itself; the wheel has one for each Python.
    backends = tmp_path_factory.mktemp("server") / "backends"
    shutil.copytree(parts / "backends", backends)
    stub = parts / "python_backend_stubs" / packages.parent.name.removeprefix("python") / "triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    python = VENV / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"
    libraries = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    port = free_port()
    command = [
        parts / "bin" / "tritonserver",
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        f"--backend-config=python,shm-region-prefix-name=clinifed-{port}",
        "--exit-on-error=false",
        "--allow-http=false",
        "--allow-metrics=false",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={port}",
    ]
    log = backends.parent / "log.txt"
    environment = {
        "PATH": f"{VENV / 'bin'}:{os.environ['PATH']}",  # the stub's Python is the first one here
        "LD_LIBRARY_PATH": f"{packages / 'nvidia_pytriton.libs'}:{libraries}",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    client = triton.InferenceServerClient(f"127.0.0.1:{port}")

    def started() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return bool(client.is_server_live())
        except InferenceServerException:
            return False

    try:
        wait_for(started, "start of the server")
        yield SimpleNamespace(client=client, log=log.read_text, model=repository / MODEL)
    finally:
        client.close()
        process.terminate()
        process.wait(PATIENCE_S)


def images(count: int, size_px: int, mark: float = 1.0) -> np.ndarray:
    pixels = np.random.default_rng(count).standard_normal((count, 3, size_px, size_px)).astype(np.float32)
    pixels[:, 0, 0, 0] = mark
    return pixels


def request(pixels: np.ndarray) -> list[Any]:
    value = triton.InferInput("pixels", list(pixels.shape), "FP32")
    value.set_data_from_numpy(pixels)
    return [value]


def reasons(server: SimpleNamespace) -> dict[str, tuple[str, str]]:
    """Model → state and reason."""
    index = server.client.get_model_repository_index()
    return {model.name: (model.state, model.reason) for model in index.models}


def test_the_server_takes_the_configuration_as_it_was_written(server: SimpleNamespace, interface: Interface) -> None:
    wait_for(lambda: server.client.is_model_ready(MODEL), "the model")
    config = server.client.get_model_config(MODEL).config
    written = text_format.Parse((server.model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    for field in ("max_batch_size", "input", "output", "dynamic_batching", "model_warmup", "version_policy"):
        assert getattr(config, field) == getattr(written, field), field
    metadata = server.client.get_model_metadata(MODEL)
    assert {o.name: list(o.shape) for o in metadata.outputs} == {n: [-1, w] for n, w in interface.outputs.items()}


def test_the_model_is_warm_before_it_answers(server: SimpleNamespace) -> None:
    wait_for(lambda: server.client.is_model_ready(MODEL), "the model")
    first = (server.model / "1" / "batches.txt").read_text().splitlines()[:2]
    assert [line.split() for line in first] == [["0"], ["0"] * PROFILE.opt]


@pytest.mark.parametrize("priority", [0, *(p.level for p in PRIORITIES.values())])
@pytest.mark.parametrize("count", [1, PROFILE.max])
def test_every_priority_is_answered_with_the_right_tensors(
    priority: int, count: int, server: SimpleNamespace, interface: Interface
) -> None:
    pixels = images(count, interface.size_px)
    answer = server.client.infer(MODEL, request(pixels), priority=priority)
    for place, (name, width) in enumerate(interface.outputs.items(), start=1):
        np.testing.assert_array_equal(answer.as_numpy(name), place * pixels.reshape(count, -1)[:, :width])


def test_the_best_class_comes_with_its_label(server: SimpleNamespace, interface: Interface) -> None:
    pixels = images(2, interface.size_px)
    for specialty, labels in interface.labels.items():
        name = f"logits_{specialty}"
        wanted = [triton.InferRequestedOutput(name, class_count=1)]
        answer = server.client.infer(MODEL, request(pixels), outputs=wanted).as_numpy(name)
        best = pixels.reshape(2, -1)[:, : len(labels)].argmax(axis=1)
        assert [row[0].decode().split(":")[2] for row in answer] == [labels[i] for i in best]


def test_more_images_than_the_profile_holds_are_refused(server: SimpleNamespace, interface: Interface) -> None:
    with pytest.raises(InferenceServerException, match=f"must be <= {PROFILE.max}"):
        server.client.infer(MODEL, request(images(PROFILE.max + 1, interface.size_px)))


def test_emergencies_go_first_and_routine_that_waited_too_long_is_refused(
    server: SimpleNamespace, interface: Interface
) -> None:
    """Everything is sent while a batch is being computed; routine first, emergency last."""
    hold, batches = server.model / "1" / "hold", server.model / "1" / "batches.txt"
    answers: SimpleQueue[tuple[str, Any, Any]] = SimpleQueue()

    def send(name: str, mark: float, **options: int) -> None:
        pixels = images(1, interface.size_px, mark)
        server.client.async_infer(
            MODEL, request(pixels), lambda result, error: answers.put((name, result, error)), **options
        )

    hold.touch()
    try:
        send("running", 100)
        wait_for(lambda: batches.read_text().endswith("100\n"), "the batch that is being computed")
        before = len(batches.read_text().splitlines())
        send("routine", 103)
        send("routine that asks for more time", 104, priority=3, timeout=30_000_000)
        send("urgent", 102, priority=PRIORITIES["urgent"].level)
        send("emergency", 101, priority=PRIORITIES["emergency"].level)
        time.sleep(1.5 * PRIORITIES["routine"].timeout_us / 1e6)
    finally:
        hold.unlink()
    ended = {name: (result, error) for name, result, error in (answers.get(timeout=PATIENCE_S) for _ in range(5))}
    for name in ("running", "urgent", "emergency"):
        assert ended[name][1] is None, (name, ended[name][1])
    assert ended["emergency"][0].as_numpy("embedding")[0, 0] == 101
    for name in ("routine", "routine that asks for more time"):
        assert "Request timeout expired" in str(ended[name][1])
    served = " ".join(batches.read_text().splitlines()[before:]).split()
    assert served == ["101", "102"]


def test_the_exported_models_want_nothing_but_their_backend(server: SimpleNamespace) -> None:
    found = reasons(server)
    for name, backend in (("clinifed_fp32", "onnxruntime"), ("clinifed_fp16_tensorrt", "tensorrt")):
        state, reason = found[name]
        assert state == "UNAVAILABLE"
        assert f"unable to find backend library for backend '{backend}'" in reason


def test_a_broken_configuration_is_refused_by_the_server(server: SimpleNamespace) -> None:
    text = server.log()
    assert "failed to read text proto" in text
    assert "must be in range [1, 3]" in text
    for name in ("broken_field", "broken_priority"):
        assert reasons(server)[name] == ("", "")  # it did not come as far as being loaded
