"""Engines from typed ONNX: one strongly typed code path for TensorRT and TensorRT-RTX.

Both packages share every name used here; they are told apart by capability (``set_compute_capability``), never
by version. Their builders mostly print and return None: their log is collected and becomes the error's text.

An engine is an executable artefact. Nothing here runs one: TensorRT-RTX builds without a GPU.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from clinifed.errors import ExportError
from clinifed.evaluation.parity import PIXELS
from clinifed.export.presets import Engine, Profile
from clinifed.files import write_atomic

__all__ = ["TARGETS", "BuiltEngine", "Target", "build_engine", "check_target", "write_engine"]


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
    profile: Profile
    complaints: tuple[str, ...]  # what the builder logged as errors although it returned an engine

    def metadata(self) -> dict[str, Any]:
        """JSON values: everything but the bytes."""
        return {
            "target": self.target,
            "package": self.package,
            "bytes": len(self.data),
            "compute_capabilities": list(self.compute_capabilities),
            "profile": self.profile.model_dump(),
            "complaints": list(self.complaints),
            "executed": False,
        }


@dataclass(frozen=True)
class _Toolkit:
    """An imported package, with the one logger it keeps for the life of the process."""

    target: Target
    trt: Any
    log: list[str]  # errors since the last build began
    logger: Any

    @property
    def package(self) -> str:
        return f"{self.target.module} {self.trt.__version__}"

    def fail(self, what: str) -> ExportError:
        cause = "; ".join(dict.fromkeys(self.log)) or "the builder logged no reason"
        return ExportError(f"{self.target.name} ({self.package}): {what}: {cause}")


@cache
def _toolkit(name: str) -> _Toolkit:
    """Import the target's package. Raises ExportError with the command that installs it."""
    target = TARGETS[name]
    try:
        trt = importlib.import_module(target.module)
    except ModuleNotFoundError as error:
        raise ExportError(
            f"target {name!r}: the package {target.module} is not installed ({error}); "
            f"pip install 'clinifed[{target.extra}]', or choose another target"
        ) from error
    except (ImportError, OSError) as error:
        raise ExportError(
            f"target {name!r}: {target.module} is installed but its libraries cannot be loaded ({error}); "
            f"install those that belong to it: pip install 'clinifed[{target.extra}]'"
        ) from error

    log: list[str] = []

    class Collector(trt.ILogger):  # type: ignore[name-defined]  # imported by name
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                log.append(message.strip())

    return _Toolkit(target, trt, log, Collector())


def _builder(kit: _Toolkit) -> Any:
    kit.log.clear()
    try:
        builder = kit.trt.Builder(kit.logger)
    except (TypeError, RuntimeError) as error:  # the library's factory returned null
        raise kit.fail(
            f"no builder could be made ({error}); this target builds on the GPU it builds for. Export on a "
            "machine with that GPU, or choose target 'tensorrt-rtx'"
        ) from error
    if builder is None:
        raise kit.fail("no builder could be made")
    return builder


def check_target(name: str) -> str:
    """See that engines for ``name`` can be built here; returns the package and its version.

    Raises:
        ExportError: the name is unknown, or the package, its libraries or the GPU it needs are absent.
    """
    if name not in TARGETS:
        raise ExportError(f"target {name!r} is not known; use one of {', '.join(sorted(TARGETS))} or 'onnx'")
    kit = _toolkit(name)
    _builder(kit)
    return kit.package


def build_engine(onnx_path: Path, target: str, options: Engine) -> BuiltEngine:
    """Build an engine from a typed ONNX file; its precisions are the file's own.

    Args:
        onnx_path: a graph with one input ``pixels`` (B, 3, S, S) of dynamic batch.
        target: a key of :data:`TARGETS`.
        options: the optimisation profile, and the compute capabilities for builders that take them.

    Raises:
        ExportError: see :func:`check_target`; or the file cannot be parsed, the profile does not fit it, a
            compute capability is unknown, or the builder gave up. The message holds the builder's own words.
    """
    check_target(target)
    kit = _toolkit(target)
    trt, builder = kit.trt, _builder(kit)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, kit.logger)
    if not parser.parse_from_file(str(onnx_path)):
        kit.log.extend(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise kit.fail(f"{onnx_path.name} cannot be parsed")
    config = builder.create_builder_config()
    _add_profile(kit, builder, network, config, options.profile)
    capabilities = _set_compute_capabilities(kit, config, options.compute_capabilities)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise kit.fail(f"no engine came of {onnx_path.name}")
    return BuiltEngine(bytes(plan), target, kit.package, capabilities, options.profile, complaints=tuple(kit.log))


def _add_profile(kit: _Toolkit, builder: Any, network: Any, config: Any, profile: Profile) -> None:
    """One optimisation profile over the batch axis; a bad one is False or -1, not an exception."""
    shape = next((tuple(t.shape) for t in map(network.get_input, range(network.num_inputs)) if t.name == PIXELS), None)
    if shape is None:
        raise kit.fail(f"the graph has no input named {PIXELS!r}")
    wanted = builder.create_optimization_profile()
    wanted.set_shape(PIXELS, *((batch, *shape[1:]) for batch in (profile.min, profile.opt, profile.max)))
    if not wanted or config.add_optimization_profile(wanted) < 0:
        batches = f"{profile.min}/{profile.opt}/{profile.max}"
        raise kit.fail(f"the optimisation profile {batches} does not fit the input {shape}")


def _set_compute_capabilities(kit: _Toolkit, config: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    """Name the GPUs the engine is for, where the builder takes names; returns what it then holds."""
    if not hasattr(config, "set_compute_capability"):
        return ()
    # CURRENT and NONE look at the machine's own GPU; an engine for hospitals names its GPUs.
    known = {n: v for n, v in kit.trt.ComputeCapability.__members__.items() if n.startswith("SM")}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ExportError(
            f"compute capability {', '.join(unknown)}: {kit.package} builds for {', '.join(known)} only; "
            "change engine.compute_capabilities in presets.yaml"
        )
    config.num_compute_capabilities = len(names)
    for i, name in enumerate(names):
        config.set_compute_capability(known[name], i)
    held = tuple(config.get_compute_capability(i).name for i in range(config.num_compute_capabilities))
    if held != names:  # a refused setting is only logged
        raise kit.fail(f"compute capabilities {names} were asked for, the builder holds {held}")
    return held


def write_engine(engine: BuiltEngine, path: Path) -> int:
    """Write the engine's bytes, atomically, and the folders above; returns their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, engine.data)
    return len(engine.data)
