"""From a global checkpoint to a bundle: ONNX, precisions, parity gate, engines, manifest."""

import tempfile
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clinifed.errors import ExportError
from clinifed.evaluation.parity import Outputs, compare, run_onnx
from clinifed.export.bundle import NOT_EXECUTED, ExportReport, Row, describe, write_manifest
from clinifed.export.calibration import calibration_set
from clinifed.export.onnx import OPSET, export_onnx, write_onnx
from clinifed.export.precision import convert
from clinifed.export.presets import Presets, load_presets
from clinifed.export.sensitivity import exclusions
from clinifed.export.source import Card, TestImages, load_model, public_manifest
from clinifed.export.tensorrt import build_engine, check_target, write_engine
from clinifed.models.adapters import GlobalModel
from clinifed.models.state import read_checkpoint

__all__ = ["NO_ENGINES", "ExportReport", "Row", "export_checkpoint"]

NO_ENGINES = "onnx"  # the target that stops after the ONNX files
_BATCH = 8  # images per run of torch; changes memory only


def _silent(_: str) -> None:
    """No progress."""


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    precisions: Sequence[str],
    targets: Sequence[str],
    calibration: Path | None = None,
    test: Path | None = None,
    model_ref: str | None = None,
    progress: Callable[[str], None] = _silent,
) -> ExportReport:
    """Export a global checkpoint to the directory ``out``, which appears whole or not at all.

    A precision that misses its parity threshold is not packed; the report says why.

    Args:
        checkpoint: a directory of ``model.safetensors`` and ``card.json``.
        out: must not exist; its parent is made when it is absent.
        precisions: keys of ``precisions`` in ``presets.yaml``.
        targets: keys of :data:`clinifed.export.tensorrt.TARGETS`, or ``onnx`` for no engines.
        calibration: manifest of public images for INT8 ranges; default: the card's ``public.validation``.
        test: manifest of public images for parity; default: the card's ``public.test``.
        model_ref: where the base model is on this machine; default: the card's ``base_model.ref``.
        progress: called with one line per step.

    Raises:
        ExportError: a precision or target is unknown or cannot be built here (checked before any work),
            ``out`` exists, the base model is not the checkpoint's, or no precision passed its parity.
        PrivacyError: calibration or test images are a hospital's.
        ModelError, DataError: the checkpoint, the base model or a manifest cannot be used.
    """
    presets = load_presets()
    precisions = tuple(dict.fromkeys(precisions))  # asked for twice is made once
    packages = _check_request(presets, out, precisions, targets)
    source = read_checkpoint(checkpoint)
    card = Card.of(source)
    test_set = public_manifest(card, "test", test, "--test", "Parity figures")
    ranges_from = None
    if any(presets.precisions[name].quantize for name in precisions):
        ranges_from = public_manifest(card, "validation", calibration, "--calibration", "The quantisation ranges")

    progress("loading the base model")
    model, preprocess = load_model(source, card, model_ref or card.base_model)
    images = TestImages.load(test_set, preprocess, card, presets.parity_images)
    public = None
    if ranges_from is not None:
        public = calibration_set(ranges_from, preprocess, presets.calibration_images)
    progress(f"torch FP32 on {len(images.pixels)} public test images")
    reference = _run_torch(model, images.pixels)

    out.parent.mkdir(parents=True, exist_ok=True)
    # A sibling of `out`, so that the last step is a rename on one file system; removed whatever happens.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        bundle, work = Path(scratch, "bundle"), Path(scratch, "work")
        bundle.mkdir()
        work.mkdir()
        progress(f"ONNX, opset {OPSET}")
        graph = export_onnx(model, preprocess.size_px)
        del model
        rows = []
        for name in precisions:
            progress(f"{name}: converting, and comparing with torch")
            preset = presets.precisions[name]
            path = work / f"{name}.onnx"
            pixels = None if public is None else public.pixels
            kept: tuple[str, ...] = ()
            attempts = chain([()], exclusions(graph, preset, pixels, work))  # the search begins at the first failure
            for kept in attempts:
                size = write_onnx(convert(graph, preset, pixels, work, kept), path)
                parity = compare(reference, run_onnx(path, images.pixels), images.specialties, images.labels)
                failures = tuple(preset.parity.failures(parity))
                if not failures:
                    break
                progress(f"{name}: {'; '.join(failures)}" + (f" with {len(kept)} nodes kept" if kept else ""))
            engines: dict[str, dict[str, Any]] = {}
            if failures:
                progress(f"{name}: not packed: {'; '.join(failures)}")
            else:
                path = _packed(path, bundle / "onnx")
                for target in packages:
                    progress(f"{name}: building the {target} engine")
                    engine = build_engine(path, target, presets.engine_for(name))
                    write_engine(engine, bundle / "engines" / target / f"{name}.engine")
                    engines[target] = engine.metadata()
            rows.append(Row(name, parity, failures, size, engines, kept))
        if all(row.failures for row in rows):
            raise ExportError(*(f"{row.precision}: not packed: {'; '.join(row.failures)}" for row in rows))
        report = ExportReport(out, tuple(rows), NOT_EXECUTED if packages else None)
        describe(bundle, card, preprocess, images, report)
        write_manifest(bundle, report, packages, public)
        bundle.replace(out)
    progress(f"bundle: {out}")
    return report


def _check_request(presets: Presets, out: Path, precisions: Sequence[str], targets: Sequence[str]) -> dict[str, str]:
    """Refuse what cannot be done, all at once; returns the engine targets with their packages."""
    problems = [
        f"precision {name!r} is not known; use {', '.join(presets.precisions)}"
        for name in precisions
        if name not in presets.precisions
    ]
    if not precisions or not targets:
        problems.append(f"name at least one precision and one target ({NO_ENGINES!r} for no engines)")
    if out.exists():
        problems.append(f"{out} exists and is never overwritten; choose another --out, or remove it")
    packages = {}
    for target in targets:
        if target != NO_ENGINES:
            try:
                packages[target] = check_target(target)
            except ExportError as error:
                problems.extend(error.problems)
    if problems:
        raise ExportError(*problems)
    return packages


def _packed(path: Path, folder: Path) -> Path:
    """Move a file that passed into ``folder``; returns its new path."""
    folder.mkdir(exist_ok=True)
    return path.rename(folder / path.name)


@torch.no_grad()
def _run_torch(model: GlobalModel, pixels: NDArray[np.float32]) -> Outputs:
    """The reference on ``pixels`` (N, 3, S, S): torch, FP32, CPU."""
    batches = [model(torch.from_numpy(pixels[i : i + _BATCH])) for i in range(0, len(pixels), _BATCH)]
    logits = {name: torch.cat([part[name] for _, part in batches]).numpy() for name in batches[0][1]}
    return Outputs(torch.cat([embedding for embedding, _ in batches]).numpy(), logits)
