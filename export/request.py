"""What an export was asked for, checked whole before any work is done."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clinifed.errors import ExportError
from clinifed.export.presets import DeployProfile, Presets, load_presets
from clinifed.export.tensorrt import check_target

__all__ = ["NO_ENGINES", "Request", "resolve"]

NO_ENGINES = "onnx"  # the target that stops after the ONNX files
_ON_DEVICE = "tensorrt"  # engines of this target are for the GPU that builds them: the bundle can carry their recipe


@dataclass(frozen=True)
class Request:
    """An export that can be done here."""

    presets: Presets
    profile: str  # a key of presets.profiles
    precisions: tuple[str, ...]
    builders: Mapping[str, str]  # engine target → the package that builds for it here
    deferred: Mapping[str, str]  # engine target → why its engines are built on the device instead

    @property
    def calibrates(self) -> bool:
        """Whether any precision depends on calibration images: INT8's ranges, and what 16 bits cannot hold."""
        chosen = [self.presets.precisions[name] for name in self.precisions]
        return any(precision.quantize or precision.half for precision in chosen)


def resolve(out: Path, profile: str, precisions: Sequence[str], targets: Sequence[str] | None) -> Request:
    """Check everything that can be checked without reading a file of the checkpoint's.

    Args:
        out: must not exist.
        profile: a key of ``profiles`` in ``presets.yaml``.
        precisions: keys of ``precisions`` there; asked for twice is made once.
        targets: engine targets, or ``onnx`` for no engines; None: those of the profile.

    Raises:
        ExportError: a name is unknown, or engines cannot be built here nor later on a device; every problem at once.
    """
    presets = load_presets()
    precisions = tuple(dict.fromkeys(precisions))
    problems = [
        f"precision {name!r} is not known; use {', '.join(presets.precisions)}"
        for name in precisions
        if name not in presets.precisions
    ]
    if out.exists():
        problems.append(f"{out} exists and is never overwritten; choose another --out, or remove it")
    builders: dict[str, str] = {}
    deferred: dict[str, str] = {}
    if profile not in presets.profiles:
        problems.append(f"profile {profile!r} is not known; use {', '.join(presets.profiles)}")
    else:
        machine = presets.profiles[profile]
        wanted = tuple(dict.fromkeys(machine.targets if targets is None else targets))
        if not precisions or not wanted:
            problems.append(f"name at least one precision and one target ({NO_ENGINES!r} for no engines)")
        for target in wanted:
            if target != NO_ENGINES:
                problems += _place(target, profile, machine, builders, deferred)
    if problems:
        raise ExportError(*problems)
    return Request(presets, profile, precisions, builders, deferred)


def _place(
    target: str, profile: str, machine: DeployProfile, builders: dict[str, str], deferred: dict[str, str]
) -> list[str]:
    """Put ``target`` among ``builders`` or ``deferred``, or say what is wrong with it."""
    if target == _ON_DEVICE and machine.on_device is not None:
        deferred[target] = f"built on the device: {machine.on_device}"
        return []
    if target != _ON_DEVICE and target != NO_ENGINES and not machine.engine.compute_capabilities:
        named = f"profile {profile!r} names no compute capability, so that target {target!r} has nothing to build for"
        return [f"{named}; use target {_ON_DEVICE!r}, or another profile"]
    try:
        builders[target] = check_target(target)
    except ExportError as error:
        if target != _ON_DEVICE:
            return list(error.problems)
        deferred[target] = f"not built here: {'; '.join(error.problems)}"
    return []
