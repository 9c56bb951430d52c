"""Engines from typed ONNX, by TensorRT or TensorRT-RTX: the presets' side of :mod:`clinifed.export.builder`.

An engine is an executable artefact. Nothing here runs one: TensorRT-RTX builds without a GPU. What cannot be built
here is planned: a bundle then holds ``build.json`` and the two files that build from it on the device.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinifed.errors import ExportError
from clinifed.export import builder
from clinifed.export.builder import BuildError, Options, Toolkit
from clinifed.export.presets import Engine
from clinifed.files import file_sha256, write_atomic, write_json

__all__ = [
    "TARGETS",
    "BuiltEngine",
    "Planned",
    "Target",
    "build_engine",
    "build_plan",
    "check_target",
    "toolkit",
    "trtexec_command",
    "write_build_plan",
    "write_engine",
]

PLAN = "build.json"
PLAN_SCHEMA_VERSION = 1
ON_DEVICE = ("build_engine.py", "builder.py")  # copied into the bundle as they are


@dataclass(frozen=True)
class Target:
    """A package that builds engines."""

    name: str
    module: str  # what is imported
    extra: str  # clinifed's optional dependency that installs it


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("tensorrt", "tensorrt", "tensorrt"),  # builds for the GPU it finds
        Target("tensorrt-rtx", "tensorrt_rtx", "rtx"),  # builds anywhere for named compute capabilities
    )
}


@dataclass(frozen=True)
class BuiltEngine:
    """A serialised engine, and what a reader must know to trust it."""

    data: bytes
    target: str
    package: str  # module and version that built it
    compute_capabilities: tuple[str, ...]  # empty: the GPU of the building machine
    options: Engine
    lean_runtime: str | None  # of a version-compatible engine: "inside", or "excluded"
    timing_cache: str | None  # "new", "used" or "refused"; None where none was asked for
    complaints: tuple[str, ...]  # what the builder logged as errors although it returned an engine

    def metadata(self) -> dict[str, Any]:
        """JSON values: everything but the bytes."""
        return {
            "target": self.target,
            "package": self.package,
            "bytes": len(self.data),
            "compute_capabilities": list(self.compute_capabilities),
            "profile": self.options.profile.model_dump(),
            "hardware_compatibility": self.options.hardware_compatibility,
            "version_compatible": self.options.version_compatible,
            "lean_runtime": self.lean_runtime,
            "workspace_mib": self.options.workspace_mib,
            "timing_cache": self.timing_cache,
            "complaints": list(self.complaints),
            "executed": False,
        }


@dataclass(frozen=True)
class Planned:
    """An engine that is built on its device."""

    precision: str
    onnx: Path  # in the bundle
    model: str  # its name in Triton: the folder under ``local/``
    options: Engine


def _export_error(target: str, error: BuildError) -> ExportError:
    return ExportError(*(f"target {target!r}: {problem}" for problem in error.problems))


def toolkit(name: str) -> Toolkit:
    """The target's package.

    Raises:
        ExportError: with the command that installs it.
    """
    target = TARGETS[name]
    try:
        return builder.load(target.module, f"pip install 'clinifed[{target.extra}]', or choose another target")
    except BuildError as error:
        raise _export_error(name, error) from error


def check_target(name: str) -> str:
    """See that engines for ``name`` can be built here; returns the package and its version.

    Raises:
        ExportError: the name is unknown, or the package, its libraries or the GPU it needs are absent.
    """
    if name not in TARGETS:
        raise ExportError(f"target {name!r} is not known; use one of {', '.join(sorted(TARGETS))} or 'onnx'")
    kit = toolkit(name)
    try:
        builder.make_builder(kit)
    except BuildError as error:
        remedy = "export on a machine with that GPU, build on the device from the bundle, or choose 'tensorrt-rtx'"
        raise ExportError(*_export_error(name, error).problems, remedy) from error
    return kit.package


def _options(engine: Engine, timing_cache: Path | None = None) -> Options:
    return Options(
        (engine.profile.min, engine.profile.opt, engine.profile.max),
        engine.compute_capabilities,
        engine.hardware_compatibility,
        engine.version_compatible,
        engine.workspace_mib,
        timing_cache,
    )


def build_engine(
    onnx_path: Path,
    target: str,
    options: Engine,
    progress: Callable[[str], None] | None = None,
    timing_cache: Path | None = None,
) -> BuiltEngine:
    """Build an engine from a typed ONNX file; its precisions are the file's own.

    Args:
        onnx_path: a graph with one input ``pixels`` (B, 3, S, S) of dynamic batch.
        target: a key of :data:`TARGETS`.
        options: of the profile and precision; see :class:`clinifed.export.presets.Engine`.
        progress: called now and then with one line, from another thread.
        timing_cache: a file of kernel timings, read if it is there and written afterwards. One that the builder
            refuses stays as it is, and that is among the engine's complaints. TensorRT-RTX takes none.

    Raises:
        ExportError: see :func:`check_target`; or the file cannot be parsed, the profile does not fit it, an option is
            refused, or the builder gave up. The message holds the builder's own words.
        KeyboardInterrupt: Ctrl-C, once the builder has stopped.
    """
    check_target(target)
    kit = toolkit(target)
    try:
        built = builder.build(kit, onnx_path, _options(options, timing_cache), progress or (lambda line: None))
    except BuildError as error:
        raise _export_error(target, error) from error
    return BuiltEngine(
        built.data,
        target,
        built.package,
        built.compute_capabilities,
        options,
        built.lean_runtime,
        built.timing_cache,
        built.complaints,
    )


def write_engine(engine: BuiltEngine, path: Path) -> int:
    """Write the engine's bytes, atomically, and the folders above; returns their number.

    Raises:
        ExportError: it cannot be written, as on a full disk; nothing is left half-written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, engine.data)
    except OSError as error:
        raise ExportError(
            f"{path}: the engine cannot be written ({error.strerror}); it takes {len(engine.data) >> 20} MiB"
        ) from error
    return len(engine.data)


def trtexec_command(onnx: str, options: Engine, size_px: int, engine: str = "model.plan") -> str:
    """The same build as a command line of NVIDIA's trtexec, for a square image of ``size_px``."""
    return builder.trtexec_command(onnx, (3, size_px, size_px), _options(options), engine)


def build_plan(bundle: Path, engines: Sequence[Planned], size_px: int, on_device: str | None) -> dict[str, Any]:
    """What ``build.json`` says: JSON values, by which ``build_engine.py`` builds on a device.

    Args:
        bundle: the directory that holds the ONNX files.
        engines: those that are built on the device; each precision once, each model once.
        size_px: S, the side of an image in pixels.
        on_device: which device that is, in words; None: any that the builder finds.
    """
    precisions = {}
    for planned in engines:
        onnx = planned.onnx.relative_to(bundle).as_posix()
        precisions[planned.precision] = {
            "onnx": onnx,
            "sha256": file_sha256(planned.onnx),
            "shape": [3, size_px, size_px],
            "model": planned.model,
            **planned.options.model_dump(mode="json"),
            "on_device": on_device,
            "trtexec": trtexec_command(onnx, planned.options, size_px, f"{planned.model}.plan"),
        }
    return {"schema_version": PLAN_SCHEMA_VERSION, "precisions": precisions}


def write_build_plan(bundle: Path, plan: Mapping[str, Any]) -> None:
    """Write ``build.json``, and the files that build from it, into ``bundle``."""
    write_json(bundle / PLAN, plan)
    for name in ON_DEVICE:
        shutil.copyfile(Path(__file__).with_name(name), bundle / name)
