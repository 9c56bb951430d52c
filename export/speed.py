"""How fast a bundle's models are, and what memory they take: each backend in a process of its own, one after another.

A backend turns one form of the model into a callable over pixels. Which ones there are is ``BACKENDS``; what cannot run
here is listed with its reason. Figures of different machines, or of a machine that was busy with other things for one
backend, say nothing about each other: compare within one run.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clinifed.bundle import Contents
from clinifed.errors import ExportError

__all__ = ["BACKENDS", "BATCHES", "Measured", "Subject", "measure", "subjects"]

BATCHES = (1, 8, 32)
_WARM_UP, _SECONDS, _MOST = 2, 3.0, 200  # runs before the clock; seconds and runs at most for each batch size
_LIMIT_S = 900  # of one backend, compilation included

Run = Callable[[NDArray[np.float32]], object]


@dataclass(frozen=True)
class Subject:
    """One form of the model, and what runs it."""

    backend: str  # a key of BACKENDS
    name: str  # its precision, or torch's way
    path: str  # ONNX file, or checkpoint directory
    model_ref: str | None = None  # the base model, for a checkpoint
    threads: int = 1


@dataclass(frozen=True)
class Measured:
    """What one subject took; seconds are wall time, of one run over a batch."""

    backend: str
    name: str
    latency_s: float | None = None  # at batch 1, median
    latency_p95_s: float | None = None
    images_per_s: dict[str, float] | None = None  # batch size → by the median
    load_s: float | None = None
    peak_rss_mb: float | None = None  # of the process, imports included
    ratio: float | None = None  # of the reference's latency to this one's: above 1 is faster
    reason: str = ""  # why there are no figures

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def _onnxruntime(subject: Subject) -> tuple[Run, int]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = subject.threads
    options.log_severity_level = 3
    known = onnxruntime.get_available_providers()
    providers = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in known]
    session = onnxruntime.InferenceSession(subject.path, options, providers=providers)
    (entry,) = session.get_inputs()
    return lambda pixels: session.run(None, {entry.name: pixels}), int(entry.shape[-1])


def _torch(subject: Subject, compiled: bool) -> tuple[Run, int]:
    import torch

    from clinifed.export.deployed import deploy
    from clinifed.export.source import Card, load_model
    from clinifed.models.adapters import accelerator
    from clinifed.models.state import read_checkpoint

    torch.set_num_threads(subject.threads)
    checkpoint = read_checkpoint(Path(subject.path))
    card = Card.of(checkpoint)
    trained, backbone = load_model(checkpoint, card, subject.model_ref or card.base_model)
    device = accelerator()
    deployed = deploy(trained, backbone, card.specialties, card.training).to(device)
    model: Callable[..., Any] = torch.compile(deployed) if compiled else deployed

    @torch.no_grad()
    def run(pixels: NDArray[np.float32]) -> object:
        embedding, *_ = model(torch.from_numpy(pixels).to(device))
        return embedding.cpu()  # waits for a GPU

    return run, backbone.preprocess.size_px


# Subject → what runs it, and the side of an image in pixels
BACKENDS: dict[str, Callable[[Subject], tuple[Run, int]]] = {
    "onnxruntime": _onnxruntime,
    "torch": lambda subject: _torch(subject, compiled=False),
    "torch.compile": lambda subject: _torch(subject, compiled=True),
}


def subjects(bundle: Path, contents: Contents, checkpoint: Path | None, ref: str | None, threads: int) -> list[Subject]:
    """Everything of ``bundle`` that can be measured, the reference first.

    Args:
        contents: of the bundle, whose hashes held.
        checkpoint: what it was exported from, for torch's figures; None leaves them out.
        ref: the base model, if not where the checkpoint's card says.
        threads: of each backend.

    Raises:
        ExportError: the bundle holds no ONNX model.
    """
    found = [
        Subject("onnxruntime", Path(name).stem, str(bundle / name), threads=threads)
        for name in sorted(contents.files)
        if name.startswith("onnx/") and name.endswith(".onnx") and Path(name).stem != "text"
    ]
    if not found:
        raise ExportError(f"{bundle}: holds no ONNX model to measure; export with --target onnx")
    found.sort(key=lambda subject: subject.name != "fp32")
    if checkpoint is None:
        return found
    own = [Subject(kind, "fp32", str(checkpoint), ref, threads) for kind in ("torch", "torch.compile")]
    return own + found


def measure(wanted: Sequence[Subject], progress: Callable[[str], None]) -> list[Measured]:
    """The figures of each subject; ratios are to the first one that could be measured."""
    done: list[Measured] = []
    for subject in wanted:
        progress(f"{subject.backend} {subject.name}")
        done.append(_in_a_process(subject))
    reference = next((m.latency_s for m in done if m.latency_s), None)
    return [replace(m, ratio=reference / m.latency_s if reference and m.latency_s else None) for m in done]


def _in_a_process(subject: Subject) -> Measured:
    environment = {**os.environ, "OMP_NUM_THREADS": str(subject.threads)}
    command = [sys.executable, "-P", "-m", "clinifed.export.speed", json.dumps(asdict(subject))]
    try:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return Measured(subject.backend, subject.name, reason=f"did not end within {_LIMIT_S} s")
    if ended.returncode:
        said = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return Measured(subject.backend, subject.name, reason=f"ended with {ended.returncode}: {said[:300]}")
    return Measured(**json.loads(ended.stdout.splitlines()[-1]))


def _times(run: Run, pixels: NDArray[np.float32]) -> NDArray[np.float64]:
    for _ in range(_WARM_UP):
        run(pixels)
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < _SECONDS and len(taken) < _MOST):
        began = time.perf_counter()
        run(pixels)
        taken.append(time.perf_counter() - began)
    return np.array(taken)


def measure_here(subject: Subject) -> Measured:
    """The figures of ``subject`` in this process."""
    began = time.perf_counter()
    run, size_px = BACKENDS[subject.backend](subject)
    loaded = time.perf_counter() - began
    draw = np.random.default_rng(0)
    times = {n: _times(run, draw.standard_normal((n, 3, size_px, size_px), np.float32)) for n in BATCHES}
    return Measured(
        subject.backend,
        subject.name,
        latency_s=float(np.median(times[1])),
        latency_p95_s=float(np.quantile(times[1], 0.95)),
        images_per_s={str(n): float(n / np.median(t)) for n, t in times.items()},
        load_s=loaded,
        peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    )


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure_here(Subject(**json.loads(sys.argv[1]))).to_dict()))
