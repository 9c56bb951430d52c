"""What the engine code calls exists, in the real bindings of every TensorRT that it is for.

The bindings of the datacenter's TensorRT install without a GPU, their libraries do not: stubs with the right names take
their place, so that the modules load and can be asked. Nothing of them can be called.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clinifed.export import builder, execute

ROOT = Path(__file__).parents[2]
BINDINGS = ROOT / ".venv" / "bindings"
HERE = Path(__file__).with_name("bindings")
SOURCES = (Path(builder.__file__), Path(execute.__file__))
PACKAGES = ("10.16", "11.4", "tensorrt_rtx")


def environment(version: str, stubs: Path | None) -> dict[str, str]:
    """In which ``tensorrt_bindings`` of ``version`` is found, with or without libraries."""
    folder = BINDINGS / version
    if not (folder / "tensorrt_bindings").is_dir():
        pytest.skip(
            f"the bindings of TensorRT {version} are not in {folder.relative_to(ROOT)}; `make install` puts them"
        )
    found = {**os.environ, "PYTHONPATH": str(folder)}
    return found if stubs is None else {**found, "LD_LIBRARY_PATH": str(stubs)}


@pytest.fixture(scope="session")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Libraries of TensorRT 10 and 11 that hold nothing."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler, which makes the stub libraries that the bindings are loaded with")
    folder = tmp_path_factory.mktemp("stubs")
    for major in (10, 11):
        for library in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
            name = f"lib{library}.so.{major}"
            subprocess.run(
                [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", folder / name, HERE / "stub.c"], check=True
            )
    return folder


def look(package: str, stubs: Path, *sources: Path) -> dict[str, list[str]]:
    """Check ``sources`` in a process of its own, since two versions do not live in one."""
    module, env = package, dict(os.environ)
    if package == "tensorrt_rtx":
        pytest.importorskip("tensorrt_rtx")
    else:
        module, env = "tensorrt_bindings", environment(package, stubs)
    done = subprocess.run(
        [sys.executable, HERE / "calls.py", module, *sources], env=env, check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    assert package == "tensorrt_rtx" or found["version"].startswith(package + ".")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_and_argument_of_the_engine_code_is_in_the_bindings(package: str, stubs: Path) -> None:
    assert look(package, stubs, *SOURCES)["problems"] == []


def test_no_call_is_behind_a_question_that_every_package_answers_with_no(stubs: Path) -> None:
    nowhere = set.intersection(*(set(look(package, stubs, *SOURCES)["skipped"]) for package in PACKAGES))
    assert nowhere == set()


# Each is right but for what the second column says; the third is a part of the complaint.
WRONG = {
    "a method that is not there": ("config.set_flags(1)", "IBuilderConfig has no set_flags"),
    "a member that is not there": ("trt.BuilderFlag.FP61", "BuilderFlag has no FP61"),
    "a class that is not there": ("trt.OnxxParser(network, logger)", "has no OnxxParser"),
    "an argument too few": ("config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)", "does not fit"),
    "an argument too many": ("builder.create_builder_config(1)", "does not fit"),
    "a name that no argument has": ("builder.create_network(flag=1)", "does not fit"),
    "an object of another class": ("builder.build_serialized_network(config, network)", "does not fit"),
    "a property that is read-only": ("network.num_inputs = 1", "cannot be assigned"),
    "a property that is not there": ("config.progress_monitors = None", "has no progress_monitors"),
    "what a result does not have": ("network.get_input(0).shapes", "ITensor has no shapes"),
    "an object of unknown class": ("other.set_tensor_address('x', 1)", "say of which class"),
    "a class in an annotation": ("x: trt.IBuilder = builder", "no class IBuilder"),
    "a callback that is not there": (
        "class Monitor(trt.IProgressMonitor):\n        def step_done(self, name, step): ...",
        "has no step_done",
    ),
    "a callback with other arguments": (
        "class Monitor(trt.IProgressMonitor):\n        def step_complete(self, name): ...",
        "step_complete takes {3}",
    ),
}
FRAME = "def use(builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, logger, other):\n"


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_wrong_is_found(package: str, stubs: Path, tmp_path: Path) -> None:
    sources = []
    for i, (line, _) in enumerate(WRONG.values()):
        source = tmp_path / f"wrong{i:02}.py"
        source.write_text(f"{FRAME}    {line}\n")
        sources.append(source)
    problems = look(package, stubs, *sources)["problems"]
    for i, (what, (_, complaint)) in enumerate(WRONG.items()):
        own = [problem for problem in problems if problem.startswith(f"wrong{i:02}.py")]
        assert len(own) == 1, what
        assert complaint in own[0], what


def test_what_tensorrt_11_dropped_is_found_there_and_not_in_10(stubs: Path, tmp_path: Path) -> None:
    source = tmp_path / "old.py"
    source.write_text(
        "def use(engine: trt.ICudaEngine, config: trt.IBuilderConfig):\n"
        "    config.set_flag(trt.BuilderFlag.FP16)\n"
        "    return engine.device_memory_size\n"
    )
    assert look("10.16", stubs, source)["problems"] == []
    assert look("11.4", stubs, source)["problems"] == [
        "old.py:2: BuilderFlag has no FP16",
        "old.py:3: ICudaEngine has no device_memory_size",
    ]


LOAD = """
from clinifed.export.builder import BuildError, load, make_builder
try:
    make_builder(load("tensorrt_bindings", "REMEDY"))
except BuildError as error:
    print(error)
"""


@pytest.mark.parametrize("version", ["10.16", "11.4"])
def test_absent_libraries_are_named_by_the_bindings_own_words(version: str) -> None:
    env = environment(version, None)
    done = subprocess.run([sys.executable, "-c", LOAD], env=env, check=True, capture_output=True, text=True)
    major = version.partition(".")[0]
    assert "its libraries cannot be loaded" in done.stdout
    assert f"libnvonnxparser.so.{major}: cannot open shared object file" in done.stdout
    assert done.stdout.endswith("REMEDY\n")


@pytest.mark.parametrize("version", ["10.16", "11.4"])
def test_a_factory_that_returns_null_is_told_as_a_missing_gpu(version: str, stubs: Path) -> None:
    env = environment(version, stubs)
    done = subprocess.run([sys.executable, "-c", LOAD], env=env, check=True, capture_output=True, text=True)
    assert "no builder could be made (pybind11::init(): factory function returned nullptr)" in done.stdout
    assert "finds no GPU" in done.stdout
