"""What a bundle holds besides models: the files a person or a runtime reads, and the manifest over all of them.

::

    BUNDLE/  onnx/<precision>.onnx   engines/<target>/<precision>.engine
             card.json   labels.json   preprocess.json   parity.json
             manifest.json            SHA-256 and size of every other file, and what made them
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clinifed.config import Specialty
from clinifed.evaluation.parity import EMBEDDING, LOGITS, PIXELS, Parity
from clinifed.export.calibration import CalibrationSet
from clinifed.export.onnx import MAX_BATCH
from clinifed.export.source import Card, TestImages
from clinifed.files import file_sha256, write_json
from clinifed.models.backbone import Preprocess
from clinifed.models.state import CARD

__all__ = ["ExportReport", "Row", "describe", "write_manifest"]

SCHEMA_VERSION = 1
NOT_EXECUTED = "engine never executed: parity was measured on the ONNX it was built from"
_TOOLS = ("clinifed", "torch", "onnx", "onnxscript", "onnxruntime", "onnxconverter-common")


@dataclass(frozen=True)
class Row:
    """One precision."""

    precision: str
    parity: Parity  # of its ONNX with torch FP32
    failures: tuple[str, ...]  # thresholds it missed; it is packed only when there are none
    onnx_bytes: int
    engines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # target → metadata
    kept: tuple[str, ...] = ()  # nodes left unquantised so that it passed

    @property
    def engine_bytes(self) -> dict[str, int]:
        """Size of each engine in bytes, by target."""
        return {target: int(metadata["bytes"]) for target, metadata in self.engines.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "precision": self.precision,
            "packed": not self.failures,
            "failures": list(self.failures),
            "kept_unquantised": list(self.kept),
            "onnx_bytes": self.onnx_bytes,
            "engine_bytes": self.engine_bytes,
            "parity": self.parity.to_dict(),
        }


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and how close each precision is to the model it came from."""

    bundle: Path
    rows: tuple[Row, ...]  # in the order they were asked for, refused ones included
    engine_parity: str | None  # why there is none; None where no engine was asked for

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "bundle": str(self.bundle),
            "engine_parity": self.engine_parity,
            "precisions": [row.to_dict() for row in self.rows],
        }


def describe(bundle: Path, card: Card, preprocess: Preprocess, images: TestImages, report: ExportReport) -> None:
    """Write ``card.json``, ``labels.json``, ``preprocess.json`` and ``parity.json``."""
    shutil.copyfile(card.file, bundle / CARD)
    labels = {name: _head(name, specialty) for name, specialty in card.specialties.items()}
    write_json(bundle / "labels.json", labels)
    size = preprocess.size_px
    graph = {
        "input": {
            "name": PIXELS,
            "dtype": "float32",
            "shape": ["batch", 3, size, size],
            "max_batch": MAX_BATCH,
        },
        "embedding": EMBEDDING,
    }
    write_json(bundle / "preprocess.json", {**asdict(preprocess), **graph})
    write_json(
        bundle / "parity.json",
        {
            "reference": "torch FP32 on the CPU",
            "runtime": f"onnxruntime {version('onnxruntime')}, CPUExecutionProvider",
            "engines": report.engine_parity,
            "test": {
                "sha256": images.manifest.sha256,
                "data_class": images.manifest.data_class,
                "images": len(images.pixels),
                "skipped": images.skipped,
            },
            "precisions": {row.precision: row.to_dict() for row in report.rows},
        },
    )


def _head(name: str, specialty: Specialty) -> dict[str, Any]:
    return {
        "output": LOGITS + name,
        "modality": specialty.modality,
        "labels": list(specialty.labels),  # in the order of the logits
        "prompts": {label: list(prompts) for label, prompts in specialty.labels.items()},
    }


def write_manifest(
    bundle: Path, report: ExportReport, packages: Mapping[str, str], calibration: CalibrationSet | None
) -> None:
    """Write ``manifest.json``, last: it lists every file that is there by then.

    Args:
        bundle: the directory.
        report: of the same export.
        packages: engine target → package and version that builds for it.
        calibration: where INT8 ranges came from, if there are any.
    """
    files = {
        path.relative_to(bundle).as_posix(): {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        for path in sorted(bundle.rglob("*"))
        if path.is_file()
    }
    ranges = None
    if calibration is not None:
        ranges = {
            "sha256": calibration.sha256,
            "public": True,  # calibration_set takes no others
            "data_class": calibration.data_class,
            "images": calibration.count,
        }
    content = {
        "schema_version": SCHEMA_VERSION,
        "files": files,
        "tools": {**{name: version(name) for name in _TOOLS}, **packages},
        "engines": {row.precision: dict(row.engines) for row in report.rows if row.engines},
        "calibration": ranges,
    }
    write_json(bundle / "manifest.json", content)
