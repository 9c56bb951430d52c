"""Builds a bundle's engines on the device they are for: a Jetson, or a machine with a datacenter's GPU.

Every bundle holds a copy of this file and of ``builder.py``; they need the standard library, TensorRT and Python 3.10.
In a bundle::

    clinifed verify BUNDLE --key PUB                           # first, where clinifed is: who made the bundle?
    python3 build_engine.py [--precision int8,fp16] [--sign-key KEY] [--timing-cache FILE] [--out DIR]
    python3 build_engine.py --precision int8 --trtexec         # the same build as a command line, not run
    python3 build_engine.py --precision int8 --engine FILE     # packs what that command line built

writes for each precision, whole or not at all::

    local/<model>/1/model.plan   and config.pbtxt, labels: all of device/<model>, so that local/ is Triton's repository
                  engine.json    what was built, from what, by what; SHA-256 of the files above and of manifest.json
                  engine.sig     with --sign-key: Ed25519 (RFC 8032), 64 bytes, on engine.json

It reads ``build.json``, and nothing whose SHA-256 is not that in ``manifest.json`` is built from. Who made the manifest
it cannot say: that is ``clinifed verify``'s, which also reads what this leaves.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

if __package__:
    from clinifed.export.builder import BuildError, Options, build, load, trtexec_command, write_whole
else:  # in a bundle
    sys.dont_write_bytecode = True  # a cache beside builder.py would be a file that the manifest does not list
    from builder import BuildError, Options, build, load, trtexec_command, write_whole  # type: ignore

__all__ = ["main"]

ENGINE = "1/model.plan"  # in Triton's repository: the model's version 1
EXIT_FAILED, EXIT_INTERRUPTED = 8, 130  # as clinifed.errors says
REMEDY = "on a Jetson: apt install python3-libnvinfer; elsewhere: pip install tensorrt"


@dataclass(frozen=True)
class Step:
    """One precision to be built, its files checked against the manifest."""

    precision: str
    model: str  # its name in Triton, and of its folder
    onnx: Path
    onnx_name: str  # in the bundle
    onnx_sha256: str
    shape: tuple[int, ...]  # of one image
    options: Options
    serving: dict[str, Path]  # what Triton reads besides the engine, by name in the model's folder


def read_steps(bundle: Path, precisions: Sequence[str] | None, timing_cache: Path | None) -> tuple[list[Step], str]:
    """What ``build.json`` asks for; returns it with the SHA-256 of ``manifest.json``.

    Raises:
        BuildError: a file is missing, is not what the manifest says, or a precision is not in the plan.
    """
    try:
        manifest = (bundle / "manifest.json").read_bytes()
        files = {name: entry["sha256"] for name, entry in json.loads(manifest)["files"].items()}
        plan = json.loads(_checked(bundle, files, "build.json").read_bytes())["precisions"]
        wanted = list(plan) if precisions is None else list(dict.fromkeys(precisions))
        unknown = [name for name in wanted if name not in plan]
        if unknown:
            raise BuildError(f"precision {', '.join(unknown)}: this bundle has {', '.join(plan)}")
        steps = [_step(bundle, files, name, plan[name], timing_cache) for name in wanted]
    except OSError as error:
        raise BuildError(f"{Path(error.filename or bundle).name}: {error.strerror}; is this a whole bundle?") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BuildError(
            f"manifest.json or build.json is not what clinifed writes ({error!r}); get the bundle anew"
        ) from error
    return steps, sha256(manifest).hexdigest()


def _step(bundle: Path, files: dict[str, str], precision: str, entry: dict[str, Any], cache: Path | None) -> Step:
    model = entry["model"]
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", model):
        raise BuildError(f"build.json: precisions.{precision}.model {model!r} is no name of a folder")
    onnx = _checked(bundle, files, entry["onnx"])
    if entry["sha256"] != files[entry["onnx"]]:
        raise BuildError(f"build.json: precisions.{precision}.sha256 is not that of {entry['onnx']} in manifest.json")
    serving = {name: _checked(bundle, files, name) for name in files if name.startswith(f"device/{model}/")}
    profile = entry["profile"]
    options = Options(
        (profile["min"], profile["opt"], profile["max"]),
        tuple(entry["compute_capabilities"]),
        entry["hardware_compatibility"],
        entry["version_compatible"],
        entry["workspace_mib"],
        cache,
    )
    return Step(
        precision,
        model,
        onnx,
        entry["onnx"],
        entry["sha256"],
        tuple(entry["shape"]),
        options,
        {name.split("/", 2)[2]: path for name, path in serving.items()},
    )


def _checked(bundle: Path, files: dict[str, str], name: str) -> Path:
    """A file of the bundle whose bytes are those that the manifest lists."""
    path = bundle / name
    if name not in files or Path(name).is_absolute() or ".." in Path(name).parts or path.resolve() != path:
        raise BuildError(f"{name}: manifest.json lists no such file of this bundle")
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != files[name]:
        raise BuildError(
            f"{name}: its SHA-256 is {digest.hexdigest()}, manifest.json says {files[name]}; the file was changed or "
            "damaged. Build nothing from it; get the bundle anew"
        )
    return path


def read_key(path: Path) -> Any:
    """The Ed25519 key in a file of 64 hexadecimal digits, readable by its owner alone (``clinifed keys new``)."""
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError as error:
        raise BuildError(
            f"--sign-key needs the Python package cryptography here ({error}); pip install cryptography"
        ) from error
    try:
        if path.stat().st_mode & 0o077:
            raise BuildError(f"{path}: a signing key must be readable by its owner alone; say chmod 600")
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(path.read_text(encoding="ascii").strip()))
    except OSError as error:
        raise BuildError(f"{path}: no signing key ({error.strerror})") from error
    except ValueError as error:
        raise BuildError(f"{path}: not a signing key; it holds 64 hexadecimal digits") from error


def sign(key: Any, engine_json: bytes) -> bytes:
    """64 bytes: what ``clinifed.signing.verify`` takes for the purpose ``local engine`` and the SHA-256."""
    signature: bytes = key.sign(b"clinifed\x00local engine\x00" + sha256(engine_json).hexdigest().encode())
    return signature


def gpu() -> dict[str, str] | None:
    """Name and compute capability of the first GPU that CUDA sees here, from its driver; None without one."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        device, name, figures = ctypes.c_int(), ctypes.create_string_buffer(256), []
        if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0) or cuda.cuDeviceGetName(name, 256, device):
            return None
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
            value = ctypes.c_int()
            if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
                return None
            figures.append(str(value.value))
    except (OSError, AttributeError):
        return None
    return {"name": name.value.decode(errors="replace"), "compute_capability": "SM" + "".join(figures)}


def pack(out: Path, step: Step, data: bytes, facts: dict[str, Any], key: Any = None) -> Path:
    """Write ``out/<model>``, whole or not at all; returns it.

    Args:
        out: made if absent; must not hold the model.
        step: what was built.
        data: the engine.
        facts: what else ``engine.json`` says.
        key: from :func:`read_key`; None signs nothing.

    Raises:
        BuildError: it cannot be written, because the disk is full or for another reason.
    """
    files = {**{name: path.read_bytes() for name, path in step.serving.items()}, ENGINE: data}
    entries = {name: {"sha256": sha256(content).hexdigest(), "bytes": len(content)} for name, content in files.items()}
    statement = {
        "schema_version": 1,
        "model": step.model,
        "precision": step.precision,
        "onnx": {"name": step.onnx_name, "sha256": step.onnx_sha256},
        "files": entries,
        **facts,
    }
    files["engine.json"] = (json.dumps(statement, indent=2, allow_nan=False) + "\n").encode()
    if key is not None:
        files["engine.sig"] = sign(key, files["engine.json"])
    target = out / step.model
    first = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=out))
        try:
            for name, content in files.items():
                (scratch / name).parent.mkdir(parents=True, exist_ok=True)
                write_whole(scratch / name, content)
            scratch.chmod(0o755)
            scratch.rename(target)
        except BaseException:
            shutil.rmtree(scratch)
            if first:
                out.rmdir()  # an empty folder is nothing that belongs into a bundle
            raise
    except OSError as error:
        raise BuildError(
            f"{target}: the engine cannot be written ({error.strerror}); it takes {len(data) >> 20} MiB, and nothing "
            "was left half-written"
        ) from error
    return target


def run(arguments: argparse.Namespace, bundle: Path) -> None:
    """Check everything, then build and pack, one precision after another."""
    precisions = arguments.precision.split(",") if arguments.precision else None
    steps, manifest_sha256 = read_steps(bundle, precisions, arguments.timing_cache)
    if arguments.trtexec:
        for step in steps:
            sys.stdout.write(trtexec_command(step.onnx_name, step.shape, step.options, f"{step.model}.plan") + "\n")
        return
    out = arguments.out or bundle / "local"
    there = [step.model for step in steps if (out / step.model).exists()]
    if there:
        raise BuildError(*(f"{out / name} exists and is never overwritten; remove it first" for name in there))
    if arguments.engine is not None and len(steps) != 1:
        raise BuildError("--engine FILE is one engine: name its one --precision")
    key = read_key(arguments.sign_key) if arguments.sign_key else None
    kit = None if arguments.engine else load("tensorrt", REMEDY)
    for step in steps:
        facts: dict[str, Any] = {
            "manifest_sha256": manifest_sha256,
            "device": gpu(),
            "profile": dict(zip(("min", "opt", "max"), step.options.profile)),  # noqa: B905
            "hardware_compatibility": step.options.hardware_compatibility,
            "version_compatible": step.options.version_compatible,
            "workspace_mib": step.options.workspace_mib,
        }
        if kit is None:
            data = arguments.engine.read_bytes()
            facts |= {"package": "trtexec", "lean_runtime": None, "complaints": []}
        else:
            built = build(kit, step.onnx, step.options, partial(_report, step.precision))
            data = built.data
            facts |= {
                "package": built.package,
                "lean_runtime": built.lean_runtime,
                "complaints": list(built.complaints),
            }
        facts["built"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        _say(f"{step.precision}: {pack(out, step, data, facts, key)}: {len(data)} bytes")


def _report(precision: str, line: str) -> None:
    _say(f"{precision}: {line}")


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Build this bundle's engines on this device, with its TensorRT.")
    parser.add_argument("--precision", metavar="NAME[,NAME]", help="default: all in build.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: local, in the bundle")
    parser.add_argument("--sign-key", type=Path, metavar="KEY", help="Ed25519 key that signs what was built")
    parser.add_argument("--timing-cache", type=Path, metavar="FILE", help="timings of earlier builds on this device")
    parser.add_argument("--engine", type=Path, metavar="FILE", help="pack this engine, which trtexec built")
    parser.add_argument("--trtexec", action="store_true", help="print trtexec's command line and build nothing")
    try:
        run(parser.parse_args(argv), Path(__file__).resolve().parent)
    except BuildError as error:
        for problem in error.problems:
            _say(f"error: {problem}")
        return EXIT_FAILED
    except OSError as error:
        _say(f"error: {error}")
        return EXIT_FAILED
    except KeyboardInterrupt:
        _say("interrupted; the engine that was being built was not written")
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
