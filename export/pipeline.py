"""From a global checkpoint to a bundle: heads, ONNX, precisions through the gate, engines, seal."""

import gc
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clinifed.bundle import seal
from clinifed.errors import ExportError
from clinifed.evaluation.parity import Outputs
from clinifed.export.bundle import ExportReport, Row, describe, lineage, stays_here, tools
from clinifed.export.calibration import CalibrationSet, calibration_set
from clinifed.export.deployed import deploy
from clinifed.export.gate import Gate, Progress
from clinifed.export.onnx import OPSET, export_onnx
from clinifed.export.precision import Converter
from clinifed.export.report import write_report
from clinifed.export.request import Request, resolve
from clinifed.export.selection import HeadChoice, choose_heads, run_torch
from clinifed.export.source import Card, PublicImages, load_model, public_manifest
from clinifed.export.tensorrt import Planned, build_plan, write_build_plan
from clinifed.export.text import export_text_tower
from clinifed.export.triton import Interface, model_name, write_repository
from clinifed.models.state import read_checkpoint
from clinifed.signing import read_signing_key

__all__ = ["ExportReport", "Row", "export_checkpoint"]


def _silent(_: str) -> None:
    """No progress."""


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    profile: str = "workstation",
    precisions: Sequence[str] = ("fp32", "fp16", "int8"),
    targets: Sequence[str] | None = None,
    specialties: Sequence[str] | None = None,
    text: bool = False,
    calibration: Path | None = None,
    test: Path | None = None,
    hospital_data: bool = False,
    parity_images: int | None = None,
    model_ref: str | None = None,
    sign_key: Path | None = None,
    timing_cache: Path | None = None,
    progress: Progress = _silent,
) -> ExportReport:
    """Export a global checkpoint to the directory ``out``, which appears whole or not at all.

    A precision that misses its parity threshold is not packed; the report says why. An engine that cannot be built
    here, but on the device it is for, is left to the bundle's own ``build_engine.py``; the report says that too.

    Args:
        checkpoint: a directory of ``model.safetensors`` and ``card.json``.
        out: must not exist; its parent is made when it is absent.
        profile: the kind of machine, a key of ``profiles`` in ``presets.yaml``.
        precisions: keys of ``precisions`` there.
        targets: keys of :data:`clinifed.export.tensorrt.TARGETS`, or ``onnx`` for no engines; default: the profile's.
        specialties: those whose heads are exported; default: all of the checkpoint.
        text: export the text tower too.
        calibration: manifest of public images, for INT8 ranges and the choice of heads; default: the card's
            ``public.validation``.
        test: manifest of public images for parity; default: the card's ``public.test``.
        hospital_data: take manifests of a hospital's images; the bundle is then marked as not exportable.
        parity_images: how many of the test images are used at most; default: the presets' number.
        model_ref: where the base model is on this machine; default: the card's ``base_model.ref``.
        sign_key: file of the Ed25519 key that signs the manifest; None leaves the bundle unsigned.
        timing_cache: file of the builder's kernel timings, kept between exports.
        progress: called with one line per step.

    Raises:
        ExportError: a name is unknown or cannot be built (checked before any work), ``out`` exists, the base model
            is not the checkpoint's, or no precision passed its parity.
        PrivacyError: calibration or test images are a hospital's and that was not asked for; no such signing key.
        ModelError, DataError: the checkpoint, the base model or a manifest cannot be used.

    Guarantees:
        - A bundle appears whole or not at all.
        - A hospital's images shape nothing that may leave it.
    """
    request = resolve(out, profile, precisions, targets)
    key = None if sign_key is None else read_signing_key(sign_key)
    source = read_checkpoint(checkpoint)
    card = Card.of(source)
    tests = public_manifest(card, "test", test, "--test", "Parity figures", hospital_data)
    ranges_from = None
    if request.calibrates or calibration is not None or card.public.get("validation"):
        purpose = "Quantisation ranges, and the choice of heads,"
        ranges_from = public_manifest(card, "validation", calibration, "--calibration", purpose, hospital_data)

    progress("loading the base model")
    trained, backbone = load_model(source, card, model_ref or card.base_model)
    model = deploy(trained, backbone, card.specialties, card.training, specialties)
    names = model.specialties
    presets, preprocess = request.presets, backbone.preprocess
    count = presets.parity_images if parity_images is None else parity_images
    images = PublicImages.load(tests, backbone, card, count, "--test", names)
    calibrated, heads = None, {name: HeadChoice("trained", "no public validation set: not compared") for name in names}
    if ranges_from is not None:
        calibrated = calibration_set(ranges_from, preprocess, presets.calibration_images, hospital_data)
        judges = PublicImages.load(ranges_from, backbone, card, presets.selection_images, "--calibration", names)
        progress(f"trained heads against zero-shot on {len(judges.pixels)} public validation images")
        _, logits, zero_shot = run_torch(model, judges.pixels)
        heads = choose_heads(logits, zero_shot, judges, card.objective)
        model.zero_shot_heads = frozenset(name for name, choice in heads.items() if choice.head == "zero-shot")
    progress(f"torch FP32 on {len(images.pixels)} public test images")
    reference = Outputs(*run_torch(model, images.pixels))

    out.parent.mkdir(parents=True, exist_ok=True)
    # A sibling of `out`, so that the last step is a rename on one file system; removed whatever happens.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        bundle, work = Path(scratch, "bundle"), Path(scratch, "work")
        for folder in (bundle, work):
            folder.mkdir()
        if text:
            progress("ONNX of the text tower")
            export_text_tower(bundle, backbone, [card.specialties[name] for name in names])
        progress(f"ONNX, opset {OPSET}")
        graph = export_onnx(model, preprocess.size_px)
        del trained, backbone  # at BiomedCLIP's size 0.8 GB; what is described below is small
        gc.collect()
        pixels = None if calibrated is None else calibrated.pixels
        gate = Gate(request, Converter(graph, pixels), images, reference, bundle, work, timing_cache, progress)
        rows = tuple(gate.admit(name) for name in request.precisions)
        packed = [row.precision for row in rows if not row.failures]
        if not packed:
            raise ExportError(*(f"{row.precision}: not packed: {'; '.join(row.failures)}" for row in rows))
        used: list[tuple[str, str]] = [("parity figures", images.manifest.data_class)]
        if calibrated is not None:
            used.append(("quantisation ranges and choice of heads", calibrated.data_class))
        reasons = stays_here(card, names, used)
        report = ExportReport(out, rows, heads, not reasons, reasons)
        describe(bundle, source, card, preprocess, model, images, report)
        write_report(bundle, report, {name: presets.precisions[name].parity for name in request.precisions})
        labels = {name: list(card.specialties[name].labels) for name in names}
        planned = packed if "tensorrt" in request.deferred else []
        machine = presets.profiles[profile]
        write_repository(bundle, Interface.of(graph, labels), machine.engine.profile, planned)
        plans = [
            Planned(n, bundle / "onnx" / f"{n}.onnx", model_name(n, "tensorrt"), presets.engine_for(profile, n))
            for n in packed
        ]
        write_build_plan(bundle, build_plan(bundle, plans, preprocess.size_px, machine.on_device))
        seal(bundle, _manifest(request, report, lineage(source, card, model), calibrated), key)
        bundle.replace(out)
    progress(f"bundle: {out}")
    return report


def _manifest(
    request: Request, report: ExportReport, lineage: dict[str, Any], calibration: CalibrationSet | None
) -> dict[str, Any]:
    """What the manifest says besides its files."""
    return {
        "exportable": report.exportable,
        **({} if report.exportable else {"reasons": list(report.reasons)}),
        "profile": request.profile,
        "lineage": lineage,
        "heads": {name: choice.head for name, choice in report.heads.items()},
        "calibration": None if calibration is None else calibration.to_dict(),
        "engines": {row.precision: dict(row.engines) for row in report.rows if row.engines},
        "tools": tools(request.builders),
    }
