"""From typed ONNX to an engine: the one code path for TensorRT 10, TensorRT 11 and TensorRT-RTX.

:mod:`clinifed.export.tensorrt` imports this file, and bundles hold a copy of it beside ``build_engine.py``, for devices
on which engines can only be built there. So it needs the standard library and a TensorRT package only, and Python 3.10.

Precisions are the ONNX's own: networks are strongly typed, and TF32 is off. Packages are told apart by what they can
do, never by version. Their builders mostly print and return None, and log a refused setting while they go on without
it: their log is collected, and every setting is read back.
"""

from __future__ import annotations

import importlib
import os
import shlex
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorrt as trt  # for annotations alone: they name each object's class, in any of the three packages

__all__ = [
    "BuildError",
    "Built",
    "Options",
    "Toolkit",
    "build",
    "load",
    "make_builder",
    "trtexec_command",
    "write_whole",
]

INPUT = "pixels"  # the graph's one input, (batch, 3, S, S)
_NO_DRIVER = "cudaError 35"  # TensorRT-RTX, which builds without a GPU, notes on many occasions that there is none
EVERY_S = 10.0  # at most one line of progress in so many seconds, but for a new phase


class BuildError(Exception):
    """No engine; ``problems`` holds every reason."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


@dataclass(frozen=True)
class Options:
    """How an engine is built."""

    profile: tuple[int, int, int]  # images per request: fewest, the number tuned for, most
    compute_capabilities: tuple[str, ...] = ()  # such as SM89, for builders that take names; others take their GPU
    hardware_compatibility: str = "none"  # or ampere-plus
    version_compatible: bool = False
    workspace_mib: int | None = None  # None: all the GPU has
    timing_cache: Path | None = None  # read if it is there, written afterwards


@dataclass(frozen=True)
class Built:
    """A serialised engine, and what became of the options."""

    data: bytes
    package: str  # module and version
    compute_capabilities: tuple[str, ...]  # empty: those of the building machine's GPU
    lean_runtime: str | None  # of a version-compatible engine: "inside", or "excluded" where the package brings none
    timing_cache: str | None  # "new", "used", or "refused": of another GPU or version, or the package has none
    complaints: tuple[str, ...]  # what the builder logged as errors although it returned an engine


@dataclass(frozen=True)
class Toolkit:
    """A TensorRT package, with the one logger it keeps for the life of the process."""

    trt: Any
    logger: Any
    lines: list[tuple[str, str]]  # (severity, text) of warnings and errors

    @property
    def package(self) -> str:
        """Module and version."""
        return f"{self.trt.__name__} {self.trt.__version__}"

    def errors(self, since: int = 0, *, with_warnings: bool = False) -> tuple[str, ...]:
        """What was logged, once each; that there is no driver is said only if there is nothing else."""
        found = tuple(dict.fromkeys(text for kind, text in self.lines[since:] if with_warnings or kind != "WARNING"))
        return tuple(text for text in found if _NO_DRIVER not in text) or found

    def fail(self, what: str, *, with_warnings: bool = False) -> BuildError:
        """The error of a failed step, with the cause from the log."""
        words = "; ".join(self.errors(with_warnings=with_warnings)) or "the builder logged no reason"
        return BuildError(f"{self.package}: {what}: {words}")

    def require(self, what: str, wanted: object, held: object) -> None:
        """A setting that was refused is only logged: compare what the builder holds with what it was told."""
        if held != wanted:
            raise self.fail(f"{what} was set to {wanted}, but the builder holds {held}", with_warnings=True)


_loaded: dict[str, Toolkit] = {}  # a package keeps the first logger it is given, and ignores every other


def load(module: str, remedy: str) -> Toolkit:
    """Import a TensorRT package; the same module gives the same toolkit.

    Raises:
        BuildError: it or its libraries are absent; ``remedy`` is the last part of the message.
    """
    try:
        trt = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise BuildError(f"the package {module} is not installed ({error}); {remedy}") from error
    except (ImportError, OSError) as error:
        raise BuildError(f"{module} is installed, but its libraries cannot be loaded ({error}); {remedy}") from error
    if module in _loaded and _loaded[module].trt is trt:
        return _loaded[module]
    lines: list[tuple[str, str]] = []

    class Collector(trt.ILogger):  # type: ignore[name-defined]  # imported by name
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            kinds = trt.ILogger.Severity
            if severity in (kinds.INTERNAL_ERROR, kinds.ERROR, kinds.WARNING):
                lines.append((severity.name, msg.strip()))

    _loaded[module] = Toolkit(trt, Collector(), lines)
    return _loaded[module]


def make_builder(kit: Toolkit) -> trt.Builder:
    """A builder, with the log empty.

    Raises:
        BuildError: there is no GPU, and the package needs one.
    """
    trt = kit.trt
    kit.lines.clear()
    try:
        builder = trt.Builder(kit.logger)
    except (TypeError, RuntimeError) as error:  # the library's factory returned null
        raise kit.fail(
            f"no builder could be made ({error}): it finds no GPU, and builds for the one it finds"
        ) from error
    if builder is None:
        raise kit.fail("no builder could be made")
    return builder


def build(
    kit: Toolkit, onnx_path: Path, options: Options, progress: Callable[[str], None] = lambda line: None
) -> Built:
    """Build an engine from a graph whose input ``pixels`` is (B, 3, S, S) with a dynamic batch.

    Ctrl-C ends the build at the builder's next step; a second one does not wait for it.

    Args:
        kit: from :func:`load`.
        onnx_path: its types are the engine's.
        options: each is refused where the package does not take it, but for ``compute_capabilities``.
        progress: called with one line now and then, from another thread. What it raises ends the build.

    Raises:
        BuildError: no GPU, a graph that cannot be parsed (with the node), a refused option, or no engine; with the
            builder's own words.
    """
    stop, done = threading.Event(), threading.Event()
    result: list[Built] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            result.append(_build(kit, onnx_path, options, progress, stop))
        except BaseException as error:  # for whoever waits
            failure.append(error)
        finally:
            done.set()

    # In a thread of its own, because Ctrl-C is raised in the main one: there it could meet a call that the builder
    # makes to its monitor or logger, and no exception may cross the builder.
    threading.Thread(target=work, name="engine build", daemon=True).start()
    interrupted = False
    while True:
        try:
            done.wait()
            break
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            stop.set()
    if interrupted:
        raise KeyboardInterrupt
    if failure:
        raise failure[0]
    return result[0]


def _build(
    kit: Toolkit, onnx_path: Path, options: Options, progress: Callable[[str], None], stop: threading.Event
) -> Built:
    trt = kit.trt
    builder = make_builder(kit)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, kit.logger)
    if not parser.parse_from_file(str(onnx_path)):
        faults = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        if faults:
            raise BuildError(*(f"{kit.package}: {onnx_path.name} cannot be parsed: {fault}" for fault in faults))
        raise kit.fail(f"{onnx_path.name} cannot be parsed")
    before = len(kit.lines)
    config = builder.create_builder_config()
    _add_profile(kit, builder, network, config, options.profile)
    capabilities = _set_compute_capabilities(kit, config, options.compute_capabilities)
    _set_options(kit, config, options)
    if kit.errors(before):  # a setting that cannot be read back as it was set
        raise kit.fail("a setting was refused")
    cache = _set_timing_cache(kit, config, options.timing_cache)
    monitor = _monitor(kit, progress, stop)
    config.progress_monitor = monitor
    lean = "inside" if options.version_compatible else None
    before = len(kit.lines)
    plan = builder.build_serialized_network(network, config)
    if plan is None and lean and any("nvinfer_lean" in text for text in kit.errors(before)):
        # The runtime that a version-compatible engine carries is not part of the package: build without it.
        lean = "excluded"
        del kit.lines[before:]
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
        kit.require("EXCLUDE_LEAN_RUNTIME", True, config.get_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME))
        plan = builder.build_serialized_network(network, config)
    if monitor.failure is not None:
        raise monitor.failure
    if plan is None:
        raise kit.fail(f"no engine came of {onnx_path.name}")
    complaints = list(kit.errors())
    if options.timing_cache is not None and cache != "refused":
        complaints += _keep_timing_cache(config, options.timing_cache)
    return Built(bytes(plan), kit.package, capabilities, lean, cache, tuple(complaints))


def _parser_error(fault: trt.ParserError) -> str:
    """An error of the parser, with the node it stopped at."""
    words = "; ".join(dict.fromkeys(line for line in fault.desc().splitlines() if _NO_DRIVER not in line))
    if hasattr(fault, "node_name") and fault.node_name():
        return f"node {fault.node_name()!r} ({fault.node_operator()}): {words}"
    return f"node {fault.node()}: {words}" if fault.node() >= 0 else words


def _add_profile(
    kit: Toolkit,
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    config: trt.IBuilderConfig,
    batches: tuple[int, int, int],
) -> None:
    """One optimisation profile over the batch axis; a bad one is False or -1, not an exception."""
    shapes = {}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shapes[tensor.name] = tuple(tensor.shape)
    if list(shapes) != [INPUT]:
        raise BuildError(f"the graph's inputs are {', '.join(shapes) or 'none'}; it needs one, named {INPUT!r}")
    fewest, best, most = ((batch, *shapes[INPUT][1:]) for batch in batches)
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT, fewest, best, most)
    if not profile or config.add_optimization_profile(profile) != 0:
        raise kit.fail(f"the optimisation profile {'/'.join(map(str, batches))} does not fit {INPUT} {shapes[INPUT]}")


def _set_compute_capabilities(kit: Toolkit, config: trt.IBuilderConfig, names: tuple[str, ...]) -> tuple[str, ...]:
    """Name the GPUs the engine is for, where the builder takes names; returns what it then holds."""
    trt = kit.trt
    if not hasattr(config, "set_compute_capability"):
        return ()
    # CURRENT and NONE look at the machine's own GPU; an engine for hospitals names its GPUs.
    known = {name: value for name, value in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        asked = f"compute capability {', '.join(unknown)}" if unknown else "no compute capability is named"
        raise BuildError(f"{asked}: {kit.package} builds for {', '.join(known)} only")
    config.num_compute_capabilities = len(names)
    for i, name in enumerate(names):
        config.set_compute_capability(known[name], i)
    held = []
    for i in range(config.num_compute_capabilities):
        held.append(config.get_compute_capability(i).name)
    kit.require("the list of compute capabilities", names, tuple(held))
    return names


def _set_options(kit: Toolkit, config: trt.IBuilderConfig, options: Options) -> None:
    trt = kit.trt
    config.clear_flag(trt.BuilderFlag.TF32)  # FP32 products with 10 bits of mantissa: not what the ONNX says
    kit.require("TF32", False, config.get_flag(trt.BuilderFlag.TF32))
    levels = {
        "none": trt.HardwareCompatibilityLevel.NONE,
        "ampere-plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
    }
    if options.hardware_compatibility not in levels:
        raise BuildError(f"hardware_compatibility {options.hardware_compatibility!r}: use {' or '.join(levels)}")
    level = levels[options.hardware_compatibility]
    if options.hardware_compatibility != "none":
        config.hardware_compatibility_level = level
        kit.require("hardware_compatibility", level, config.hardware_compatibility_level)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        kit.require("version_compatible", True, config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE))
    if options.workspace_mib is not None:
        limit = options.workspace_mib << 20
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, limit)
        kit.require("workspace_mib, in bytes,", limit, config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE))


def _set_timing_cache(kit: Toolkit, config: trt.IBuilderConfig, path: Path | None) -> str | None:
    """Hand the builder the timings of earlier builds; returns what it made of them."""
    if path is None:
        return None
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise BuildError(f"timing cache {path.name}: it cannot be read ({error.strerror})") from error
    before = len(kit.lines)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        cache = config.create_timing_cache(content)
        taken = cache is not None and config.set_timing_cache(cache, False)
    if warned:  # TensorRT-RTX has the names, and since 1.2 does nothing
        kit.lines.append(("ERROR", f"timing cache {path.name}: not used: {warned[0].message}"))
        return "refused"
    if content and (not taken or len(kit.lines) > before):  # a cache it cannot read is logged, and an empty one taken
        kit.lines.append(("ERROR", f"timing cache {path.name}: refused, and left as it is; remove it, or name another"))
        return "refused"
    if not taken:
        raise kit.fail("no timing cache could be made")
    return "used" if content else "new"


def _keep_timing_cache(config: trt.IBuilderConfig, path: Path) -> list[str]:
    """Write the timings of this build; returns why not: an engine is not thrown away for it."""
    cache = config.get_timing_cache()
    content = None if cache is None else cache.serialize()
    if content is None:
        return [f"timing cache {path.name}: the builder returned none"]
    try:
        write_whole(path, bytes(content))
    except OSError as error:
        return [f"timing cache {path.name}: not written ({error.strerror})"]
    return []


def _monitor(kit: Toolkit, progress: Callable[[str], None], stop: threading.Event) -> Any:
    """A progress monitor that ends the build when ``stop`` is set; its ``failure`` is what ``progress`` raised."""
    trt = kit.trt

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]  # imported by name
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.failure: BaseException | None = None
            self._whole = ""  # the phase that all others are part of
            self._steps: dict[str, int] = {}
            self._last = time.monotonic()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            if parent_phase is None:
                self._whole = phase_name
            elif parent_phase == self._whole:
                self._say(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if time.monotonic() - self._last >= EVERY_S:
                self._say(f"{phase_name}, {step + 1} of {self._steps.get(phase_name, '?')}")
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

        def _say(self, line: str) -> None:
            self._last = time.monotonic()
            try:
                progress(f"{self._whole}: {line}")
            except BaseException as error:  # not through the builder; raised when it has returned
                self.failure = error
                stop.set()

    return Monitor()


def trtexec_command(onnx: str, shape: Sequence[int], options: Options, engine: str = "model.plan") -> str:
    """The same build as a command line of NVIDIA's trtexec (TensorRT 10 and 11).

    Args:
        onnx: the ONNX file, from where the command is run.
        shape: of one image, (3, S, S).
        options: those for builders that take the GPU they find; compute capabilities have no flag.
        engine: the file to be written.
    """
    parts = ["trtexec", f"--onnx={onnx}", f"--saveEngine={engine}", "--stronglyTyped", "--noTF32", "--skipInference"]
    for which, batch in zip(("min", "opt", "max"), options.profile):  # noqa: B905  # three and three
        parts.append(f"--{which}Shapes={INPUT}:{'x'.join(map(str, (batch, *shape)))}")
    if options.hardware_compatibility == "ampere-plus":
        parts.append("--hardwareCompatibilityLevel=ampere+")
    if options.version_compatible:
        parts.append("--versionCompatible")
    if options.workspace_mib is not None:
        parts.append(f"--memPoolSize=workspace:{options.workspace_mib}")  # MiB
    if options.timing_cache is not None:
        parts.append(f"--timingCacheFile={options.timing_cache}")
    return shlex.join(parts)


def write_whole(path: Path, content: bytes) -> None:
    """Afterwards the file is the old or the new one, never a mixture."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
