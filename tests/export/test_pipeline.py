"""The whole export: a bundle that is complete, described and hashed, or none."""

import json
import shutil
from pathlib import Path

import pytest

from clinifed.errors import ExportError, PrivacyError
from clinifed.export.pipeline import ExportReport, export_checkpoint
from clinifed.files import file_sha256


def export(checkpoint: Path, out: Path, **changes: object) -> ExportReport:
    settings: dict[str, object] = {
        "precisions": ("fp32", "int8"),
        "targets": ("onnx",),
        "calibration": None,
        "test": None,
    }
    return export_checkpoint(checkpoint, out, **{**settings, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "bundle"
    export(checkpoint, out)
    return out


def test_the_bundle_holds_what_its_manifest_says_and_nothing_else(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    on_disk = {str(p.relative_to(bundle)) for p in bundle.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(manifest["files"]) == on_disk >= {"onnx/fp32.onnx", "onnx/int8.onnx", "card.json", "labels.json"}
    assert all(entry["sha256"] == file_sha256(bundle / name) for name, entry in manifest["files"].items())


def test_the_manifest_says_the_calibration_was_public(bundle: Path) -> None:
    calibration = json.loads((bundle / "manifest.json").read_text())["calibration"]
    assert calibration["public"] is True
    assert len(calibration["sha256"]) == 64


def test_no_file_names_this_machine(bundle: Path, checkpoint: Path) -> None:
    for path in (p for p in bundle.rglob("*") if p.is_file()):
        assert str(checkpoint.parent).encode() not in path.read_bytes(), path
        assert str(Path.cwd()).encode() not in path.read_bytes(), path


def test_int8_is_smaller_and_close(bundle: Path) -> None:
    rows = json.loads((bundle / "parity.json").read_text())["precisions"]
    assert rows["fp32"]["parity"]["logits_max_abs"] <= 1e-4
    assert rows["int8"]["parity"]["cosine_mean"] >= 0.9985
    sizes = {name: (bundle / "onnx" / f"{name}.onnx").stat().st_size for name in ("fp32", "int8")}
    assert sizes["int8"] < 0.5 * sizes["fp32"]


def test_an_existing_bundle_and_unknown_names_are_refused_at_once(bundle: Path, checkpoint: Path) -> None:
    with pytest.raises(ExportError) as caught:
        export(checkpoint, bundle, precisions=("fp64",), targets=("openvino",))
    text = "\n".join(caught.value.problems)
    assert "fp64" in text
    assert "openvino" in text
    assert "never overwritten" in text


def test_a_hospitals_images_do_not_calibrate_and_leave_nothing(
    checkpoint: Path, sets: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(PrivacyError):
        export(checkpoint, tmp_path / "bundle", calibration=sets["hospital"])
    assert list(tmp_path.iterdir()) == []


def test_another_base_model_is_refused_with_both_hashes(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run" / "checkpoint"
    shutil.copytree(checkpoint, copy)
    card = json.loads((copy / "card.json").read_text())
    actual, card["base_model"]["sha256"] = card["base_model"]["sha256"], "e" * 64
    card["public"] = {k: str((checkpoint / v).resolve()) for k, v in card["public"].items()}
    (copy / "card.json").write_text(json.dumps(card))
    with pytest.raises(ExportError, match=f"(?s){'e' * 64}.*{actual}"):
        export(copy, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
