"""What a bundle holds besides models: the files a person or a runtime reads, and the seal over all of them.

::

    BUNDLE/  onnx/<precision>.onnx        typed graphs
             engines/<target>/<precision>.engine
             text/                        the text tower and its tokenizer, where they were asked for
             triton/  device/             a Triton model repository, and what a device adds to its own
             build_engine.py  builder.py  build.json  what builds engines where they run
             model.safetensors  prompts.safetensors  card.json  labels.json  preprocess.json
             parity.json  report/         how close each precision is to the model it came from
             manifest.json  manifest.sig  SHA-256 of every other file, and who says so
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import save

from clinifed.evaluation.parity import EMBEDDING, LOGITS, PIXELS, ZERO_SHOT, Parity
from clinifed.export.calibration import PUBLIC
from clinifed.export.deployed import DeployedModel
from clinifed.export.onnx import MAX_BATCH
from clinifed.export.selection import HeadChoice
from clinifed.export.source import Card, PublicImages
from clinifed.files import canonical_json, file_sha256, write_atomic, write_json
from clinifed.models.backbone import Preprocess
from clinifed.models.state import CARD, WEIGHTS, Checkpoint

__all__ = ["ExportReport", "Row", "describe", "lineage", "stays_here", "tools"]

PROMPTS = "prompts.safetensors"
_TOOLS = ("clinifed", "torch", "onnx", "onnxscript", "onnxruntime", "tritonclient")


@dataclass(frozen=True)
class Row:
    """One precision."""

    precision: str
    parity: Parity  # of its ONNX with torch FP32
    failures: tuple[str, ...]  # thresholds it missed; it is packed only when there are none
    onnx_bytes: int
    runtime: str = ""  # what the figures were measured with
    engines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # target → metadata
    deferred: Mapping[str, str] = field(default_factory=dict)  # target → why it has no engine yet, or none at all
    engine_parity: Mapping[str, Parity] = field(default_factory=dict)  # target → of the engine, where one was run
    kept: tuple[str, ...] = ()  # nodes left unquantised so that it passed
    notes: Mapping[str, Any] = field(default_factory=dict)  # what the conversion did: folds, nodes kept in FP32

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
            "conversion": dict(self.notes),
            "onnx_bytes": self.onnx_bytes,
            "engine_bytes": self.engine_bytes,
            "no_engine": dict(self.deferred),
            "runtime": self.runtime,
            "parity": self.parity.to_dict(),
            "engine_parity": {target: parity.to_dict() for target, parity in self.engine_parity.items()},
        }


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and how close each precision is to the model it came from."""

    bundle: Path
    rows: tuple[Row, ...]  # in the order they were asked for, refused ones included
    heads: Mapping[str, HeadChoice]  # specialty → what its logits are
    exportable: bool = True
    reasons: tuple[str, ...] = ()  # why it is not exportable

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "bundle": str(self.bundle),
            "exportable": self.exportable,
            "reasons": list(self.reasons),
            "heads": {name: choice.to_dict() for name, choice in self.heads.items()},
            "precisions": [row.to_dict() for row in self.rows],
        }


def stays_here(card: Card, exported: Sequence[str], used: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Why a bundle may not leave the hospital; empty where it may.

    Args:
        card: of the checkpoint.
        exported: the specialties in the bundle.
        used: what images were used for, and their manifest's class.

    Guarantees:
        - An in-house head, or anything made of a hospital's images outside a privacy budget, marks the bundle.
    """
    reasons = [] if card.exportable else [f"{CARD}: the checkpoint is marked as not exportable"]
    reasons += [f"{name}: an in-house head" for name in card.in_house if name in exported]
    reasons += [f"{purpose}: made of a hospital's images" for purpose, kind in used if kind not in PUBLIC]
    return tuple(reasons)


def describe(
    bundle: Path,
    source: Checkpoint,
    card: Card,
    preprocess: Preprocess,
    model: DeployedModel,
    images: PublicImages,
    report: ExportReport,
) -> None:
    """Write the weights, the prompts, and ``card.json``, ``labels.json``, ``preprocess.json``, ``parity.json``."""
    left_out = tuple(f"heads.{name}." for name in card.specialties if name not in model.specialties)
    weights = {name: tensor for name, tensor in sorted(source.params.items()) if not name.startswith(left_out)}
    write_atomic(bundle / WEIGHTS, save(weights))
    write_json(bundle / CARD, _card(source, card, model.specialties, file_sha256(bundle / WEIGHTS)))
    prompts = {name: model.prompts(name).contiguous() for name in model.specialties}
    write_atomic(bundle / PROMPTS, save(prompts))
    labels = {name: _head(card, name, report.heads[name], model.shows_zero_shot) for name in model.specialties}
    write_json(bundle / "labels.json", labels)
    size = preprocess.size_px
    graph = {
        "input": {"name": PIXELS, "dtype": "float32", "shape": ["batch", 3, size, size], "max_batch": MAX_BATCH},
        "embedding": EMBEDDING,
    }
    write_json(bundle / "preprocess.json", {**asdict(preprocess), **graph})
    public = images.manifest.data_class in PUBLIC
    test = {
        "manifest_sha256": images.manifest.sha256,
        "pixels_sha256": images.pixels_sha256 if public else None,
        "data_class": images.manifest.data_class,
        "images": len(images.pixels) if public else None,
        "skipped": images.skipped if public else None,
    }
    rows = {row.precision: row.to_dict() for row in report.rows}
    write_json(bundle / "parity.json", {"reference": "torch FP32 on the CPU", "test": test, "precisions": rows})


def _card(source: Checkpoint, card: Card, exported: Sequence[str], weights_sha256: str) -> dict[str, Any]:
    """The checkpoint's card for what is in the bundle; paths of the machine that trained it stay there."""
    kept = {key: value for key, value in source.card.items() if key != "public"}
    return {
        **kept,
        "base_model": {**source.card["base_model"], "ref": _named(card.base_model)},
        "specialties": {name: source.card["specialties"][name] for name in exported},
        "weights_sha256": weights_sha256,
        "checkpoint": {"card_sha256": file_sha256(card.file), "weights_sha256": file_sha256(source.path / WEIGHTS)},
    }


def _named(ref: str) -> str:
    """A base model's reference without the folder it lies in; its hash says which one it is."""
    return ref.partition(":")[0] if ref.startswith("local-dir:") else ref


def _head(card: Card, name: str, choice: HeadChoice, zero_shot: bool) -> dict[str, Any]:
    specialty = card.specialties[name]
    return {
        "output": LOGITS + name,
        "zero_shot_output": ZERO_SHOT + name if zero_shot else None,
        "modality": specialty.modality,
        "frames": specialty.frames,  # of a volume, whose mean decides; None: each file is an image
        "labels": list(specialty.labels),  # in the order of the logits
        "decision": "softmax" if card.objective.labels == "one" else "sigmoid",
        "prompts": {label: list(prompts) for label, prompts in specialty.labels.items()},
        "in_house": name in card.in_house,
        **choice.to_dict(),
    }


def lineage(source: Checkpoint, card: Card, model: DeployedModel) -> dict[str, Any]:
    """Where the model comes from, for the manifest; the card has it in full."""
    prompts = {name: {k: list(v) for k, v in card.specialties[name].labels.items()} for name in model.specialties}
    return {
        "federation": card.federation,
        "contract_sha256": source.card.get("contract_sha256"),
        "rounds": source.card.get("rounds"),
        "checkpoint_sha256": file_sha256(source.path / WEIGHTS),
        "base_model": {"ref": _named(card.base_model), "sha256": card.sha256},
        "specialties": list(model.specialties),
        "prompts_version": sha256(canonical_json([card.sha256, card.training.temperature, prompts])).hexdigest(),
    }


def tools(packages: Mapping[str, str]) -> dict[str, str]:
    """What made the bundle: package → version; ``packages`` are those that built engines, by target."""
    return {**{name: version(name) for name in _TOOLS}, **packages}
