"""Small bundles with the files of real ones, sealed by a key; their models and engines are random bytes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from clinifed.bundle import seal
from clinifed.files import file_sha256, sha256_of, write_json
from clinifed.signing import sign

ONNX = "onnx/int8.onnx"
ENGINES = ("engines/tensorrt-rtx/fp16.engine", "engines/tensorrt-rtx/int8.engine")
CARD: dict[str, Any] = {
    "schema_version": 1,
    "federation": "three-hospitals",
    "job": "run-7",
    "rounds": 8,
    "contract_sha256": "c" * 64,
    "base_model": {"ref": "tiny", "sha256": "b" * 64},
    "specialties": {"radiology": {"modality": "X-ray", "labels": []}},
    "sites": {
        "alder": {
            "specialties": ["radiology"],
            "rounds_accepted": 8,
            "privacy": {
                "epsilon": 0.98765,
                "delta": 1e-5,
                "unit": "patient",
                "relation": "add_remove",
                "scope": "lifetime",
                "ledger_head": "d" * 64,
            },
        }
    },
}
PARITY: dict[str, Any] = {
    "test": {"sha256": "e" * 64, "data_class": "synthetic", "images": 256, "skipped": 0},
    "precisions": {
        "int8": {
            "packed": True,
            "onnx_bytes": 40000,
            "runtime": "onnxruntime 1.32.0, CPU",
            "no_engine": {"tensorrt": "built on the device"},
            "parity": {"cosine_mean": 0.99912, "cosine_min": 0.998, "top1_agreement": 1.0, "logits_max_abs": 0.31},
        }
    },
}
CONTENT: dict[str, Any] = {
    "exportable": True,
    "profile": "workstation",
    "lineage": {"federation": "three-hospitals", "rounds": 8, "specialties": ["radiology"]},
    "heads": {"radiology": "trained"},
    "tools": {"onnx": "1.23.0"},
    "calibration": {"sha256": "f" * 64, "public": True, "images": 64},
}


def fill(folder: Path) -> Path:
    """The files of a bundle, not sealed yet."""
    random = np.random.default_rng(5)
    for name, size in {"onnx/fp32.onnx": 90_000, ONNX: 40_000, ENGINES[0]: 50_000, ENGINES[1]: 50_000}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(random.bytes(size))
    (folder / "build_engine.py").write_text("# builds the engine on the device\n" * 40)
    write_json(folder / "card.json", CARD)
    write_json(folder / "parity.json", PARITY)
    write_json(folder / "labels.json", {"radiology": {"labels": ["clear", "opacity"]}})
    return folder


def sealed(folder: Path, key: Ed25519PrivateKey | None, **changes: Any) -> Path:
    """A whole bundle."""
    seal(fill(folder), {**CONTENT, **changes}, key)
    return folder


def reseal(folder: Path, key: Ed25519PrivateKey | None, **changes: Any) -> None:
    """Seal what lies in ``folder`` now, as somebody would who changed it."""
    content = json.loads((folder / "manifest.json").read_text())
    for name in ("manifest.json", "manifest.sig"):
        (folder / name).unlink(missing_ok=True)
    seal(folder, {k: v for k, v in {**content, **changes}.items() if k not in ("files", "schema_version")}, key)


def build_locally(folder: Path, key: Ed25519PrivateKey | None, model: str = "image-int8", **changes: Any) -> Path:
    """An engine of the device in ``local/<model>``, as the script of a bundle writes it; returns that folder."""
    place = folder / "local" / model
    (place / "1").mkdir(parents=True)
    (place / "1" / "model.plan").write_bytes(np.random.default_rng(6).bytes(5_000))
    (place / "build.log").write_text("built\n")
    content = {
        "schema_version": 1,
        "manifest_sha256": file_sha256(folder / "manifest.json"),
        "onnx": {"name": ONNX, "sha256": file_sha256(folder / ONNX)},
        "files": {
            name: {"sha256": file_sha256(place / name), "bytes": (place / name).stat().st_size}
            for name in ("1/model.plan", "build.log")
        },
        "tensorrt": "10.3.0",
        **changes,
    }
    write_json(place / "engine.json", content)
    if key is not None:
        digest = sha256_of((place / "engine.json").read_bytes())
        (place / "engine.sig").write_bytes(bytes.fromhex(sign(key, "local engine", digest)))
    return place
