"""The command that a bundle brings to a device: run as there, in a process of its own, from a bundle's folder.

TensorRT-RTX stands for the device's TensorRT, under its name: the same calls, and it builds without a GPU.
"""

import ast
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import onnx
import pytest

from clinifed.bundle_files import FileEntry
from clinifed.bundle_local import check_local
from clinifed.export import build_engine, builder
from clinifed.export.onnx import write_onnx
from clinifed.export.presets import Engine, load_presets
from clinifed.export.tensorrt import Planned, build_plan, write_build_plan
from clinifed.files import write_json
from clinifed.signing import make_signing_key, public_key

MODEL = "clinifed_int8_tensorrt"
OPTIONS = load_presets().engine_for("jetson-orin", "int8").model_copy(update={"compute_capabilities": ("SM80",)})


def describe(folder: Path) -> None:
    """Write the manifest over everything that is there."""
    (folder / "manifest.json").unlink(missing_ok=True)
    files = {
        path.relative_to(folder).as_posix(): {
            "sha256": sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_json(folder / "manifest.json", {"schema_version": 1, "files": files})


def plan(folder: Path, options: Engine = OPTIONS, model: str = MODEL) -> None:
    engines = [Planned("int8", folder / "onnx" / "int8.onnx", model, options)]
    write_build_plan(folder, build_plan(folder, engines, 64, "Jetson Orin"))
    describe(folder)


@pytest.fixture
def bundle(graph: onnx.ModelProto, tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "onnx").mkdir(parents=True)
    write_onnx(graph, folder / "onnx" / "int8.onnx")
    serving = folder / "device" / MODEL
    serving.mkdir(parents=True)
    (serving / "config.pbtxt").write_text(f'name: "{MODEL}"\n')
    (serving / "labels_radiology.txt").write_text("normal\n")
    plan(folder)
    return folder


@pytest.fixture
def key(tmp_path: Path) -> Path:
    make_signing_key(tmp_path / "device.key")
    return tmp_path / "device.key"


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which ``import tensorrt`` gives TensorRT-RTX."""
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path_factory.mktemp("device")
    (folder / "tensorrt.py").write_text("import sys\nimport tensorrt_rtx\nsys.modules['tensorrt'] = tensorrt_rtx\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


def run(bundle: Path, *arguments: object, env: dict[str, str] | None = None, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "build_engine.py", *map(str, arguments)]
    env = {name: value for name, value in (env or os.environ).items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(command, cwd=bundle, env=env, capture_output=True, text=True, check=False, **more)


def refused(bundle: Path, *arguments: object, env: dict[str, str] | None = None, **more) -> str:
    """What the command says when it refuses; it leaves no engine and no other file behind."""
    before = sorted(bundle.rglob("*"))
    done = run(bundle, *arguments, env=env, **more)
    assert done.returncode == 8, done.stderr
    assert sorted(bundle.rglob("*")) == before
    assert "Traceback" not in done.stderr
    return done.stderr


def entries(bundle: Path) -> dict[str, FileEntry]:
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    return {name: FileEntry(**entry) for name, entry in files.items()}


def test_a_device_builds_an_engine_that_a_reader_of_the_bundle_accepts(
    bundle: Path, key: Path, device: dict[str, str]
) -> None:
    before = set(bundle.rglob("*"))
    done = run(bundle, "--sign-key", key, env=device)
    assert done.returncode == 0, done.stderr
    assert "int8: Building engine" in done.stderr
    local = bundle / "local"
    made = {path.relative_to(local).as_posix() for path in set(bundle.rglob("*")) - before - {local} if path.is_file()}
    names = ("1/model.plan", "config.pbtxt", "labels_radiology.txt", "engine.json", "engine.sig")
    assert made == {f"{MODEL}/{name}" for name in names}  # and no cache of Python's

    digest = sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    public = public_key(build_engine.read_key(key))
    engines, problems, unvouched = check_local(bundle, digest, entries(bundle), [public])
    assert (problems, unvouched) == ([], [])
    assert engines[MODEL].key == public
    content = engines[MODEL].content
    assert content["onnx"]["name"] == "onnx/int8.onnx"
    assert content["package"].startswith("tensorrt_rtx ")
    assert content["profile"] == {"min": 1, "opt": 1, "max": 8}
    assert content["workspace_mib"] == OPTIONS.workspace_mib
    assert content["complaints"] == []
    assert content["built"].endswith("Z")
    assert (local / MODEL / "1" / "model.plan").read_bytes()[:4] == b"vtrt"

    plan_file = local / MODEL / "1" / "model.plan"
    plan_file.write_bytes(plan_file.read_bytes()[:-1] + b"?")
    assert check_local(bundle, digest, entries(bundle), [public])[1]  # a changed engine is found
    assert f"{MODEL} exists and is never overwritten" in refused(bundle, env=device)


def test_an_engine_that_trtexec_built_is_packed_the_same_way(bundle: Path, key: Path, tmp_path: Path) -> None:
    engine = tmp_path / "int8.plan"
    engine.write_bytes(b"of trtexec")
    done = run(bundle, "--precision", "int8", "--engine", engine, "--sign-key", key, "--out", tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "elsewhere" / MODEL
    assert (folder / "1" / "model.plan").read_bytes() == b"of trtexec"
    assert json.loads((folder / "engine.json").read_text())["package"] == "trtexec"
    assert len((folder / "engine.sig").read_bytes()) == 64
    assert folder.stat().st_mode & 0o777 == 0o755


def test_the_command_line_for_trtexec_is_printed_and_nothing_is_built(bundle: Path) -> None:
    done = run(bundle, "--trtexec", "--timing-cache", "timings")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("trtexec --onnx=onnx/int8.onnx --saveEngine=clinifed_int8_tensorrt.plan")
    assert "--memPoolSize=workspace:2048 --timingCacheFile=timings\n" in done.stdout
    assert not (bundle / "local").exists()


@pytest.mark.parametrize("name", ["onnx/int8.onnx", "build.json", f"device/{MODEL}/config.pbtxt"])
def test_a_file_that_the_manifest_does_not_vouch_for_is_refused_before_it_is_used(
    name: str, bundle: Path, device: dict[str, str]
) -> None:
    path = bundle / name
    path.write_bytes(path.read_bytes() + b" ")
    message = refused(bundle, env=device)
    assert f"{name}: its SHA-256 is" in message
    assert "cannot be parsed" not in message
    path.unlink()
    assert "No such file" in refused(bundle, env=device)


def test_a_plan_cannot_reach_out_of_the_bundle(bundle: Path, device: dict[str, str]) -> None:
    outside = bundle.parent / "outside.onnx"
    shutil.copy(bundle / "onnx" / "int8.onnx", outside)
    content = json.loads((bundle / "build.json").read_text())
    for name, entry in (("../outside.onnx", {"onnx": "../outside.onnx"}), ("model", {"model": "../../elsewhere"})):
        changed = json.loads(json.dumps(content))
        changed["precisions"]["int8"] |= entry
        write_json(bundle / "build.json", changed)
        describe(bundle)
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["files"]["../outside.onnx"] = {"sha256": sha256(outside.read_bytes()).hexdigest(), "bytes": 1}
        write_json(bundle / "manifest.json", manifest)
        assert name in refused(bundle, env=device)
    assert not (bundle.parent / "elsewhere").exists()


def test_a_link_is_no_file_of_the_bundle(bundle: Path, device: dict[str, str]) -> None:
    path = bundle / "onnx" / "int8.onnx"
    path.rename(bundle.parent / "int8.onnx")
    path.symlink_to(bundle.parent / "int8.onnx")
    assert "onnx/int8.onnx: manifest.json lists no such file" in refused(bundle, env=device)


@pytest.mark.parametrize("content", ["", "[]", '{"files": []}', '{"files": {"build.json": {}}}', "{"])
def test_a_manifest_that_is_none_is_an_error_in_words(content: str, bundle: Path) -> None:
    (bundle / "manifest.json").write_text(content)
    assert "error: " in refused(bundle)


def test_an_unknown_precision_is_refused_with_those_there_are(bundle: Path) -> None:
    assert "precision fp8: this bundle has int8" in refused(bundle, "--precision", "int8,fp8")


def test_an_absent_package_is_named_with_what_installs_it(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "tensorrt.py").write_text("raise ModuleNotFoundError(\"No module named 'tensorrt'\")\n")
    message = refused(bundle, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert "the package tensorrt is not installed" in message
    assert "apt install python3-libnvinfer" in message


def test_an_option_that_the_device_refuses_ends_in_no_engine(bundle: Path, device: dict[str, str]) -> None:
    plan(bundle, OPTIONS.model_copy(update={"hardware_compatibility": "ampere-plus"}))
    assert "hardware_compatibility was set to HardwareCompatibilityLevel.AMPERE_PLUS" in refused(bundle, env=device)


def test_a_key_that_others_can_read_is_refused_before_anything_is_built(
    bundle: Path, key: Path, device: dict[str, str]
) -> None:
    key.chmod(0o644)
    assert "chmod 600" in refused(bundle, "--sign-key", key, env=device)
    key.chmod(0o600)
    key.write_text("no key\n")
    assert "64 hexadecimal digits" in refused(bundle, "--sign-key", key, env=device)
    assert "no signing key" in refused(bundle, "--sign-key", key.with_name("absent"), env=device)


def test_signing_without_its_package_is_refused_before_anything_is_built(
    bundle: Path, key: Path, device: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "cryptography.py").write_text("raise ImportError('not on this device')\n")
    env = {**device, "PYTHONPATH": f"{tmp_path}{os.pathsep}{device['PYTHONPATH']}"}
    message = refused(bundle, "--sign-key", key, env=env)
    assert "--sign-key needs the Python package cryptography here (not on this device)" in message


def test_a_disk_that_takes_no_more_leaves_nothing_behind(bundle: Path, tmp_path: Path) -> None:
    engine = tmp_path / "int8.plan"
    engine.write_bytes(bytes(3 << 20))

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    message = refused(bundle, "--engine", engine, preexec_fn=full)
    assert "the engine cannot be written (File too large); it takes 3 MiB" in message


def test_ctrl_c_ends_the_build_and_leaves_nothing_behind(bundle: Path, device: dict[str, str]) -> None:
    before = sorted(bundle.rglob("*"))
    command = [sys.executable, "build_engine.py"]
    with subprocess.Popen(command, cwd=bundle, env=device, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "Building engine" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest.endswith("interrupted; the engine that was being built was not written\n")
    assert sorted(bundle.rglob("*")) == before


DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "Orin", length); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 8 : 7; return 0; }
"""


def test_the_gpu_is_named_by_its_driver(tmp_path: Path) -> None:
    """The driver here is a stand-in with the documented signatures."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler, which makes the driver's stand-in")
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"], check=True)
    code = "from clinifed.export.build_engine import gpu; print(gpu())"
    env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True)
    assert ast.literal_eval(done.stdout) == {"name": "Orin", "compute_capability": "SM87"}


@pytest.mark.parametrize("module", [build_engine, builder])
def test_what_runs_on_a_device_needs_python_3_10_its_standard_library_and_tensorrt(module) -> None:
    tree = ast.parse(Path(module.__file__).read_text(), feature_version=(3, 10))
    needed = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            needed |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            needed.add((node.module or "").partition(".")[0])
    others = needed - sys.stdlib_module_names
    assert others <= {"tensorrt", "builder", "clinifed", "cryptography"}
